"""A GGUF file and token ids into an importance matrix: llama.cpp's graph is watched while it reads the ids."""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from saigakit.core.display import Every
from saigakit.errors import SaigaError
from saigakit.llamacpp import forward, quantization
from saigakit.llamacpp.imatrix import Importance, Squares, sampled

if TYPE_CHECKING:
    import numpy as np

    Sums = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

_F32 = 0  # ggml's number of the type


def measured(
    gguf_file: str | Path,
    id_lists: Sequence[Sequence[int]],
    *,
    dataset: str,
    max_tokens: int = 50_000,
    n_threads: int | None = None,
    n_gpu_layers: int = 0,
) -> Importance:
    """Of rows evenly spread over `id_lists`, about `max_tokens` together; `dataset` names them in the file.

    The numbers are those of llama.cpp's own tool: for each weight of a layer, squares of what it is multiplied with,
    summed over the tokens. Every row is read from its beginning, as in training. Best of a float16 or Q8_0 GGUF.
    """
    filled = [ids for ids in id_lists if len(ids)]
    if not filled:
        raise SaigaError(f"{dataset} has no tokens, so no importance matrix can be made of it.")
    rows = sampled(filled, max_tokens)
    collected, is_due, length = _Collected(), Every(), max(map(len, rows))
    with forward.opened(
        Path(gguf_file), n_ctx=length, n_threads=n_threads, n_gpu_layers=n_gpu_layers, on_tensor=collected.see
    ) as model:
        for done, ids in enumerate(rows, start=1):
            # Logits of every place: otherwise the last layer runs for the last token alone.
            for _ in model.logits(ids, [True] * len(ids)):
                collected.require_no_error()
            if is_due():
                print(f"Importance matrix: {done} of {len(rows)} rows read", flush=True)
    squares = {name: Squares(sums.astype("float32"), float(count)) for name, (sums, count) in collected.found.items()}
    return Importance(squares, (dataset,), len(rows), length)


class _Tensor(ctypes.Structure):
    """The beginning of ggml_tensor, up to the one thing that ggml has no function for: a node's sources."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
    )


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


@cache
def _ggml() -> ctypes.CDLL:
    made, pointer = quantization.library(), ctypes.c_void_p
    for name, result, arguments in (
        ("ggml_op_desc", ctypes.c_char_p, [pointer]),
        ("ggml_get_name", ctypes.c_char_p, [pointer]),
        ("ggml_nelements", ctypes.c_int64, [pointer]),
        ("ggml_nrows", ctypes.c_int64, [pointer]),
        ("ggml_is_contiguous", ctypes.c_bool, [pointer]),
        ("ggml_backend_tensor_get", None, [pointer, pointer, ctypes.c_size_t, ctypes.c_size_t]),
        ("ggml_init", pointer, [_InitParams]),
        ("ggml_free", None, [pointer]),
        ("ggml_new_tensor_2d", pointer, [pointer, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]),
        ("ggml_mul_mat", pointer, [pointer, pointer, pointer]),
    ):
        function = getattr(made, name)
        function.restype, function.argtypes = result, arguments
    _require_layout(made)
    return made


def _require_layout(ggml: ctypes.CDLL) -> None:
    """A product is made whose sources are known. Raises SaigaError where `_Tensor` does not find them."""
    import llama_cpp

    context = ggml.ggml_init(_InitParams(1 << 16, None, True))
    try:
        weight, activation = (ggml.ggml_new_tensor_2d(context, _F32, 32, rows) for rows in (3, 5))
        product = ggml.ggml_mul_mat(context, weight, activation)
        found = _Tensor.from_address(product)
        if (*found.ne[:2], *found.src[:2]) != (3, 5, weight, activation):
            raise SaigaError(
                f"llama-cpp-python {llama_cpp.__version__} lays its tensors out otherwise than saigakit knows, so no "
                "importance matrix can be made. Install 0.3.36, or give a file as `importance`."
            )
    finally:
        ggml.ggml_free(context)


class _Collected:
    """Sums of squares and numbers of tokens by weight; `see` is llama.cpp's cb_eval."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[Sums, int]] = {}
        self._ggml = _ggml()
        self._error: Exception | None = None

    def see(self, node: int, asks: bool) -> bool:
        """Asked whether the node is wanted, and again when it has been computed; False then ends the computation."""
        try:
            if self._ggml.ggml_op_desc(node) != b"MUL_MAT":
                return not asks
            weight, activation = _Tensor.from_address(node).src[:2]
            # Names are decorated where the scheduler copies between devices: CUDA0#blk.0.attn_k.weight#0.
            name = self._ggml.ggml_get_name(weight).decode().split("#")[:2][-1]
            is_wanted = name.startswith("blk.") and name.endswith(".weight")
            if is_wanted and not asks:
                self._add(name, activation)
            return is_wanted or not asks
        except Exception as error:  # ctypes would print it and go on
            self._error = error
            return False

    def _add(self, name: str, activation: int) -> None:
        import numpy as np

        rows, numbers = self._ggml.ggml_nrows(activation), self._ggml.ggml_nelements(activation)
        if _Tensor.from_address(activation).type != _F32 or not self._ggml.ggml_is_contiguous(activation):
            raise SaigaError(f"What {name} is multiplied with is not in plain float32 here; give importance as a file.")
        read = np.empty((rows, numbers // rows), dtype=np.float32)
        self._ggml.ggml_backend_tensor_get(activation, read.ctypes.data, 0, read.nbytes)
        sums = np.square(read).sum(axis=0, dtype=np.float64)
        if not np.isfinite(sums).all():
            raise SaigaError(f"What {name} is multiplied with is not finite: the model is damaged or diverged.")
        before, count = self.found.get(name, (0.0, 0))
        self.found[name] = (before + sums, count + rows)

    def require_no_error(self) -> None:
        if self._error is not None:
            raise self._error
