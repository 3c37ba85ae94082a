"""Load libggml and declare its functions that llama-cpp-python does not expose."""

import ctypes
from functools import cache

F32 = 0  # ggml_type
_POINTER, _TEXT, _BOOL, _INT, _INT64 = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_bool, ctypes.c_int, ctypes.c_int64
_SIZE = ctypes.c_size_t


class Tensor(ctypes.Structure):
    """ggml_tensor up to a node's sources, the only field that ggml has no function for."""

    _fields_ = (
        ("type", _INT),
        ("buffer", _POINTER),
        ("ne", _INT64 * 4),
        ("nb", _SIZE * 4),
        ("op", _INT),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", _POINTER * 10),
    )


class ContextParams(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = (("mem_size", _SIZE), ("mem_buffer", _POINTER), ("no_alloc", _BOOL))


_FUNCTIONS: dict[str, tuple[type | None, list[type]]] = {
    "ggml_quantize_chunk": (_SIZE, [_INT, _POINTER, _POINTER, _INT64, _INT64, _INT64, _POINTER]),
    "ggml_validate_row_data": (_BOOL, [_INT, _POINTER, _SIZE]),
    "ggml_op_desc": (_TEXT, [_POINTER]),
    "ggml_get_name": (_TEXT, [_POINTER]),
    "ggml_nrows": (_INT64, [_POINTER]),
    "ggml_is_contiguous": (_BOOL, [_POINTER]),
    "ggml_backend_tensor_get": (None, [_POINTER, _POINTER, _SIZE, _SIZE]),
    "ggml_init": (_POINTER, [ContextParams]),
    "ggml_free": (None, [_POINTER]),
    "ggml_new_tensor_2d": (_POINTER, [_POINTER, _INT, _INT64, _INT64]),
    "ggml_mul_mat": (_POINTER, [_POINTER, _POINTER, _POINTER]),
}


@cache
def load() -> ctypes.CDLL:
    """libggml-base of the llama-cpp-python wheel."""
    from llama_cpp import _ctypes_extensions, _ggml

    library: ctypes.CDLL = _ctypes_extensions.load_shared_library("ggml-base", _ggml.libggml_base_path)
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
