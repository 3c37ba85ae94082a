"""Tokenise conversations into rows on disk that fit the context."""

import gc
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from saigakit.core.display import Every
from saigakit.data import audit, store
from saigakit.data.conversations import place_of
from saigakit.errors import DataError, SaigaError
from saigakit.prompt import encoding
from saigakit.prompt.encoding import IGNORE_INDEX, Example, Tokenizer

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

_BATCH, _BATCH_MESSAGES = 256, 2048  # conversations, and their messages together, at most
WHY_MORE_ROWS = "one for each answer: the chat template renders the last one otherwise than those before it."
_THREADS = 4  # some are in the tokenizers library, which uses all cores, while another prepares the next batch
Conversation = Mapping[str, Any]
_Encoding = Future[list[list[Example]]]


class Encoded(NamedTuple):
    """`conversation` and its rows (`encoding.encode_rows`) after whole turns were cut off; no row: not even the
    first answer fits."""

    conversation: Conversation
    rows: list[Example]
    tokens: int  # of the longest row before
    is_cut: bool


def encode_fitting(
    conversations: "Dataset | Sequence[Conversation]",
    tokenizer: Tokenizer,
    limit: int,
    *,
    name: str,
    place: Callable[[int], str] | None = None,
) -> Iterator[Encoded]:
    """Each conversation with at most `limit` tokens a row, in order; progress by the clock.

    `place`: where the conversation of an index was read, for messages. Raises DataError with the place of each
    conversation that cannot be tokenised; after the first none is given out.
    """
    named = place or (lambda index: f"{name}, conversation {index + 1}")
    is_due = Every()
    done = 0
    problems: list[str] = []
    for batch, encoded in _batches(conversations, tokenizer, limit, named):
        try:
            made = encoded.result()
        except DataError as error:
            problems += error.problems
        if not problems:
            for conversation, its_rows in zip(batch, made, strict=True):
                yield _fitting(conversation, its_rows, tokenizer, limit)
        done += len(batch)
        if is_due():
            print(f"{name}: {done:,} of {len(conversations):,} conversations tokenised", flush=True)
    if problems:
        raise DataError(f"{name}: {len(problems)} of {done} conversations cannot be tokenised.", problems)


def _batches(
    conversations: "Dataset | Sequence[Conversation]", tokenizer: Tokenizer, limit: int, place: Callable[[int], str]
) -> Iterator[tuple[list[Conversation], _Encoding]]:
    source = store.conversations(conversations)
    waiting: deque[tuple[list[Conversation], _Encoding]] = deque()
    first = 0
    with ThreadPoolExecutor(_THREADS) as pool, _rare_collections():
        while True:
            while len(waiting) < _THREADS and (batch := _next_batch(source)):
                named = partial(_shifted, place, first)
                encoded = pool.submit(encoding.encode_rows, batch, tokenizer, limit=limit, named=named)
                waiting.append((batch, encoded))
                first += len(batch)
            if not waiting:
                return
            yield waiting.popleft()


def _next_batch(source: Iterator[Conversation]) -> list[Conversation]:
    """Fewer where they are long: each answer may be a row of its own."""
    batch: list[Conversation] = []
    messages = 0
    while len(batch) < _BATCH and messages < _BATCH_MESSAGES and (each := next(source, None)) is not None:
        batch.append(each)
        messages += len(each["messages"])
    return batch


def _shifted(place: Callable[[int], str], first: int, index: int) -> str:
    return place(first + index)


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Python's cyclic collector walks through all the ids each time: at its usual pace that is a tenth of the work."""
    usual = gc.get_threshold()
    gc.set_threshold(10_000, *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)


def _fitting(conversation: Conversation, rows: list[Example], tokenizer: Tokenizer, limit: int) -> Encoded:
    """Answers are cut off from the end, each with what led to it, until the rest fits: none loses its own end."""
    tokens = max(len(row["input_ids"]) for row in rows)
    if tokens <= limit:
        return Encoded(conversation, rows, tokens, is_cut=False)
    if len(rows) > 1:  # of a template that renders the last answer otherwise
        fitting = sum(len(row["input_ids"]) <= limit for row in rows[:-1])
        return _fewer_rows(conversation, fitting, tokens, tokenizer)
    messages, labels = conversation["messages"], rows[0]["labels"]
    answers = [i for i, each in enumerate(messages) if each["role"] == "assistant" and each.get("weight") != 0]
    pairs = enumerate(pairwise([*labels, IGNORE_INDEX]), start=1)
    ends = [end for end, (label, following) in pairs if label != IGNORE_INDEX and following == IGNORE_INDEX]
    room = sum(end <= limit for end in ends) if len(ends) == len(answers) else len(answers)
    for end in reversed([end for end in answers[:room] if end + 1 < len(messages)]):
        shorter = {**conversation, "messages": messages[: end + 1]}
        (made,) = encoding.encode_rows([shorter], tokenizer, limit=limit)
        if all(len(row["input_ids"]) <= limit for row in made):
            return Encoded(shorter, made, tokens, is_cut=True)
    return Encoded(conversation, [], tokens, is_cut=False)


