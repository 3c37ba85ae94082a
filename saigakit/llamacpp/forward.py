"""A GGUF file and token ids into logits: each sequence from its beginning, one after another."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saigakit.errors import SaigaError

if TYPE_CHECKING:
    import numpy as np

    Logits = np.ndarray[tuple[int, ...], np.dtype[np.float32]]

OnTensor = Callable[[int, bool], bool]  # llama.cpp's cb_eval: a node's address, whether it only asks
_BATCH = 256  # tokens at once: their logits take 128 MB for a vocabulary of 128,000


class Forward:
    """A model and a context; made by `opened`."""

    def __init__(self, file: Path, model: Any, context: Any, n_ctx: int) -> None:  # noqa: ANN401  # ctypes pointers
        import llama_cpp

        self.file, self.n_ctx = file, n_ctx
        self._api, self._context = llama_cpp, context
        self.vocabulary: int = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._batch = llama_cpp.llama_batch_init(_BATCH, 0, 1)

    def logits(self, ids: Sequence[int], wanted: Sequence[bool]) -> Iterator["Logits"]:
        """Blocks of rows of the vocabulary's length, one row for each wanted place; valid until the next block."""
        import numpy as np

        if len(ids) > self.n_ctx or not all(0 <= token < self.vocabulary for token in ids):
            raise SaigaError(
                f"{self.file} cannot read a row of {len(ids)} tokens up to id {max(ids)}: it has room for {self.n_ctx} "
                f"and a vocabulary of {self.vocabulary}. The ids are of another model's tokenizer, or the row is long."
            )
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        for first in range(0, len(ids), _BATCH):
            rows = self._fill(ids, wanted, first)
            if code := self._api.llama_decode(self._context, self._batch):
                raise SaigaError(f"llama.cpp could not run {self.file} (llama_decode returned {code}).")
            if rows:
                yield np.ctypeslib.as_array(self._api.llama_get_logits(self._context), (rows, self.vocabulary))

    def _fill(self, ids: Sequence[int], wanted: Sequence[bool], first: int) -> int:
        batch = self._batch
        batch.n_tokens = min(_BATCH, len(ids) - first)
        for row in range(batch.n_tokens):
            place = first + row
            batch.token[row], batch.pos[row], batch.logits[row] = ids[place], place, bool(wanted[place])
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, 0
        return sum(map(bool, wanted[first : first + batch.n_tokens]))

    def close(self) -> None:
        self._api.llama_batch_free(self._batch)
        self._api.llama_free(self._context)


def leave_out_amx(model_params: Any) -> None:  # noqa: ANN401  # a ctypes structure
    """Turn off llama.cpp's AMX kernels if it was built with them: see `install.llama_cmake_args`.

    The setting takes all repacked weights with them.
    """
    import llama_cpp

    if b"AMX_INT8 = 1" in llama_cpp.llama_print_system_info():
        model_params.use_extra_bufts = False


@contextmanager
def opened(
    gguf_file: Path,
    *,
    n_ctx: int,
    n_threads: int | None = None,
    n_gpu_layers: int = 0,
    on_tensor: OnTensor | None = None,
) -> Iterator[Forward]:
    """Raises SaigaError for a file that llama.cpp cannot load. `on_tensor` is called for each node of the graph."""
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # a thousand lines otherwise
    settings = llama_cpp.llama_model_default_params()
    settings.n_gpu_layers = n_gpu_layers
    settings.use_extra_bufts = False  # repacked weights would be a second copy in memory; AMX is off with them
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = n_ctx, _BATCH, _BATCH, 1
    params.n_threads = params.n_threads_batch = n_threads or os.cpu_count() or 1
    if on_tensor is not None:
        asked = on_tensor
        params.cb_eval = llama_cpp.ggml_backend_sched_eval_callback(lambda node, ask, _: asked(node, ask))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(gguf_file).encode(), settings) if gguf_file.is_file() else None
    if not model:
        raise SaigaError(f"{gguf_file} is missing, damaged, or of an architecture that llama.cpp does not know.")
    try:
        context = llama_cpp.llama_init_from_model(model, params)
        if not context:
            raise SaigaError(f"{n_ctx} tokens of context for {gguf_file} do not fit into the memory.")
        with closing(Forward(gguf_file, model, context, n_ctx)) as made:
            yield made
    finally:
        llama_cpp.llama_model_free(model)
