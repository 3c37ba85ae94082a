"""Tokenise conversations into rows on disk that fit the context."""

import gc
import os
import tempfile
from array import array
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, Self

from saigakit.core import workspace
from saigakit.core.display import Every
from saigakit.data.store import Conversations
from saigakit.errors import DataError, SaigaError
from saigakit.prompt import encoding
from saigakit.prompt.encoding import IGNORE_INDEX, Example, Tokenizer

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
    conversations: Sequence[Conversation], tokenizer: Tokenizer, limit: int, *, name: str
) -> Iterator[Encoded]:
    """Each conversation with at most `limit` tokens a row, in order; progress by the clock.

    Raises DataError with the place of each conversation that cannot be tokenised; after the first none is given out.
    """
    is_due = Every()
    done = 0
    problems: list[str] = []
    for batch, encoded in _batches(conversations, tokenizer, limit, name):
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
    conversations: Sequence[Conversation], tokenizer: Tokenizer, limit: int, name: str
) -> Iterator[tuple[list[Conversation], _Encoding]]:
    source = iter(conversations)
    waiting: deque[tuple[list[Conversation], _Encoding]] = deque()
    first = 0
    with ThreadPoolExecutor(_THREADS) as pool, _rare_collections():
        while True:
            while len(waiting) < _THREADS and (batch := _next_batch(source)):
                named = partial(_place, conversations, name, first)
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


def _place(conversations: Sequence[Conversation], name: str, first: int, index: int) -> str:
    if isinstance(conversations, Conversations) and (place := conversations.origin(first + index)):
        return place
    return f"{name}, conversation {first + index + 1}"


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


class Rows(Sequence[Example]):
    """Tokenised conversations in a temporary file without a name: whoever dies leaves nothing behind."""

    def __init__(self) -> None:
        self.lengths, self.learned = array("i"), array("i")  # tokens of each row
        self.numbers = array("i")  # of each row's conversation in its file, from 1
        self._ends = array("q", [0])  # in tokens
        self._file = tempfile.TemporaryFile(dir=workspace.scratch_dir(), buffering=1 << 20)  # noqa: SIM115

    def append(self, example: Example, number: int | None = None) -> None:
        """`number` is that of the conversation in its file. Raises SaigaError where the disk has no room for it."""
        ids, labels = example["input_ids"], example["labels"]
        try:
            self._file.write(array("i", ids).tobytes() + array("i", labels).tobytes())
        except OSError as error:
            raise (self._full() if workspace.is_full(error) else error) from None
        self.lengths.append(len(ids))
        self.learned.append(len(labels) - labels.count(IGNORE_INDEX))
        self.numbers.append(len(self) if number is None else number)
        self._ends.append(self._ends[-1] + len(ids))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # no slices
        index = range(len(self))[index]
        try:
            self._file.flush()
        except OSError as error:
            raise (self._full() if workspace.is_full(error) else error) from None
        itemsize = self.lengths.itemsize
        size = 2 * itemsize * self.lengths[index]
        found = array("i", os.pread(self._file.fileno(), size, 2 * itemsize * self._ends[index])).tolist()
        return {"input_ids": found[: self.lengths[index]], "labels": found[self.lengths[index] :]}

    def _full(self) -> SaigaError:
        return workspace.scratch_full("The tokenised copy of the records", 2 * self.lengths.itemsize * self._ends[-1])


def store(conversations: Sequence[Conversation], tokenizer: Tokenizer, limit: int, *, name: str) -> Rows:
    """The rows that have something to learn; what is cut off or left out is counted aloud."""
    rows = Rows()
    cut = dropped = unlearned = 0
    fitting = encode_fitting(conversations, tokenizer, limit, name=name)
    for number, (_, encoded, _, is_cut) in enumerate(fitting, start=1):
        learned = [row for row in encoded if set(row["labels"][1:]) != {IGNORE_INDEX}]
        dropped += not encoded
        unlearned += bool(encoded) and not learned
        cut += is_cut and bool(learned)
        for row in learned:
            rows.append(row, number)
    if not rows:
        raise SaigaError(f"{name}: no conversation has an answer within max_seq_length={limit} tokens.")
    if unlearned:
        print(f"{name}: {unlearned:,} conversations have nothing to learn and are left out.", flush=True)
    if len(rows) > (kept := len(conversations) - dropped - unlearned):
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


@dataclass
class Fitted:
    """Conversations that fit the limit, with their tokens."""

    conversations: Conversations
    encoded: Rows = field(default_factory=Rows)
    firsts: "array[int]" = field(default_factory=lambda: array("i", [0]))  # of each conversation's rows, and the end
    lengths: "array[int]" = field(default_factory=lambda: array("i"))  # of all, before turns were cut off
    cut: int = 0
    dropped: int = 0

    @classmethod
    def of(cls, conversations: Conversations, tokenizer: Tokenizer, limit: int, name: str) -> Self:
        made = cls(conversations)

        def fitting() -> Iterator[dict[str, Any]]:
            encoding = encode_fitting(conversations, tokenizer, limit, name=name)
            for conversation, encoded, tokens, is_cut in encoding:
                made.lengths.append(tokens)
                made.cut += is_cut
                made.dropped += not encoded
                for row in encoded:
                    made.encoded.append(row)
                if encoded:
                    made.firsts.append(len(made.encoded))
                    yield dict(conversation)

        made.conversations = Conversations.stored(fitting())
        if not made.encoded:
            raise SaigaError(
                f"{name}: all {made.dropped} conversations are longer than max_seq_length={limit} tokens, the "
                f"shortest has {min(made.lengths)}. Raise max_seq_length or shorten the texts."
            )
        if said := what_did_not_fit(name, len(made.lengths), made.cut, made.dropped, limit):
            print(said, flush=True)
        return made

    def rows_of(self, place: int) -> list[encoding.Example]:
        return [self.encoded[row] for row in range(self.firsts[place], self.firsts[place + 1])]
