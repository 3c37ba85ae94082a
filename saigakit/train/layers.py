"""Compute attention within packed documents, and the loss without full logits."""

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
    """Let a transformers model train on packs, and only on them; `set_attn_implementation("sdpa")` undoes this."""
    AttentionInterface.register(PACKED_ATTENTION, packed_sdpa)
    model.set_attn_implementation(PACKED_ATTENTION)  # type: ignore[operator]


# The parameters are those that transformers' AttentionInterface passes.
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

    A document begins where position_ids is 0. Raises ValueError for a mask, a cache or several rows, with which
    documents would attend to each other or to padding.
    """
    if attention_mask is not None or position_ids is None or len(query) != 1 or query.shape[2] != key.shape[2]:
        raise ValueError("packed_sdpa needs one row of complete documents: position_ids, no attention_mask, no cache.")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # not enable_gqa: on sm_75 it selects the slow math kernel (huggingface/transformers#48633)
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    starts = (position_ids[0] == 0).nonzero().flatten().tolist()
    sizes = [end - start for start, end in zip(starts, [*starts[1:], query.shape[2]], strict=True)]
    documents = zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)
    # The fused kernel's backward pass is slow on a CPU: 12.8 ms against 4.8 for 190 tokens, 9 heads of 64.
    fused = [] if query.device.type == "cpu" else [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    with sdpa_kernel([*fused, SDPBackend.MATH]):
        attended = [
            scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, scale=scaling)
            for q, k, v in documents
        ]
    return torch.cat(attended, 2).transpose(1, 2).contiguous(), None


class ChunkedHead(torch.nn.Module):
    """Wraps the head, and passes hidden states through where the loss applies the head itself."""

    def __init__(self, plain: torch.nn.Module) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = hidden if self.training else self.plain(hidden)
        return logits

    @property
    def weight(self) -> torch.Tensor:
        return self.plain.weight  # type: ignore[return-value]


def use_chunked_loss(model: PreTrainedModel | PeftModel) -> bool:
    """Patch a model with its adapter to compute the training loss in chunks, without full logits.

    In training mode its output then has hidden states in place of logits. Returns False, and leaves the model alone,
    if the model scales or caps its logits. Raises SaigaError if the head itself is trained.
    """
    base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[assignment]
    plain, loss_before = base.get_output_embeddings(), base.loss_function
    if any(parameter.requires_grad for parameter in plain.parameters()):
        raise SaigaError("The loss cannot be computed in chunks while lm_head is trained; leave out modules_to_save.")
    head = ChunkedHead(plain).train(base.training)
    before = _probe_loss(base)
    base.set_output_embeddings(head)
    base.loss_function = functools.partial(exact_loss, head=head)
    if abs(_probe_loss(base) - before) <= 1e-5 * abs(before):
        return True
    base.set_output_embeddings(plain)
    base.loss_function = loss_before
    return False


@contextmanager
def chunked_loss_in_eval(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Compute the loss in chunks in evaluation mode too, if `use_chunked_loss` has patched the model."""
    head = model.get_output_embeddings()
    was_training = head.training
    head.training = was_training or isinstance(head, ChunkedHead)  # of the wrapper alone, without the dropout in it
    try:
        yield
    finally:
        head.training = was_training


def exact_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
    *,
    head: ChunkedHead | None = None,
    **_: object,
) -> torch.Tensor:
    """transformers' ForCausalLMLoss, summed in float64; `logits` are hidden states if `head` passed them through."""
    if shift_labels is None:
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]
    targets = shift_labels.to(logits.device)
    trained = targets != IGNORE_INDEX
    targets = targets[trained]
    hidden = logits.flatten(0, 1) if bool(trained.all()) else logits[trained]
    if head is None:
        total = _loss_of_chunk(torch.nn.Identity(), hidden, targets)
    else:
        apply = head.plain if head.training else torch.nn.Identity()
        size = max(1, CHUNK_LOGITS // vocab_size)
        # The backward pass computes the logits of a chunk again: about 1 % more arithmetic for an 8B model.
        losses = [
            checkpoint(_loss_of_chunk, apply, part, target, use_reentrant=False, preserve_rng_state=False)
            for part, target in zip(hidden.split(size), targets.split(size), strict=True)
        ]
        total = torch.stack(losses).sum()
    return total / (len(targets) if num_items_in_batch is None else num_items_in_batch)


def _loss_of_chunk(head: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum in float64: a float32 sum over a few hundred tokens would depend on the order of the packs."""
    losses = torch.nn.functional.cross_entropy(head(hidden).float(), targets, reduction="none")
    return losses.sum(dtype=torch.float64)


def _probe_loss(base: PreTrainedModel) -> float:
    """The loss of a few tokens without dropout."""
    device, dtype, was_training = base.device, base.get_output_embeddings().weight.dtype, base.training
    ids = torch.arange(8, device=device)[None]
    base.eval()
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    with chunked_loss_in_eval(base), torch.no_grad(), autocast:
        loss = base(input_ids=ids, position_ids=ids, labels=ids, use_cache=False).loss.item()
    base.train(was_training)
    return float(loss)
