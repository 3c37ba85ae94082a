"""Run token ids through a GGUF model and return logits, one sequence after another."""

import ctypes
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from saigakit.core.lazy import llama_cpp, np
from saigakit.errors import SaigaError
from saigakit.weights.model_shape import ModelShape
from saigakit.weights.tensors import Array

OnTensor = Callable[[int, bool], bool]  # llama.cpp's cb_eval: the address of a node, whether it only asks
_ERROR = 4  # GGML_LOG_LEVEL_ERROR in ggml.h
_BATCH = 256  # tokens at a time: their logits take 128 MB for a vocabulary of 128,000


class Batch:
    """A llama_batch with room for `size` tokens, each of one sequence."""

    def __init__(self, size: int) -> None:
        self._api, self._batch = llama_cpp, llama_cpp.llama_batch_init(size, 0, 1)

    def __len__(self) -> int:
        return int(self._batch.n_tokens)

    def add(self, token: int, position: int, *, sequence: int = 0, has_logits: bool) -> None:
        """`has_logits`: the model computes logits at this token."""
        batch, row = self._batch, self._batch.n_tokens
        batch.token[row], batch.pos[row], batch.logits[row] = token, position, has_logits
        batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
        batch.n_tokens += 1

    def decode(self, context: Any) -> int:  # noqa: ANN401  # a ctypes pointer
        """Compute the added tokens and remove them; returns llama_decode's error code."""
        code: int = self._api.llama_decode(context, self._batch)
        self._batch.n_tokens = 0
        return code

    def close(self) -> None:
        self._api.llama_batch_free(self._batch)


class Forward:
    """A model with its context; see `open_model`."""

    def __init__(self, file: Path, model: Any, context: Any, n_ctx: int) -> None:  # noqa: ANN401  # ctypes pointers
        self.file, self.n_ctx = file, n_ctx
        self._api, self._context = llama_cpp, context
        self.vocabulary: int = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._batch = Batch(_BATCH)

    def logits(self, ids: Sequence[int], wanted: Sequence[bool]) -> Iterator[Array]:
        """Blocks of logits with one row per wanted position; each is valid until the next one."""
        if len(ids) > self.n_ctx or not all(0 <= token < self.vocabulary for token in ids):
            raise SaigaError(
                f"{self.file} cannot read a row of {len(ids)} tokens up to id {max(ids)}: its context holds "
                f"{self.n_ctx} tokens and it has a vocabulary of {self.vocabulary}. The ids belong to the tokenizer of "
                "another model, or the row is too long."
            )
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        for first in range(0, len(ids), _BATCH):
            positions = range(first, min(first + _BATCH, len(ids)))
            for position in positions:
                self._batch.add(ids[position], position, has_logits=bool(wanted[position]))
            if code := self._batch.decode(self._context):
                raise SaigaError(f"llama.cpp could not run {self.file} (llama_decode returned {code}).")
            if rows := sum(bool(wanted[position]) for position in positions):
                yield np.ctypeslib.as_array(self._api.llama_get_logits(self._context), (rows, self.vocabulary))

    def close(self) -> None:
        self._batch.close()
        self._api.llama_free(self._context)


def disable_amx(model_params: Any) -> None:  # noqa: ANN401  # a ctypes structure
    """Turn off repacking, and with it llama.cpp's AMX kernels, if it has them: see `install.llama_cmake_args`."""
    if b"AMX_INT8 = 1" in llama_cpp.llama_print_system_info():
        model_params.use_extra_bufts = False


@contextmanager
def collecting_errors() -> Iterator[list[str]]:
    """Collect the reasons that llama.cpp only logs; its callback is one for the whole process."""
    from llama_cpp import _logger

    reasons: list[str] = []

    def collect(level: int, text: bytes, _: object) -> None:
        if level == _ERROR:
            reasons.append(text.decode("utf-8", "replace").strip().rpartition("error loading model: ")[2])

    callback = llama_cpp.llama_log_callback(collect)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        yield reasons
    finally:
        llama_cpp.llama_log_set(_logger.llama_log_callback, ctypes.c_void_p(0))


@contextmanager
def load_weights(gguf_file: Path, *, n_gpu_layers: int = 0, check_tensors: bool = False) -> Iterator[Any]:
    """Yield llama.cpp's model, memory-mapped. Raises SaigaError with its reason if it cannot load the file."""
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # a thousand lines otherwise
    params = llama_cpp.llama_model_default_params()
    params.load_mode, params.n_gpu_layers = llama_cpp.LLAMA_LOAD_MODE_MMAP, n_gpu_layers
    params.check_tensors = check_tensors
    params.use_extra_bufts = False  # repacked weights would be a second copy in memory; turns AMX off too
    llama_cpp.llama_backend_init()
    with collecting_errors() as reasons:
        model = llama_cpp.llama_model_load_from_file(str(gguf_file).encode(), params)
    if not model:
        raise SaigaError(f"llama.cpp {llama_cpp.__version__} cannot load {gguf_file}: {'; '.join(reasons[:1])}.")
    try:
        yield model
    finally:
        llama_cpp.llama_model_free(model)


@contextmanager
def open_model(
    gguf_file: Path,
    *,
    n_ctx: int,
    n_gpu_layers: int = 0,
    on_tensor: OnTensor | None = None,
) -> Iterator[Forward]:
    """Raises SaigaError if llama.cpp cannot load the file. `on_tensor` is called for each node of the graph."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = n_ctx, _BATCH, _BATCH, 1
    params.n_threads = params.n_threads_batch = os.cpu_count() or 1
    if on_tensor is not None:
        callback = on_tensor
        params.cb_eval = llama_cpp.ggml_backend_sched_eval_callback(lambda node, asks, _: callback(node, asks))
    with load_weights(gguf_file, n_gpu_layers=n_gpu_layers) as model:
        context = llama_cpp.llama_init_from_model(model, params)
        if not context:
            raise SaigaError(f"There is not enough memory for a context of {n_ctx} tokens of {gguf_file}.")
        with closing(Forward(gguf_file, model, context, n_ctx)) as made:
            yield made


def read_shape(llm: "llama_cpp.Llama") -> ModelShape:
    architecture = llm.metadata["general.architecture"]

    def number(key: str, otherwise: int = 0) -> int:
        return int(llm.metadata.get(f"{architecture}.{key}", otherwise))

    hidden, heads = number("embedding_length"), number("attention.head_count")
    return ModelShape(
        hidden=hidden,
        layers=number("block_count"),
        heads=heads,
        kv_heads=number("attention.head_count_kv", heads),
        head_dim=number("attention.key_length", hidden // heads),
        intermediate=number("feed_forward_length"),
        vocabulary=llm.n_vocab(),
        tied=False,
    )
