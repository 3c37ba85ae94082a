"""Compute attention inside packed documents, and the loss without full logits."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel

from saigakit.errors import SaigaError
from saigakit.prompt.encoding import IGNORE_INDEX
from saigakit.weights.memory import CHUNK_LOGITS

PACKED_ATTENTION = "packed_sdpa"


def use_packed_attention(model: torch.nn.Module) -> None:
    """Sets a transformers model to it, for training on packs alone; `set_attn_implementation("sdpa")` undoes it."""
    AttentionInterface.register(PACKED_ATTENTION, packed_sdpa)
    model.set_attn_implementation(PACKED_ATTENTION)  # type: ignore[operator]


def packed_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    position_ids: torch.Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """query (1, heads, tokens, width), key and value (1, kv_heads, tokens, width) -> (1, tokens, heads, width).

    A document begins where position_ids is 0. Raises ValueError for a mask, a cache or a batch of more than one
    row: there the documents would see each other, or the padding.
    """
    if attention_mask is not None or position_ids is None or len(query) != 1 or query.shape[2] != key.shape[2]:
        raise ValueError("packed_sdpa takes one row of whole documents: no attention_mask, no cache, position_ids.")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # not enable_gqa: on sm_75 it selects the slow math kernel (huggingface/transformers#48633)
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    starts = (position_ids[0] == 0).nonzero().flatten().tolist()
    sizes = [end - start for start, end in zip(starts, [*starts[1:], query.shape[2]], strict=True)]
    documents = zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)
    # On a CPU the fused kernel's backward pass is slow: 12.8 ms against 4.8 for 190 tokens, 9 heads of 64.
    kernels = (
        [SDPBackend.MATH]
        if query.device.type == "cpu"
        else [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )
    with sdpa_kernel(kernels):
        attended = [
            scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, scale=scaling)
            for q, k, v in documents
        ]
    return torch.cat(attended, 2).transpose(1, 2).contiguous(), None


_PROBE = 8  # tokens on which both heads must agree


class Head(torch.nn.Module):
    """The plain head, which it holds, or nothing at all: then the loss applies it."""

    def __init__(self, plain: torch.nn.Module) -> None:
        super().__init__()
        self.plain = plain
        self.deferred = False

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.training or self.deferred:
            return hidden
        logits: torch.Tensor = self.plain(hidden)
        return logits

    @property
    def weight(self) -> torch.Tensor:
        return self.plain.weight  # type: ignore[return-value]


def use_chunked_loss(model: PreTrainedModel | PeftModel) -> bool:
    """From now on `model` in training mode gives a loss and no logits (hidden states are in their place).

    In evaluation mode it is as before, see also `deferred`. False, and the model as it was, where its loss is not
    that of the head's logits as they are: some models scale or cap them. To be called with the adapter attached.
    Raises SaigaError where the head is trained itself.
    """
    base = _plain_model(model)
    plain, loss_before = base.get_output_embeddings(), base.loss_function
    if any(parameter.requires_grad for parameter in plain.parameters()):
        raise SaigaError("lm_head is trained itself, and its logits cannot be had in chunks: not with modules_to_save.")
    chunked = Head(plain).train(base.training)
    before = _probe_loss(base)
    base.set_output_embeddings(chunked)
    base.loss_function = functools.partial(_chunked_loss, chunked)
    with deferred(model):
        after = _probe_loss(base)
    if abs(after - before) <= 1e-5 * abs(before):
        return True
    base.set_output_embeddings(plain)
    base.loss_function = loss_before
    return False


def sum_exactly(model: PreTrainedModel) -> None:
    """From now on the losses of tokens are added up in float64, and the logits are as before."""
    model.loss_function = _plain_loss


def _plain_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
    **_: object,
) -> torch.Tensor:
    """What transformers' ForCausalLMLoss gives."""
    targets = _shifted(labels, shift_labels).to(logits.device).flatten()
    total = _loss_of_chunk(torch.nn.Identity(), logits.reshape(-1, vocab_size), targets)
    return total / (int((targets != IGNORE_INDEX).sum()) if num_items_in_batch is None else num_items_in_batch)


def _shifted(labels: torch.Tensor, shift_labels: torch.Tensor | None) -> torch.Tensor:
    """What each position is to predict."""
    if shift_labels is not None:
        return shift_labels
    return torch.nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]


@contextmanager
def deferred(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Chunks in evaluation mode too, for a held-out loss; nothing where `use` was not called."""
    head = _plain_model(model).get_output_embeddings()
    if not isinstance(head, Head):
        yield
        return
    head.deferred = True
    try:
        yield
    finally:
        head.deferred = False


def _plain_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    return model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[return-value]


def _chunked_loss(
    head: Head,
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
    **_: object,
) -> torch.Tensor:
    """What transformers' ForCausalLMLoss gives; `logits` are hidden states where the head is deferred."""
    apply = head.plain if head.training or head.deferred else torch.nn.Identity()
    targets = _shifted(labels, shift_labels).to(logits.device)
    learned = targets != IGNORE_INDEX
    targets = targets[learned]
    hidden = logits.flatten(0, 1) if bool(learned.all()) else logits[learned]
    size = max(1, CHUNK_LOGITS // vocab_size)
    chunks = zip(hidden.split(size), targets.split(size), strict=True)
    # Logits of a chunk are made anew in the backward pass: about 1 % more arithmetic for an 8B model.
    losses = [
        checkpoint(_loss_of_chunk, apply, part, target, use_reentrant=False, preserve_rng_state=False)
        for part, target in chunks
    ]
    return torch.stack(losses).sum() / (len(targets) if num_items_in_batch is None else num_items_in_batch)


def _loss_of_chunk(head: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """In float64: a float32 sum of some hundred tokens is off by more than the order of the packs may matter."""
    losses = torch.nn.functional.cross_entropy(
        head(hidden).float(), targets, ignore_index=IGNORE_INDEX, reduction="none"
    )
    return losses.sum(dtype=torch.float64)


def _probe_loss(base: PreTrainedModel) -> float:
    """The loss of a few tokens, without dropout and without a trace in the model."""
    device, dtype, was_training = base.device, base.get_output_embeddings().weight.dtype, base.training
    ids = torch.arange(_PROBE, device=device)[None]
    base.eval()
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        loss = base(input_ids=ids, position_ids=ids, labels=ids, use_cache=False).loss.item()
    base.train(was_training)
    return float(loss)
