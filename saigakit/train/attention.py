"""Packed documents through attention one by one: causal inside each, blind to the others, and no mask tensor."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

NAME = "packed_sdpa"


def use(model: "torch.nn.Module") -> None:
    """Sets a transformers model to it, for training on packs alone; `set_attn_implementation("sdpa")` undoes it."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_sdpa)
    model.set_attn_implementation(NAME)  # type: ignore[operator]


def packed_sdpa(
    module: "torch.nn.Module",
    query: "torch.Tensor",
    key: "torch.Tensor",
    value: "torch.Tensor",
    attention_mask: "torch.Tensor | None",
    *,
    position_ids: "torch.Tensor | None" = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: object,
) -> "tuple[torch.Tensor, None]":
    """query (1, heads, tokens, width), key and value (1, kv_heads, tokens, width) -> (1, tokens, heads, width).

    A document begins where position_ids is 0. Raises ValueError for a mask, a cache or a batch of more than one
    row: there the documents would see each other, or the padding.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

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
