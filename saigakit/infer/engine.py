"""Load a GGUF file and answer with it: streamed to a reader, or greedily for many prompts at once."""

import codecs
import importlib
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

from saigakit.core import launch, workspace
from saigakit.core.lazy import llama_cpp, np
from saigakit.errors import SaigaError
from saigakit.llamacpp import forward
from saigakit.prompt import encoding
from saigakit.prompt.backends import token_bytes
from saigakit.prompt.sandbox import BROKEN
from saigakit.prompt.template import Message, broken
from saigakit.registry import Sampling
from saigakit.weights.generate import BATCH_TOKENS, Generated, OnProgress, cut_at_stop
from saigakit.weights.memory import CacheType

_CACHE_TYPES: dict[CacheType, int] = {"f16": 1, "q8_0": 8}  # ggml_type
MAX_SEQUENCES = 16  # measured on one core: 171, 199 and 214 tokens/s with 8, 16 and 32


def load(
    gguf_file: str | Path,
    *,
    n_ctx: int = 4096,
    n_threads: int | None = None,
    cache_type: CacheType = "f16",
) -> "llama_cpp.Llama":
    """Load the model, onto the GPU if it fits; close it with `llm.close()`.

    `cache_type="q8_0"` halves the memory of the context. Raises SaigaError for a missing or damaged file.
    """
    importlib.import_module("llama_cpp")  # if it is not installed, this says so before the child below does
    file = Path(gguf_file)
    if file.is_dir() and (found := sorted(file.rglob("*.gguf"))):
        raise SaigaError(f"{file} is a directory. Did you mean {found[0]}?")
    if not file.is_file():
        problem = "is a directory without a .gguf file" if file.is_dir() else "does not exist"
        raise SaigaError(f"{file} {problem}. Give a .gguf file, or run 03_merge_gguf first.")
    with file.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise SaigaError(f"{file} is not a GGUF file: it begins with {magic!r}.")
    _require_harmless(file, file.stat().st_mtime_ns)
    threads = n_threads or os.cpu_count() or 1

    class Llama(llama_cpp.Llama):
        """Change settings that the constructor of llama_cpp.Llama does not take."""

        def __setattr__(self, name: str, value: object) -> None:
            if name == "model_params":
                forward.disable_amx(value)
            if name == "_model":  # beyond its training length a model answers with noise, and llama.cpp warns
                self.context_params.n_ctx = min(self.context_params.n_ctx, value.n_ctx_train())  # type: ignore[attr-defined]
            super().__setattr__(name, value)

    reasons: list[str] = []
    try:
        with forward.collecting_errors() as reasons:
            return Llama(
                str(file),
                n_ctx=n_ctx,
                n_gpu_layers=_gpu_layers(file),
                n_threads=threads,
                n_threads_batch=threads,
                flash_attn=True,  # needed by a q8_0 cache
                type_k=_CACHE_TYPES[cache_type],
                type_v=_CACHE_TYPES[cache_type],
                verbose=False,
            )
    except BROKEN as error:  # llama-cpp-python compiles the template
        raise broken(error, file) from None
    except ValueError as error:
        remedy = "" if cache_type == "f16" else " A q8_0 cache needs a head_dim of 32, 64, …; try cache_type='f16'."
        raise SaigaError(
            f"llama.cpp {llama_cpp.__version__} cannot load {file} ({next(iter(reasons), error)}): it is cut short or "
            f"damaged, its architecture is too new for this version, or {n_ctx} tokens of context do not fit into "
            f"memory.{remedy}"
        ) from None


@cache
def _require_harmless(file: Path, _changed: int) -> None:
    """Let a child read the file first, because llama.cpp ends its process on some damage; not on Windows."""
    if os.name == "nt":
        return
    try:
        quiet = {"GGML_NO_BACKTRACE": "1"}  # else it starts a debugger, whose output would bury the reason
        launch.run([sys.executable, "-m", "saigakit.infer", str(file)], environment=quiet)
    except SaigaError as error:
        if not re.search(r"killed by signal (?!9\b|24\b)", str(error)):  # 9, 24: without memory, and without end
            raise
        raise SaigaError(f"{file} is damaged: it crashes llama.cpp. Download or export it again.\n{error}") from None


