"""A matrix into what a training in nf4 computed with: quantised as weights.load_base does it, and dequantised."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from saigakit.shards import Array


def is_quantised(name: str, dimensions: int) -> bool:
    """Whether that training quantised the tensor: the linear layers of the blocks, not embeddings, head and norms."""
    return ".layers." in name and name.endswith(".weight") and dimensions == 2


def dequantised(matrix: "Array", number_format: str) -> "torch.Tensor":
    """In `number_format`, in which training held the base: it decides the rounding before and after."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    held = torch.from_numpy(matrix).to(getattr(torch, number_format)).contiguous()
    packed, state = quantize_4bit(held, blocksize=64, compress_statistics=True, quant_type="nf4")
    made: torch.Tensor = dequantize_4bit(packed, state)
    return made
