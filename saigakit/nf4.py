"""A matrix into what a training in nf4 computed with: quantised as weights.load_base does it, and dequantised."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from saigakit.shards import Array


def is_quantised(name: str, dimensions: int) -> bool:
    """Whether that training quantised the tensor: the linear layers of the blocks, not embeddings, head and norms."""
    return ".layers." in name and name.endswith(".weight") and dimensions == 2


def dequantised(matrix: "Array", number_format: str) -> "torch.Tensor":
    """In `number_format`, in which training held the base: it decides the rounding before and after.

    On all cores, for 45 ns a number on one, whatever number of threads the caller's products run in.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    held, threads = torch.from_numpy(matrix).to(getattr(torch, number_format)).contiguous(), torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        packed, state = quantize_4bit(held, blocksize=64, compress_statistics=True, quant_type="nf4")
        made: torch.Tensor = dequantize_4bit(packed, state)
    finally:
        torch.set_num_threads(threads)
    return made