def _gpu_layers(file: Path) -> int:
    free = _gpu_memory() if llama_cpp.llama_supports_gpu_offload() else 0
    return -1 if free > 1.3 * file.stat().st_size else 0  # the rest is for the context and its buffers


def _gpu_memory() -> int:
    """Free bytes; on a Mac the GPU may take about two thirds of the machine's memory."""
    if sys.platform == "darwin":
        return workspace.available_memory() * 2 // 3
    return sum(gpu.free for gpu in workspace.gpus())


def stream(
    llm: "llama_cpp.Llama",
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    sampling: Sampling | None = None,
    max_new_tokens: int | None = None,
) -> Iterator[str]:
    """Yield the answer in whole characters. Raises SaigaError if the conversation fills the context."""
    tokenizer = encoding.load_gguf_tokenizer(llm)
    prompt = encoding.encode(messages, tokenizer, tools=tools, add_generation_prompt=True)["input_ids"]
    room = llm.n_ctx() - len(prompt)
    if room < 1:
        raise SaigaError(
            f"The conversation has {len(prompt)} tokens, but the context holds {llm.n_ctx()}. Load the model with a "
            "larger n_ctx or start a new conversation."
        )
    stop_ids = encoding.end_of_turn_ids(tokenizer) | {llm.token_eos()}
    sampling = sampling or Sampling.from_gguf(llm.metadata)
    tokens = llm.generate(
        prompt,
        temp=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=0.0,
        repeat_penalty=sampling.repeat_penalty,
    )
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for _, token in zip(range(min(room, max_new_tokens or room)), tokens, strict=False):
        if token in stop_ids:
            break
        if text := decoder.decode(token_bytes(llm, token)):
            yield text
    if rest := decoder.decode(b"", final=True):
        yield rest


