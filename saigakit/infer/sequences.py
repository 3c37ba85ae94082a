"""Answer many prompts at once: several sequences in one context of llama.cpp."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import takewhile
from typing import Protocol

from saigakit.core import workspace
from saigakit.core.lazy import llama_cpp, np
from saigakit.errors import SaigaError
from saigakit.infer import engine
from saigakit.llamacpp import forward
from saigakit.weights.generate import BATCH_TOKENS, Generated, OnProgress
from saigakit.weights.tensors import Array

MAX_SEQUENCES = 16  # measured on one core: 171, 199 and 214 tokens/s with 8, 16 and 32
MAX_TOKENS = 32  # of one sequence in one step


class Chooser(Protocol):
    """Decides how an answer goes on."""

    def begin(self) -> list[int]:
        """What follows the prompt in any case."""

    def choose(self, logits: Array) -> list[int]:
        """The next token, and up to MAX_TOKENS - 1 that must follow it."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing follows."""


class Greedy:
    """Take the most likely token until a stop id."""

    def __init__(self, stop_ids: frozenset[int]) -> None:
        self._stop_ids, self.is_complete = stop_ids, False

    def begin(self) -> list[int]:
        return []

    def choose(self, logits: Array) -> list[int]:
        token = int(logits.argmax())
        self.is_complete = token in self._stop_ids
        return [token]


def greedy(
    llm: "llama_cpp.Llama",
    prompts: Sequence[list[int]],
    *,
    stop_ids: frozenset[int],
    max_new_tokens: int,
    on_progress: OnProgress,
) -> Generated:
    """Take the most likely token each time, for several prompts at once; the common prefix is computed once."""
    choosers = [Greedy(stop_ids) for _ in prompts]
    rows: list[list[int]] = [[] for _ in prompts]
    start = time.perf_counter()
    on_progress(0, len(prompts))
    for done, (index, row) in enumerate(answers(llm, prompts, choosers, [max_new_tokens] * len(prompts)), 1):
        rows[index] = row
        on_progress(done, len(prompts))
    return Generated(rows, time.perf_counter() - start)


def answer(llm: "llama_cpp.Llama", prompt: Sequence[int], chooser: Chooser, *, max_new_tokens: int) -> list[int]:
    """The tokens of one answer; what the context holds of the prompt is not computed again."""
    found = chooser.begin()
    added = [*prompt, *found]
    llm.n_tokens = len(_common_prefix([llm.input_ids[: llm.n_tokens].tolist(), added]))
    if not llm._ctx.kv_cache_seq_rm(-1, llm.n_tokens, -1):  # a recurrent model cannot go back
        llm.reset()
    added = added[llm.n_tokens :]
    while not chooser.is_complete and len(found) < max_new_tokens:
        llm.eval(added)
        row = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
        added = chooser.choose(np.ctypeslib.as_array(row, (llm.n_vocab(),)))
        found += added
    return found


def answers(
    llm: "llama_cpp.Llama", prompts: Sequence[list[int]], choosers: Sequence[Chooser], limits: Sequence[int]
) -> Iterator[tuple[int, list[int]]]:
    """Yield the index of each prompt with the tokens of its answer, as soon as it is complete or has as many as its
    limit, and perhaps some that had to follow.

    Raises SaigaError if one sequence does not fit into memory.
    """
    head = _common_prefix(prompts)
    longest = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)) + MAX_TOKENS
    length = -(-longest // 256) * 256  # llama.cpp allocates cells in steps of 256
    slots = max(1, min(MAX_SEQUENCES, _tokens_in_memory(llm) // length - 1, len(prompts)))
    waiting = deque(range(len(prompts)))
    rows: dict[int, list[int]] = {}  # of the prompts that are being answered
    running: dict[int, int] = {}  # slot to prompt
    added: dict[int, list[int]] = {}  # slot to the tokens that it gets next
    with closing(_Sequences(llm, head, slots, length)) as sequences:
        while waiting or running:
            for slot in range(slots):  # llama.cpp computes together only sequences that are given in this order
                if slot in running:
                    sequences.add(slot, added[slot])
                elif waiting and sequences.has_room(len(prompts[waiting[0]])):
                    running[slot] = index = waiting.popleft()
                    rows[index] = choosers[index].begin()
                    sequences.begin(slot, [*prompts[index][len(head) :], *rows[index]])
            for slot, logits in sequences.decode().items():
                index = running[slot]
                added[slot] = choosers[index].choose(logits)
                rows[index] += added[slot]
                if choosers[index].is_complete or len(rows[index]) >= limits[index]:
                    del running[slot]
                    yield index, rows.pop(index)


def _tokens_in_memory(llm: "llama_cpp.Llama") -> int:
    """Tokens of all sequences together: BATCH_TOKENS, or as many as fit into half of the free memory."""
    free = engine.gpu_memory() if engine.on_gpu(llm) else workspace.available_memory()
    return min(BATCH_TOKENS, free // 2 // engine.cache_bytes(llm.model))


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
        self._size = max(512, length) + slots * MAX_TOKENS
        params = llama_cpp.llama_context_default_params()
        # A separate stream for each sequence, and on a CPU no flash attention: masked attention over the cells of all
        # sequences takes longer (measured for 16 of them: 174 ms a step, 130 ms with streams).
        params.n_seq_max, params.kv_unified, params.n_ctx = slots + 1, False, (slots + 1) * length
        params.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO if engine.on_gpu(llm) else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
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
        """Whether a prompt fits into the next batch beside the tokens of every sequence."""
        return len(self._batch) + count + self._head_slot * MAX_TOKENS <= self._size

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

    def decode(self) -> dict[int, Array]:
        """Logits of every sequence that got tokens since the last call, valid until the next one."""
        if code := self._batch.decode(self._context):
            raise RuntimeError(f"llama_decode returned {code}")
        rows = {slot: self._api.llama_get_logits_ith(self._context, row) for slot, row in self._ends.items()}
        self._ends.clear()
        return {slot: np.ctypeslib.as_array(row, (self._n_vocab,)) for slot, row in rows.items()}

    def close(self) -> None:
        self._batch.close()
        self._api.llama_free(self._context)