def _fewer_rows(conversation: Conversation, fitting: int, tokens: int, tokenizer: Tokenizer) -> Encoded:
    """Up to the last answer before the first whose row does not fit."""
    if not fitting:
        return Encoded(conversation, [], tokens, is_cut=False)
    up_to = encoding.one_answer_each(conversation["messages"])[fitting - 1]
    shorter = {**conversation, "messages": conversation["messages"][: len(up_to)]}
    # Made anew: without the turns after it, it may be a single row.
    return Encoded(shorter, encoding.encode_rows([shorter], tokenizer)[0], tokens, is_cut=True)


def as_dataset(examples: Iterable[tuple[int, Example]]) -> "Dataset":
    """Columns input_ids, labels, length, learned (tokens of the row) and conversation (its number in its file).

    Raises SaigaError if the disk has no room for them.
    """
    import pyarrow

    number = pyarrow.int32()
    kinds = {"input_ids": pyarrow.list_(number), "labels": pyarrow.list_(number)}
    schema = pyarrow.schema(kinds | dict.fromkeys(("length", "learned", "conversation"), number))
    batches = (_record_batch(batch, schema) for batch in store.batched(examples))
    return store.dataset_of(store.map_into_memory(batches, schema, "The tokenised copy of the records"))


def _record_batch(examples: Sequence[tuple[int, Example]], schema: "pyarrow.Schema") -> "pyarrow.RecordBatch":
    import numpy as np
    import pyarrow

    lengths = [len(example["input_ids"]) for _, example in examples]
    ends = np.cumsum([0, *lengths], dtype=np.int32)

    def lists(key: str) -> "pyarrow.ListArray":
        joined = array("i", chain.from_iterable(example[key] for _, example in examples))
        return pyarrow.ListArray.from_arrays(ends, np.frombuffer(joined, np.int32))

    learned = [len(example["labels"]) - example["labels"].count(IGNORE_INDEX) for _, example in examples]
    numbers = [number for number, _ in examples]
    return pyarrow.record_batch([lists("input_ids"), lists("labels"), lengths, learned, numbers], schema=schema)


def column(rows: "Dataset", name: str) -> "array[int]":
    """One of the columns of numbers of `as_dataset`."""
    import numpy as np

    values = rows.with_format("arrow")[name][:]
    return array("i", values.to_numpy().astype(np.int32).tobytes())


def tokenise(
    conversations: "Dataset | Sequence[Conversation]", tokenizer: Tokenizer, limit: int, *, name: str
) -> "Dataset":
    """The rows that have something to learn; what is cut off or left out is counted aloud."""
    cut = dropped = unlearned = kept = 0

    def learned() -> Iterator[tuple[int, Example]]:
        nonlocal cut, dropped, unlearned, kept
        fitting = encode_fitting(conversations, tokenizer, limit, name=name)
        for number, (_, encoded, _, is_cut) in enumerate(fitting, start=1):
            found = [row for row in encoded if set(row["labels"][1:]) != {IGNORE_INDEX}]
            dropped += not encoded
            unlearned += bool(encoded) and not found
            kept += bool(found)
            cut += is_cut and bool(found)
            yield from ((number, row) for row in found)

    rows = as_dataset(learned())
    if not len(rows):
        raise SaigaError(f"{name}: no conversation has an answer within max_seq_length={limit} tokens.")
    if unlearned:
        print(f"{name}: {unlearned:,} conversations have nothing to learn and are left out.", flush=True)
    if len(rows) > kept:
        print(f"{name}: {kept:,} conversations are {len(rows):,} rows, {WHY_MORE_ROWS}", flush=True)
    if said := what_did_not_fit(name, len(conversations), cut, dropped, limit):
        print(said, flush=True)
    return rows


def what_did_not_fit(name: str, total: int, cut: int, dropped: int, limit: int) -> str:
    if not cut and not dropped:
        return ""
    return (
        f"{name}: of {total:,} conversations {cut:,} lose their last turns and {dropped:,} are left out, because they "
        f"are longer than {limit:,} tokens."
    )


class Fitted:
    """Conversations of `files` that fit the limit, with what is counted of their tokens."""

    def __init__(
        self, conversations: "Dataset", tokenizer: Tokenizer, limit: int, files: Sequence[Path], *, name: str
    ) -> None:
        self.lengths = array("i")  # tokens of all conversations, before turns were cut off
        self.cut = self.dropped = 0
        self._counts = array("i")  # audit.Counts of each that fits
        encoded = encode_fitting(conversations, tokenizer, limit, name=name, place=partial(place_of, files))
        self.conversations = store.as_dataset(self._fitting(encoded, encoding.end_of_turn_ids(tokenizer)))
        if not len(self.conversations):
            raise SaigaError(
                f"{name}: all {self.dropped} conversations are longer than max_seq_length={limit} tokens, the "
                f"shortest has {min(self.lengths)}. Raise max_seq_length or shorten the texts."
            )
        if said := what_did_not_fit(name, len(self.lengths), self.cut, self.dropped, limit):
            print(said, flush=True)

    def _fitting(self, encoded: Iterable[Encoded], end_ids: frozenset[int]) -> Iterator[dict[str, Any]]:
        for each in encoded:
            self.lengths.append(each.tokens)
            self.cut += each.is_cut
            self.dropped += not each.rows
            if each.rows:
                self._counts.extend(audit.count_tokens(each.rows, end_ids))
                yield dict(each.conversation)

    def counts(self, index: int) -> audit.Counts:
        size = len(audit.Counts._fields)
        return audit.Counts(*self._counts[size * index : size * (index + 1)])