def greedy(
    llm: "llama_cpp.Llama",
    prompts: Sequence[list[int]],
    *,
    stop_ids: frozenset[int],
    max_new_tokens: int,
    on_progress: OnProgress,
) -> Generated:
    """Take the most likely token each time, for several sequences at once; the common prefix is computed once."""
    head = _common_prefix(prompts)
    length = -(-(max(map(len, prompts)) + max_new_tokens) // 256) * 256  # llama.cpp allocates cells in steps of 256
    slots = max(1, min(MAX_SEQUENCES, _tokens_in_memory(llm) // length - 1, len(prompts)))
    rows: list[list[int]] = [[] for _ in prompts]
    waiting = deque(range(len(prompts)))
    running: dict[int, int] = {}  # slot to prompt
    start = time.perf_counter()
    on_progress(0, len(prompts))
    with closing(_Sequences(llm, head, slots, length)) as sequences:
        while waiting or running:
            for slot in range(slots):  # llama.cpp computes together only sequences that are given in this order
                if slot in running:
                    sequences.add(slot, rows[running[slot]][-1:])
                elif waiting and sequences.has_room(len(prompts[waiting[0]])):
                    running[slot] = waiting.popleft()
                    sequences.begin(slot, prompts[running[slot]][len(head) :])
            for slot, token in sequences.decode().items():
                row = rows[running[slot]]
                row.append(token)
                if token in stop_ids or len(row) == max_new_tokens:
                    del running[slot]
                    on_progress(len(prompts) - len(waiting) - len(running), len(prompts))
    ids = [cut_at_stop(row, stop_ids)[0] for row in rows]
    return Generated(ids, time.perf_counter() - start, sum(map(len, rows)))


def _tokens_in_memory(llm: "llama_cpp.Llama") -> int:
    """Tokens of all sequences together: BATCH_TOKENS, or as many as fit into half of the free memory."""
    width = llama_cpp.llama_model_n_embd(llm.model) // llama_cpp.llama_model_n_head(llm.model)
    heads = llama_cpp.llama_model_n_layer(llm.model) * llama_cpp.llama_model_n_head_kv(llm.model)
    per_token = 2 * heads * width * 2  # keys and values, float16
    free = _gpu_memory() if _on_gpu(llm) else workspace.available_memory()
    return min(BATCH_TOKENS, int(free // 2 // per_token))


def _on_gpu(llm: "llama_cpp.Llama") -> bool:
    return bool(llm.model_params.n_gpu_layers) and bool(llama_cpp.llama_supports_gpu_offload())


def _common_prefix(prompts: Sequence[list[int]]) -> list[int]:
    """At least one token shorter than the shortest prompt, whose last token must be computed for its logits."""
    equal = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False))
    return [tokens[0] for tokens in equal][: min(map(len, prompts)) - 1]


class _Sequences:
    """Several sequences in one llama.cpp context, each a fork of the common head."""

    def __init__(self, llm: "llama_cpp.Llama", head: list[int], slots: int, length: int) -> None:
        self._api = llama_cpp
        self._n_vocab = llm.n_vocab()
        self._head, self._head_slot = head, slots
        self._size = max(512, length + slots)
        params = llama_cpp.llama_context_default_params()
        # A separate stream for each sequence, and on a CPU no flash attention: masked attention over the cells of all
        # sequences takes longer (measured for 16 of them: 174 ms a step, 130 ms with streams).
        params.n_seq_max, params.kv_unified, params.n_ctx = slots + 1, False, (slots + 1) * length
        params.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO if _on_gpu(llm) else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        params.n_batch = self._size
        params.n_threads, params.n_threads_batch = llm.n_threads, llm.n_threads_batch
        self._context = llama_cpp.llama_init_from_model(llm.model, params)
        if self._context is None:
            raise SaigaError(
                f"{slots} sequences of {length} tokens do not fit into memory: "
                f"{workspace.available_memory() / workspace.GB:.1f} GB are free. Close other programs."
            )
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = forward.Batch(self._size)
        self._ends: dict[int, int] = {}  # slot to the row of the batch whose logits it needs
        self._positions = {slots: 0}
        if head:
            self.add(self._head_slot, head)
            self.decode()

    def has_room(self, count: int) -> bool:
        """Whether a prompt fits into the next batch beside one token of every sequence."""
        return len(self._batch) + count + self._head_slot <= self._size

    def begin(self, slot: int, tokens: Sequence[int]) -> None:
        self._api.llama_memory_seq_rm(self._memory, slot, -1, -1)
        if self._head:  # all of it: a part cannot be copied between streams
            self._api.llama_memory_seq_cp(self._memory, self._head_slot, slot, -1, -1)
        self._positions[slot] = len(self._head)
        self.add(slot, tokens)

    def add(self, slot: int, tokens: Sequence[int]) -> None:
        last = self._positions[slot] + len(tokens) - 1
        for position, token in enumerate(tokens, self._positions[slot]):
            self._batch.add(token, position, sequence=slot, has_logits=position == last)
        self._positions[slot] += len(tokens)
        self._ends[slot] = len(self._batch) - 1

    def decode(self) -> dict[int, int]:
        """The next token of every sequence that got tokens since the last call."""
        if code := self._batch.decode(self._context):
            raise RuntimeError(f"llama_decode returned {code}")
        logits = {slot: self._api.llama_get_logits_ith(self._context, row) for slot, row in self._ends.items()}
        found = {slot: int(np.ctypeslib.as_array(row, (self._n_vocab,)).argmax()) for slot, row in logits.items()}
        self._ends.clear()
        return found

    def close(self) -> None:
        self._batch.close()
        self._api.llama_free(self._context)
