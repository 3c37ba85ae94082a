"""The OpenBLAS in numpy's wheel by its C interface, for what numpy has no name for: adding in place, threads."""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saigakit.weights.tensors import Array

_ROW_MAJOR, _AS_IT_IS = 101, 111  # cblas.h


def add_product(left: "Array", right: "Array", into: "Array") -> None:
    """into += left @ right: one pass over `into`, which lies row after row in memory.

    Measured: half the time of a product and an addition, with the same bits.
    """
    import numpy as np

    (rows, inner), columns = left.shape, right.shape[1]
    if into.shape != (rows, columns) or right.shape[0] != inner or not into.flags.c_contiguous:
        raise ValueError(f"{left.shape} @ {right.shape} into {into.shape}, contiguous: {into.flags.c_contiguous}")
    if (gemm := _gemm()) is None:
        into += left @ right
        return
    left, right = np.ascontiguousarray(left, np.float32), np.ascontiguousarray(right, np.float32)
    sizes, factor = (rows, columns, inner), 1.0
    gemm(
        _ROW_MAJOR, _AS_IT_IS, _AS_IT_IS, *sizes, factor, left.ctypes.data, max(1, inner),
        right.ctypes.data, columns, factor, into.ctypes.data, columns,
    )  # fmt: skip


def set_threads(count: int) -> int:
    """How many threads numpy's products take from now on; returns how many they took before."""
    setter, getter = _function("openblas_set_num_threads"), _function("openblas_get_num_threads")
    if setter is None or getter is None:
        return count
    before = int(getter[0]())
    setter[0](count)
    return before


@cache
def _gemm() -> Callable[..., None] | None:
    if (found := _function("cblas_sgemm")) is None:
        return None
    gemm, size = found
    place = ctypes.c_void_p
    gemm.argtypes = [ctypes.c_int] * 3 + [size] * 3 + [ctypes.c_float, place, size, place, size]
    gemm.argtypes += [ctypes.c_float, place, size]
    gemm.restype = None
    multiply: Callable[..., None] = gemm
    return multiply


@cache
def _function(name: str) -> tuple[Any, type] | None:
    """And the type of its sizes. None where numpy was built with another BLAS."""
    import numpy as np

    for file in Path(np.__file__).parents[1].glob("numpy.libs/*openblas*"):
        library = ctypes.CDLL(str(file))
        for prefix in ("scipy_", ""):
            for suffix, size in (("64_", ctypes.c_int64), ("", ctypes.c_int)):
                if (found := getattr(library, f"{prefix}{name}{suffix}", None)) is not None:
                    return found, size
    return None
