"""Compute an importance matrix from a GGUF file and token ids by observing llama.cpp's graph."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from saigakit.core.display import Every
from saigakit.errors import SaigaError
from saigakit.llamacpp import forward, libggml
from saigakit.llamacpp.imatrix import Importance, Squares, sample_rows

if TYPE_CHECKING:
    import numpy as np

    Sums = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def compute_importance(
    gguf_file: str | Path,
    id_lists: Sequence[Sequence[int]],
    *,
    dataset: str,
    max_tokens: int = 50_000,
    n_threads: int | None = None,
    n_gpu_layers: int = 0,
) -> Importance:
    """Measure rows evenly spread over `id_lists`, about `max_tokens` in total; `dataset` names them in the file.

    As in llama.cpp's own tool, the squares of each weight's inputs are summed over the tokens; but every row starts a
    new sequence, as in training. A float16 or Q8_0 GGUF gives the best matrix.
    """
    filled = [ids for ids in id_lists if len(ids)]
    if not filled:
        raise SaigaError(f"{dataset} has no tokens, so no importance matrix can be computed from it.")
    rows = sample_rows(filled, max_tokens)
    observer, is_due, length = _Observer(), Every(), max(map(len, rows))
    with forward.open_model(
        Path(gguf_file), n_ctx=length, n_threads=n_threads, n_gpu_layers=n_gpu_layers, on_tensor=observer.observe
    ) as model:
        for done, ids in enumerate(rows, start=1):
            # Logits of every position: otherwise the last layer is computed only for the last token.
            for _ in model.logits(ids, [True] * len(ids)):
                observer.require_no_error()
            if is_due():
                print(f"Importance matrix: {done} of {len(rows)} rows read", flush=True)
    squares = {name: Squares(sums.astype("float32"), float(count)) for name, (sums, count) in observer.found.items()}
    return Importance(squares, (dataset,), len(rows), length)


def _require_layout() -> None:
    """Raises SaigaError if `libggml.Tensor` does not find the sources of a product."""
    import llama_cpp

    ggml = libggml.load()
    context = ggml.ggml_init(libggml.ContextParams(1 << 16, None, True))
    try:
        weight, activation = (ggml.ggml_new_tensor_2d(context, libggml.F32, 32, rows) for rows in (3, 5))
        product = ggml.ggml_mul_mat(context, weight, activation)
        found = libggml.Tensor.from_address(product)
        if (*found.ne[:2], *found.src[:2]) != (3, 5, weight, activation):
            raise SaigaError(
                f"llama-cpp-python {llama_cpp.__version__} has an unknown tensor layout, which computing an importance "
                "matrix depends on. Install 0.3.36, or give a file as `importance`."
            )
    finally:
        ggml.ggml_free(context)


class _Observer:
    """Sums of squares and token counts by weight."""

    def __init__(self) -> None:
        _require_layout()
        self.found: dict[str, tuple[Sums, int]] = {}
        self._ggml = libggml.load()
        self._error: Exception | None = None

    def observe(self, node: int, asks: bool) -> bool:
        """llama.cpp's cb_eval: asks whether a node is wanted, calls again with its result; False then stops it."""
        try:
            if self._ggml.ggml_op_desc(node) != b"MUL_MAT":
                return not asks
            weight, activation = libggml.Tensor.from_address(node).src[:2]
            # The scheduler decorates names that it copies between devices: CUDA0#blk.0.attn_k.weight#0.
            name = self._ggml.ggml_get_name(weight).decode().split("#")[:2][-1]
            is_wanted = name.startswith("blk.") and name.endswith(".weight")
            if is_wanted and not asks:
                self._add(name, activation)
            return is_wanted or not asks
        except Exception as error:  # ctypes would print it and continue
            self._error = error
            return False

    def _add(self, name: str, activation: int) -> None:
        import numpy as np

        rows, numbers = self._ggml.ggml_nrows(activation), self._ggml.ggml_nelements(activation)
        is_float32 = libggml.Tensor.from_address(activation).type == libggml.F32
        if not is_float32 or not self._ggml.ggml_is_contiguous(activation):
            raise SaigaError(f"The inputs of {name} are not plain float32 on this device; give `importance` as a file.")
        inputs = np.empty((rows, numbers // rows), dtype=np.float32)
        self._ggml.ggml_backend_tensor_get(activation, inputs.ctypes.data, 0, inputs.nbytes)
        sums = np.square(inputs).sum(axis=0, dtype=np.float64)
        if not np.isfinite(sums).all():
            raise SaigaError(f"The inputs of {name} are not finite: the model is damaged or its training diverged.")
        before, count = self.found.get(name, (0.0, 0))
        self.found[name] = (before + sums, count + rows)

    def require_no_error(self) -> None:
        if self._error is not None:
            raise self._error
