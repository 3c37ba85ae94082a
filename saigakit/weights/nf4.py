"""Rows of a matrix into what a training in nf4 computed with: quantised as load.base_model does, and dequantised."""

import logging
from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any

from saigakit.weights.tensors import Shape

if TYPE_CHECKING:
    import torch

    from saigakit.weights.tensors import Array

BLOCK = 64  # numbers with a scale of their own; also the rows of which any matrix has whole blocks
_NUMBERS = 1 << 20  # that are looked at together, about


def import_bitsandbytes() -> None:
    """Import it without its warning, on some CPUs, about a package of kernels that nobody needs."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes  # noqa: F401


def is_quantised(name: str, dimensions: int) -> bool:
    """Whether that training quantised the tensor: the linear layers of the blocks, not embeddings, head and norms."""
    return ".layers." in name and name.endswith(".weight") and dimensions == 2


def scales(read: "Callable[[slice], Array]", shape: Shape, number_format: str) -> "torch.Tensor":
    """One of each block, as they are after their own quantisation, which goes by the mean of the whole matrix.

    `read` gives rows of the matrix; `number_format` is that in which training held it.
    """
    import torch
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    count, columns = shape
    step = BLOCK * max(1, _NUMBERS // (BLOCK * columns))
    found = []
    for first in range(0, count, step):
        numbers = _held(read(slice(first, min(first + step, count))), number_format).view(-1)
        numbers = torch.nn.functional.pad(numbers, (0, -numbers.numel() % BLOCK))
        found.append(numbers.view(-1, BLOCK).abs().amax(1).float())
    largest = torch.cat(found)
    mean = largest.mean()
    packed, state = quantize_blockwise(largest - mean, blocksize=256)
    made: torch.Tensor = dequantize_blockwise(packed, state) + mean
    return made


def dequantised(rows: "Array", scales: "torch.Tensor", number_format: str) -> "Array":
    """Whole blocks, of which `scales` are, in float32. In `number_format` numbers are rounded before and after."""
    import torch
    from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type, quantize_4bit

    if len(scales) != -(-prod(rows.shape) // BLOCK):
        raise ValueError(f"{len(scales)} scales for {prod(rows.shape)} numbers")
    held = _held(rows, number_format)
    known: dict[str, Any] = {"blocksize": BLOCK, "quant_type": "nf4"}
    code = get_4bit_type("nf4", device="cpu")
    packed = quantize_4bit(held, **known)[0] if held.numel() % BLOCK else _quantised(held, code)
    state = QuantState(absmax=scales, shape=held.shape, code=code, dtype=held.dtype, **known)
    made: Array = dequantize_4bit(packed, state).to(torch.float32).numpy()
    return made


def _quantised(held: "torch.Tensor", code: "torch.Tensor") -> "torch.Tensor":
    """Whole blocks as quantize_4bit makes them. Measured: it takes 29 ns a number on one core, this takes 4."""
    import numpy as np
    import torch

    blocks = held.float().view(-1, BLOCK)
    numbers = (blocks * (1.0 / blocks.abs().amax(1, keepdim=True).clamp(min=1e-38))).view(-1).numpy()
    nearest, is_above = np.zeros(numbers.size, np.uint8), np.empty(numbers.size, bool)
    for middle in ((code[:-1] + code[1:]) / 2).numpy():  # by numpy, whose comparison is seven times as fast as torch's
        nearest += np.greater(numbers, middle, out=is_above).view(np.uint8)
    return torch.from_numpy(nearest[::2] << 4 | nearest[1::2])[:, None]


def _held(rows: "Array", number_format: str) -> "torch.Tensor":
    import torch

    return torch.from_numpy(rows).to(getattr(torch, number_format)).contiguous()
