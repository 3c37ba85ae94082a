"""Quantise float32 rows to ggml blocks, with the tensor types that llama.cpp chooses for each quant type."""

import os
import re
from collections.abc import Iterable, Mapping
from functools import cache
from math import prod

from saigakit.core.lazy import gguf, np
from saigakit.errors import SaigaError, suggestion
from saigakit.llamacpp import libggml
from saigakit.weights.model_shape import ModelShape
from saigakit.weights.tensors import Array, Bytes

# The type of most matrices by the quant type of the file, best first: in llama.cpp's own measurements IQ4_XS diverges
# less than Q4_0, which is larger.
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
_FALLBACK = {  # from blocks of 256 to blocks of 32
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "IQ4_XS": "IQ4_NL",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
_EARLY_FFN_DOWN = {"Q4_0": "Q4_1", "IQ4_XS": "IQ4_XS"}  # in the first eighth of the layers, with an importance matrix


def require_known(quant_type: str) -> None:
    """Raises SaigaError for an unknown quant type."""
    if quant_type not in QUANT_TYPES:
        meant = suggestion(quant_type.upper(), QUANT_TYPES)
        raise SaigaError(f"quant_type={quant_type!r} is unknown.{meant} Use one of {', '.join(QUANT_TYPES)}.")


def sort_names(names: Iterable[str]) -> list[str]:
    """In llama.cpp's order: tensors outside of layers first, then layer by layer, each group by name."""
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
    """ggml type by GGUF name; vectors stay float32. `with_importance`: the file is quantised with a matrix."""
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
        # For the output matrix, and for tied embeddings, which are used as one.
        return _fitting("Q8_0" if usual == "Q8_0" or columns % _block(usual)[0] else "Q6_K", columns)
    role = name.split(".")[-2]
    chosen = _role_type(role, quant_type, _layer(name), model)
    is_shared = architecture == "qwen2" or (architecture == "llama" and model.heads != model.kv_heads)
    if role == "attn_v" and model.layers == 80 and is_shared and chosen in ("Q3_K", "Q4_K"):
        chosen = "Q5_K"  # of a 70B model: shared by eight heads, so more bits cost little
    return _fitting(chosen, columns)


def _more_bits(layer: int, layers: int) -> bool:
    """Whether the layer is in the first or last eighth, or every third one in between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _role_type(role: str, quant_type: str, layer: int, model: ModelShape) -> str:
    is_shared = model.heads // model.kv_heads >= 4  # so more bits for attn_v cost little
    match role, quant_type:
        case "attn_v" | "ffn_down", "Q4_K_M" | "Q5_K_M" if _more_bits(layer, model.layers):
            return "Q6_K"
        case "attn_v", "Q2_K":
            return "Q4_K" if is_shared else "Q3_K"
        case "attn_v", "Q3_K_M":
            return "Q5_K" if layer < 2 else "Q4_K"
        case ("attn_v", "IQ4_XS") if is_shared:
            return "Q5_K"
        case ("attn_v", "Q4_K_S") if layer < 4:
            return "Q5_K"
        case "ffn_down", "Q3_K_M":
            return "Q5_K" if layer < model.layers // 16 else "Q4_K"
        case "ffn_down", "Q4_K_S" | "IQ4_XS" if layer < model.layers // 8:
            return "Q5_K"
        case "ffn_down" | "attn_output", "Q2_K":
            return "Q3_K"
        case "attn_output", "Q3_K_M":
            return "Q4_K"
    return QUANT_TYPES[quant_type]


def _fitting(chosen: str, columns: int) -> str:
    """`chosen`, or a type with smaller blocks if a row is not a multiple of its block; float16 if none fits."""
    if columns % _block(chosen)[0] == 0:
        return chosen
    smaller = _FALLBACK.get(chosen, chosen)
    return smaller if columns % _block(smaller)[0] == 0 else "F16"


@cache
def _block(ggml_type: str) -> tuple[int, int]:
    """Numbers and bytes per block."""
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[ggml_type]]


def tensor_bytes(shape: tuple[int, ...], ggml_type: str) -> int:
    numbers, size = _block(ggml_type)
    return prod(shape) // numbers * size


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quantise(matrix: Array, ggml_type: str, importance: "Array | None" = None) -> Bytes:
    """Quantise a matrix on one core, without the GIL. Raises SaigaError if a number overflows the type."""
    source = np.ascontiguousarray(matrix, dtype=np.float32)
    rows, columns = source.shape
    number = int(gguf.GGMLQuantizationType[ggml_type])
    quantised = np.empty((rows, tensor_bytes((columns,), ggml_type)), dtype=np.uint8)
    if importance is not None and importance.shape != (columns,):
        raise ValueError(f"importance of shape {importance.shape} for {columns} columns")
    weights = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)  # of column errors
    weights_address = None if weights is None else weights.ctypes.data
    ggml, address = libggml.load(), quantised.ctypes.data
    ggml.ggml_quantize_chunk(number, source.ctypes.data, address, 0, rows, columns, weights_address)
    if not ggml.ggml_validate_row_data(number, address, quantised.nbytes):
        raise SaigaError(f"A number is too large for {ggml_type}; use quant_type='BF16', with the range of float32.")
    return quantised
