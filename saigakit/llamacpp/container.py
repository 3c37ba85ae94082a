"""Write the header of a GGUF file, estimate the file's size exactly, and read its table of tensors back."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from saigakit.errors import SaigaError
from saigakit.llamacpp import libggml, quantization

if TYPE_CHECKING:
    import gguf

    from saigakit.weights.tensors import Shape

_ALIGNMENT = 32  # GGUF's default: each tensor starts at a multiple of it


def data_bytes(shapes: Mapping[str, "Shape"], types: Mapping[str, str]) -> int:
    """Bytes of all tensors, padding included."""
    return sum(_padded(quantization.tensor_bytes(shape, types[name])) for name, shape in shapes.items())


def total_bytes(metadata_bytes: int, shapes: Mapping[str, "Shape"], types: Mapping[str, str]) -> int:
    """Bytes of the file; `metadata_bytes` is the size that `write_header` gives a file without tensors."""
    table = sum(8 + len(name.encode()) + 4 + 8 * len(shape) + 4 + 8 for name, shape in shapes.items())
    return _padded(metadata_bytes + table) + data_bytes(shapes, types)


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def write_header(writer: "gguf.GGUFWriter", shapes: Mapping[str, "Shape"], types: Mapping[str, str]) -> int:
    """Write metadata and the table of tensors; returns the offset where their bytes start."""
    import gguf
    import numpy as np

    for name, shape in shapes.items():
        size, number = quantization.tensor_bytes(shape, types[name]), gguf.GGMLQuantizationType[types[name]]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=number)
    writer.write_header_to_file()
    try:
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        stream = (writer.fout or [])[0]
        stream.flush()
        return _padded(stream.tell())
    finally:
        writer.close()


def tensor_offsets(shapes: Mapping[str, "Shape"], types: Mapping[str, str], start: int) -> dict[str, int]:
    """Where each tensor starts, the first one at `start`."""
    offsets = {}
    for name, shape in shapes.items():
        offsets[name] = start
        start += _padded(quantization.tensor_bytes(shape, types[name]))
    return offsets


def require_complete(file: Path, shapes: Mapping[str, "Shape"], types: Mapping[str, str], total: int) -> None:
    """Raises SaigaError if the size or the table of tensors, read back by ggml, differs from what was written."""
    expected = [
        (name, types[name], offset, quantization.tensor_bytes(shapes[name], types[name]))
        for name, offset in tensor_offsets(shapes, types, 0).items()
    ]
    found = _read_table(file)
    if found != expected or file.stat().st_size != total:
        raise SaigaError(
            f"{file} was not written correctly: {len(found)} tensors in {file.stat().st_size} bytes, expected "
            f"{len(expected)} in {total}. The disk may be failing; run again."
        )


def _read_table(file: Path) -> list[tuple[str, str, int, int]]:
    """Name, type, offset and bytes of each tensor. gguf's Python reader takes 5 s with a vocabulary of 50,000."""
    import gguf

    ggml = libggml.load()
    context = ggml.gguf_init_from_file(str(file).encode(), libggml.ReadParams(True, None))
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
