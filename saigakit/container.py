"""Metadata and named tensors into a GGUF file: its size is known before it is written, and read back after."""

import ctypes
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from saigakit import quantization, workspace
from saigakit.errors import SaigaError

if TYPE_CHECKING:
    import gguf

    from saigakit.shards import Array, Shape

_ALIGNMENT = 32  # GGUF's default: each tensor begins at a multiple of it
_PROGRESS_S = 10.0


def tensor_bytes(shapes: Mapping[str, "Shape"], types: Mapping[str, str]) -> int:
    """Of all tensors, padding included."""
    return sum(_padded(quantization.size(shape, types[name])) for name, shape in shapes.items())


def total_bytes(metadata_bytes: int, shapes: Mapping[str, "Shape"], types: Mapping[str, str]) -> int:
    """Of the whole file; `metadata_bytes` is what `write` makes of no tensors."""
    table = sum(8 + len(name.encode()) + 4 + 8 * len(shape) + 4 + 8 for name, shape in shapes.items())
    return _padded(metadata_bytes + table) + tensor_bytes(shapes, types)


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def write(
    writer: "gguf.GGUFWriter",
    shapes: Mapping[str, "Shape"],
    types: Mapping[str, str],
    read: Callable[[str], "Array"],
) -> None:
    """Header and metadata, then one tensor after another: read, quantised, appended."""
    import gguf
    import numpy as np

    for name, shape in shapes.items():
        bytes_, number = quantization.size(shape, types[name]), gguf.GGMLQuantizationType[types[name]]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), bytes_, raw_dtype=number)
    writer.write_header_to_file()
    try:
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        progress = _Progress(len(shapes), tensor_bytes(shapes, types))
        for name, shape in shapes.items():
            tensor = read(name)
            writer.write_tensor_data(tensor if tensor.ndim == 1 else quantization.quantise(tensor, types[name]))
            progress.add(_padded(quantization.size(shape, types[name])))
        for stream in writer.fout or ():
            stream.flush()
            os.fsync(stream.fileno())
    finally:
        writer.close()


class _Progress:
    """A line now and then: Kaggle keeps every one."""

    def __init__(self, tensors: int, total: int) -> None:
        self.tensors, self.total = tensors, total
        self.done = self.written = 0
        self.start = self.said = time.monotonic()

    def add(self, written: int) -> None:
        self.done += 1
        self.written += written
        now = time.monotonic()
        if now - self.said < _PROGRESS_S:
            return
        self.said = now
        left = (now - self.start) * (self.total - self.written) / self.written
        print(
            f"{self.done} of {self.tensors} tensors, {self.written / workspace.GB:.2f} of "
            f"{self.total / workspace.GB:.2f} GB, about {left:.0f} s left",
            flush=True,
        )


class _ReadParams(ctypes.Structure):
    """gguf_init_params: read no data, make no tensors."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))


def require_whole(file: Path, shapes: Mapping[str, "Shape"], types: Mapping[str, str], total: int) -> None:
    """ggml reads the file's table back. Raises SaigaError where it is not what was to be written."""
    wanted, offset = [], 0
    for name, shape in shapes.items():
        size = quantization.size(shape, types[name])
        wanted.append((name, types[name], offset, size))
        offset += _padded(size)
    there = _table(file)
    if there != wanted or file.stat().st_size != total:
        raise SaigaError(
            f"{file} came out wrong: {len(there)} tensors in {file.stat().st_size} bytes, expected {len(wanted)} in "
            f"{total}. The disk may be failing; run again."
        )


def _table(file: Path) -> list[tuple[str, str, int, int]]:
    """Name, type, offset and bytes of each tensor; gguf's own reader in Python takes 5 s for 50,000 tokens."""
    import gguf

    ggml = quantization.library()
    context = ggml.gguf_init_from_file(str(file).encode(), _ReadParams(True, None))
    if not context:
        return []
    try:
        return [
            (
                ggml.gguf_get_tensor_name(context, index).decode(),
                gguf.GGMLQuantizationType(ggml.gguf_get_tensor_type(context, index)).name,
                ggml.gguf_get_tensor_offset(context, index),
                ggml.gguf_get_tensor_size(context, index),
            )
            for index in range(ggml.gguf_get_n_tensors(context))
        ]
    finally:
        ggml.gguf_free(context)
