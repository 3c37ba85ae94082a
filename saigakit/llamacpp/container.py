"""Metadata and a table of tensors into a GGUF file's head: its size is known before, and read back after."""

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from saigakit.errors import SaigaError
from saigakit.llamacpp import quantization

if TYPE_CHECKING:
    import gguf

    from saigakit.weights.tensors import Shape

_ALIGNMENT = 32  # GGUF's default: each tensor begins at a multiple of it


def tensor_bytes(shapes: Mapping[str, "Shape"], types: Mapping[str, str]) -> int:
    """Of all tensors, padding included."""
    return sum(_padded(quantization.size(shape, types[name])) for name, shape in shapes.items())


def total_bytes(metadata_bytes: int, shapes: Mapping[str, "Shape"], types: Mapping[str, str]) -> int:
    """Of the whole file; `metadata_bytes` is what `write_header` makes of no tensors."""
    table = sum(8 + len(name.encode()) + 4 + 8 * len(shape) + 4 + 8 for name, shape in shapes.items())
    return _padded(metadata_bytes + table) + tensor_bytes(shapes, types)


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def write_header(writer: "gguf.GGUFWriter", shapes: Mapping[str, "Shape"], types: Mapping[str, str]) -> int:
    """Metadata and the table of tensors; returns where their bytes begin."""
    import gguf
    import numpy as np

    for name, shape in shapes.items():
        bytes_, number = quantization.size(shape, types[name]), gguf.GGMLQuantizationType[types[name]]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), bytes_, raw_dtype=number)
    writer.write_header_to_file()
    try:
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        stream = (writer.fout or [])[0]
        stream.flush()
        return _padded(stream.tell())
    finally:
        writer.close()


def offsets(shapes: Mapping[str, "Shape"], types: Mapping[str, str], start: int) -> dict[str, int]:
    """Where each tensor begins; the first at `start`."""
    places = {}
    for name, shape in shapes.items():
        places[name] = start
        start += _padded(quantization.size(shape, types[name]))
    return places


class _ReadParams(ctypes.Structure):
    """gguf_init_params: read no data, make no tensors."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))


def require_whole(file: Path, shapes: Mapping[str, "Shape"], types: Mapping[str, str], total: int) -> None:
    """ggml reads the file's table back. Raises SaigaError where it is not what was to be written."""
    wanted = [
        (name, types[name], offset, quantization.size(shapes[name], types[name]))
        for name, offset in offsets(shapes, types, 0).items()
    ]
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
