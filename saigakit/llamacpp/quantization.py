"""float32 rows into ggml's quantised blocks, each tensor's type chosen by llama.cpp's rule for the quant type."""

import ctypes
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor
from functools import cache
from math import prod
from typing import TYPE_CHECKING

from saigakit.errors import SaigaError
from saigakit.weights.model_shape import ModelShape

if TYPE_CHECKING:
    import numpy as np

    Floats = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
    Bytes = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]

# Quant type of a file to the type that most of its matrices get; best first: llama.cpp's own measurements of divergence
# put IQ4_XS before Q4_0, which is larger.
QUANT_TYPES = {
    "F32": "F32",
    "BF16": "BF16",
    "F16": "F16",
    "Q8_0": "Q8_0",
    "Q6_K": "Q6_K",
    "Q5_K_M": "Q5_K",
    "Q4_K_M": "Q4_K",
    "Q4_K_S": "Q4_K",
    "IQ4_XS": "IQ4_XS",
    "Q4_0": "Q4_0",
    "Q3_K_M": "Q3_K",
    "Q2_K": "Q2_K",
}
_FALLBACK = {  # 256 to 32 in a block
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "IQ4_XS": "IQ4_NL",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
_EARLY_FFN_DOWN = {"Q4_0": "Q4_1", "IQ4_XS": "IQ4_XS"}  # of the first eighth, with an importance matrix
_SHARE = 1 << 18  # numbers that one of many cores quantises at a time


def require_known(quant_type: str) -> None:
    """Raises SaigaError that lists the quant types."""
    if quant_type not in QUANT_TYPES:
        raise SaigaError(f"quant_type={quant_type!r} is unknown; use one of {', '.join(QUANT_TYPES)}.")


def in_order(names: Iterable[str]) -> list[str]:
    """As llama.cpp goes through a file's tensors: those of no layer first, then layer by layer, each by name."""
    return sorted(names, key=lambda name: (_layer(name), name))


def _layer(name: str) -> int:
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else -1


def tensor_types(
    shapes: Mapping[str, tuple[int, ...]],
    quant_type: str,
    model: ModelShape,
    architecture: str,
    *,
    with_importance: bool = False,
) -> dict[str, str]:
    """ggml type of every tensor, by its GGUF name; vectors stay float32.

    `with_importance`: of a file that is quantised with an importance matrix.
    """
    types = {
        name: "F32" if len(shape) < 2 else _matrix_type(name, shape[-1], quant_type, model, architecture, shapes)
        for name, shape in shapes.items()
    }
    if with_importance and quant_type in _EARLY_FFN_DOWN:
        for name in types:
            if name.endswith(".ffn_down.weight") and _layer(name) < model.layers // 8:
                types[name] = _fitting(_EARLY_FFN_DOWN[quant_type], shapes[name][-1])
    return types


def _matrix_type(
    name: str, columns: int, quant_type: str, model: ModelShape, architecture: str, names: Iterable[str]
) -> str:
    usual = QUANT_TYPES[quant_type]
    if usual in ("F32", "F16", "BF16"):
        return usual
    if name == "output.weight" or (name == "token_embd.weight" and "output.weight" not in names):
        return _fitting(_output_type(usual, columns), columns)
    role = name.split(".")[-2]
    rule = {"attn_v": _attn_v_type, "ffn_down": _ffn_down_type, "attn_output": _attn_output_type}.get(role)
    chosen = usual if rule is None else rule(usual, quant_type, _layer(name), model)
    is_shared = architecture == "qwen2" or (architecture == "llama" and model.heads != model.kv_heads)
    is_70b = model.layers == 80 and is_shared
    if role == "attn_v" and is_70b and chosen in ("Q3_K", "Q4_K"):
        chosen = "Q5_K"  # eight heads share it, so more bits cost little
    return _fitting(chosen, columns)


def _output_type(usual: str, columns: int) -> str:
    """Of the output matrix, and of tied embeddings, which serve as one."""
    return "Q8_0" if usual == "Q8_0" or columns % _block(usual)[0] else "Q6_K"


def _more_bits(layer: int, layers: int) -> bool:
    """The first and the last eighth, and every third layer between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _attn_v_type(usual: str, quant_type: str, layer: int, model: ModelShape) -> str:
    is_shared = model.heads // model.kv_heads >= 4  # by so many heads: more bits cost little
    if quant_type == "Q2_K":
        return "Q4_K" if is_shared else "Q3_K"
    if quant_type == "IQ4_XS":
        return "Q5_K" if is_shared else usual
    if quant_type == "Q3_K_M":
        return "Q5_K" if layer < 2 else "Q4_K"
    if quant_type == "Q4_K_S":
        return "Q5_K" if layer < 4 else usual
    return "Q6_K" if quant_type in ("Q4_K_M", "Q5_K_M") and _more_bits(layer, model.layers) else usual


def _ffn_down_type(usual: str, quant_type: str, layer: int, model: ModelShape) -> str:
    if quant_type == "Q2_K":
        return "Q3_K"
    if quant_type == "Q3_K_M":
        return "Q5_K" if layer < model.layers // 16 else "Q4_K"
    if quant_type in ("Q4_K_S", "IQ4_XS"):
        return "Q5_K" if layer < model.layers // 8 else usual
    return "Q6_K" if quant_type in ("Q4_K_M", "Q5_K_M") and _more_bits(layer, model.layers) else usual


def _attn_output_type(usual: str, quant_type: str, layer: int, model: ModelShape) -> str:
    return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K"}.get(quant_type, usual)


def _fitting(chosen: str, columns: int) -> str:
    """A type of smaller blocks where a row is no multiple of the block; float16 where none fits."""
    if columns % _block(chosen)[0] == 0:
        return chosen
    smaller = _FALLBACK.get(chosen, chosen)
    return smaller if columns % _block(smaller)[0] == 0 else "F16"


@cache
def _block(ggml_type: str) -> tuple[int, int]:
    """Numbers and bytes of one block."""
    import gguf

    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[ggml_type]]


def size(shape: tuple[int, ...], ggml_type: str) -> int:
    """Bytes of a tensor."""
    numbers, bytes_ = _block(ggml_type)
    return prod(shape) // numbers * bytes_


@cache
def library() -> ctypes.CDLL:
    """libggml-base of the llama-cpp-python wheel, which has no names for these functions."""
    from llama_cpp import _ctypes_extensions, _ggml

    made: ctypes.CDLL = _ctypes_extensions.load_shared_library("ggml-base", _ggml.libggml_base_path)
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    number, kind, bytes_ = ctypes.c_int64, ctypes.c_int, ctypes.c_size_t
    for name, result, arguments in (
        ("ggml_quantize_chunk", bytes_, [kind, pointer, pointer, number, number, number, pointer]),
        ("ggml_validate_row_data", ctypes.c_bool, [kind, pointer, bytes_]),
        ("gguf_init_from_file", pointer, None),
        ("gguf_free", None, [pointer]),
        ("gguf_get_n_tensors", number, [pointer]),
        ("gguf_get_tensor_name", text, [pointer, number]),
        ("gguf_get_tensor_type", kind, [pointer, number]),
        ("gguf_get_tensor_offset", bytes_, [pointer, number]),
        ("gguf_get_tensor_size", bytes_, [pointer, number]),
    ):
        function = getattr(made, name)
        function.restype, function.argtypes = result, arguments
    return made


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quantise(
    matrix: "Floats", ggml_type: str, importance: "Floats | None" = None, pool: Executor | None = None
) -> "Bytes":
    """Rows of a matrix as rows of bytes, on one core or shared out in a pool; `importance` weighs the columns' errors.

    Raises SaigaError where a number overflows the type.
    """
    import gguf
    import numpy as np

    source = np.ascontiguousarray(matrix, dtype=np.float32)
    rows, columns = source.shape
    number, row_bytes = int(gguf.GGMLQuantizationType[ggml_type]), size((columns,), ggml_type)
    made = np.empty((rows, row_bytes), dtype=np.uint8)
    if importance is not None and importance.shape != (columns,):
        raise ValueError(f"importance of shape {importance.shape} for {columns} columns")
    weights = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
    place = None if weights is None else weights.ctypes.data
    ggml, read, write = library(), source.ctypes.data, made.ctypes.data
    step = rows if pool is None else max(1, _SHARE // columns)

    def share(first: int) -> bool:
        count = min(step, rows - first)
        # ggml finds the place in both buffers by the index of the first number; ctypes releases the GIL meanwhile.
        ggml.ggml_quantize_chunk(number, read, write, first * columns, count, columns, place)
        valid: bool = ggml.ggml_validate_row_data(number, write + first * row_bytes, count * row_bytes)
        return valid

    firsts = range(0, rows, step)
    if not all(map(share, firsts) if pool is None else pool.map(share, firsts)):
        raise SaigaError(f"A number is too large for {ggml_type}; use quant_type='BF16', of float32's range.")
    return made
