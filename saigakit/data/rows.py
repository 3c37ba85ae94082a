"""Tokenise conversations into rows on disk that fit the context."""

import gc
from array import array
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from saigakit.core.display import Every, count
from saigakit.core.lazy import datasets, pyarrow
from saigakit.data import audit, store
from saigakit.data.audit import find_damage
from saigakit.data.conversations import locate_records
from saigakit.errors import DataError, SaigaError
from saigakit.prompt import encoding
from saigakit.prompt.encoding import IGNORE_INDEX, Example, Tokenizer

_BATCH, _BATCH_MESSAGES = 256, 2048  # conversations, and their messages together, at most
_SHOWN_DAMAGE = 3  # places of each kind
_THREADS = 4  # one prepares a batch while others are in the tokenizers library, which uses all cores
Conversation = Mapping[str, Any]
_Encoding = Future[list[list[Example]]]


class Encoded(NamedTuple):
    """A conversation, perhaps without its last turns, and its rows; no rows if not even the first answer fits."""

    conversation: Conversation
    rows: list[Example]
    tokens: int  # of the longest row, before anything was cut
    is_cut: bool


def encode_fitting(
    conversations: "datasets.Dataset | Sequence[Conversation]",
    tokenizer: Tokenizer,
    limit: int,
    *,
    name: str,
    place: Callable[[int], str] | None = None,
) -> Iterator[Encoded]:
    """Tokenise each conversation, in order, into rows of at most `limit` tokens.

    `place`: where the conversation with an index was read, for messages. Raises DataError with the place of every
    conversation that cannot be tokenised; nothing is yielded after the first.
    """
    label = place or (lambda index: f"{name}, conversation {index + 1}")
    is_due = Every()
    done = 0
    problems: list[str] = []
    for batch, encoded in _batches(conversations, tokenizer, limit, label):
        try:
            encoded_rows = encoded.result()
        except DataError as error:
            problems += error.problems
        if not problems:
            for conversation, rows in zip(batch, encoded_rows, strict=True):
                yield _fit(conversation, rows, tokenizer, limit)
        done += len(batch)
        if is_due():
            print(f"{name}: {done:,} of {count(len(conversations), 'conversation')} tokenised", flush=True)
    if problems:
        raise DataError(f"{name}: {len(problems)} of {count(done, 'conversation')} cannot be tokenised.", problems)


def _batches(
    conversations: "datasets.Dataset | Sequence[Conversation]",
    tokenizer: Tokenizer,
    limit: int,
    place: Callable[[int], str],
) -> Iterator[tuple[list[Conversation], _Encoding]]:
    source = store.iter_conversations(conversations)
    waiting: deque[tuple[list[Conversation], _Encoding]] = deque()
    first = 0
    usual = gc.get_threshold()
    gc.set_threshold(10_000, *usual[1:])  # the cyclic collector walks through all ids: by default a tenth of the time
    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            while True:
                while len(waiting) < _THREADS and (batch := _next_batch(source)):
                    label = partial(lambda start, index: place(start + index), first)
                    encoded = pool.submit(encoding.encode_rows, batch, tokenizer, limit=limit, label=label)
                    waiting.append((batch, encoded))
                    first += len(batch)
                if not waiting:
                    return
                yield waiting.popleft()
    finally:
        gc.set_threshold(*usual)


def _next_batch(source: Iterator[Conversation]) -> list[Conversation]:
    """Take fewer long conversations: each answer may become a row."""
    batch: list[Conversation] = []
    messages = 0
    while len(batch) < _BATCH and messages < _BATCH_MESSAGES and (each := next(source, None)) is not None:
        batch.append(each)
        messages += len(each["messages"])
    return batch


def _fit(conversation: Conversation, rows: list[Example], tokenizer: Tokenizer, limit: int) -> Encoded:
    """Cut off the last answers, each with the turns before it, until the rest fits."""
    tokens = max(len(row["input_ids"]) for row in rows)
    if tokens <= limit:
        return Encoded(conversation, rows, tokens, is_cut=False)
    messages, labels = conversation["messages"], rows[0]["labels"]
    answers = encoding.trained_answers(messages)
    if len(rows) > 1:  # a row per answer, up to the first that does not fit
        room = sum(len(row["input_ids"]) <= limit for row in rows[:-1])
    else:
        pairs = enumerate(pairwise([*labels, IGNORE_INDEX]), start=1)
        ends = [end for end, (label, following) in pairs if label != IGNORE_INDEX and following == IGNORE_INDEX]
        room = sum(end <= limit for end in ends) if len(ends) == len(answers) else len(answers)
    for end in reversed([end for end in answers[:room] if end + 1 < len(messages)]):
        shorter = {**conversation, "messages": messages[: end + 1]}  # without the later turns it may be a single row
        (shorter_rows,) = encoding.encode_rows([shorter], tokenizer, limit=limit)
        if all(len(row["input_ids"]) <= limit for row in shorter_rows):
            return Encoded(shorter, shorter_rows, tokens, is_cut=True)
    return Encoded(conversation, [], tokens, is_cut=False)


def as_dataset(examples: Iterable[tuple[int, Example]]) -> "datasets.Dataset":
    """Columns input_ids, labels, length, learned (trained tokens) and conversation (its number in its file)."""
    number = pyarrow.int32()
    kinds = {"input_ids": pyarrow.list_(number), "labels": pyarrow.list_(number)}
    schema = pyarrow.schema(kinds | dict.fromkeys(("length", "learned", "conversation"), number))
    batches = (
        pyarrow.RecordBatch.from_pylist([_with_counts(*each) for each in batch], schema)
        for batch in store.batched(examples)
    )
    return store.make_dataset(store.map_into_memory(batches, schema, "The tokenised copy of the records"))


def _with_counts(conversation: int, example: Example) -> dict[str, Any]:
    labels = example["labels"]
    learned = len(labels) - labels.count(IGNORE_INDEX)
    return {**example, "length": len(labels), "learned": learned, "conversation": conversation}


def read_column(rows: "datasets.Dataset", name: str) -> "array[int]":
    """Read one of the integer columns of `as_dataset`."""
    return array("i", rows.with_format("arrow")[name][:].to_numpy().astype("int32").tobytes())


def tokenise(
    conversations: "datasets.Dataset | Sequence[Conversation]", tokenizer: Tokenizer, limit: int, *, name: str
) -> "datasets.Dataset":
    """Keep the rows with trained tokens, and print how much was cut off or left out."""
    found: Counter[str] = Counter()

    def trained_rows() -> Iterator[tuple[int, Example]]:
        fitting = encode_fitting(conversations, tokenizer, limit, name=name)
        for number, (_, encoded, _, is_cut) in enumerate(fitting, start=1):
            trained = [row for row in encoded if set(row["labels"][1:]) != {IGNORE_INDEX}]
            found["kept" if trained else "untrained" if encoded else "dropped"] += 1
            found["cut"] += is_cut and bool(trained)
            yield from ((number, row) for row in trained)

    rows = as_dataset(trained_rows())
    if not len(rows):
        raise SaigaError(f"{name}: no conversation has an answer within max_seq_length={limit} tokens.")
    if untrained := found["untrained"]:
        print(f"{name}: left out {count(untrained, 'conversation')} without trained tokens.", flush=True)
    if len(rows) > (kept := found["kept"]):
        reason = "one for each answer, because the chat template renders the final turn differently."
        print(f"{name}: {len(rows):,} rows of {count(kept, 'conversation')}, {reason}", flush=True)
    _report_too_long(name, len(conversations), found["cut"], found["dropped"], limit)
    return rows


def _report_too_long(name: str, total: int, cut: int, dropped: int, limit: int, places: Sequence[str] = ()) -> None:
    if cut or dropped:
        named = f": {', '.join(places)}" if places else ""
        named += f" and {dropped - len(places):,} more" if places and dropped > len(places) else ""
        outcome = f"cut after an earlier answer and {dropped:,} left out, because of more than {limit:,} tokens{named}."
        print(f"{name}: {cut:,} of {count(total, 'conversation')} {outcome}", flush=True)


class FittedConversations:
    """The conversations of `files` that fit into `limit` tokens, and their token counts."""

    def __init__(
        self, conversations: "datasets.Dataset", tokenizer: Tokenizer, limit: int, files: Sequence[Path], *, name: str
    ) -> None:
        self.files = files
        self.lengths = array("i")  # tokens of all conversations, before anything was cut
        self.cut = 0
        self.dropped = array("q")  # the indices of those that do not fit
        self._damage: dict[str, array[int]] = {}  # the indices of each kind
        self._counts = array("i")  # audit.TokenCounts of each that fits
        encoded = encode_fitting(
            conversations, tokenizer, limit, name=name, place=lambda index: locate_records(files, [index])[0]
        )
        self.conversations = store.as_dataset(self._count(encoded, encoding.end_of_turn_ids(tokenizer)))
        if not len(self.conversations):
            raise SaigaError(
                f"{name}: none of {count(len(self.dropped), 'conversation')} fits into max_seq_length={limit} tokens; "
                f"the shortest has {min(self.lengths)}. Raise max_seq_length or shorten the texts."
            )
        shown = [self.dropped[: DataError.SHOWN], *(found[:_SHOWN_DAMAGE] for found in self._damage.values())]
        places = iter(locate_records(files, list(chain(*shown))))
        self.left_out, *damaged = (list(islice(places, len(some))) for some in shown)
        self.damaged = {kind: (len(found), damaged.pop(0)) for kind, found in self._damage.items()}
        _report_too_long(name, len(self.lengths), self.cut, len(self.dropped), limit, self.left_out)

    def _count(self, encoded: Iterable[Encoded], end_ids: frozenset[int]) -> Iterator[dict[str, Any]]:
        for each in encoded:
            self.lengths.append(each.tokens)
            self.cut += each.is_cut
            for kind in find_damage(each.conversation["messages"]):
                self._damage.setdefault(kind, array("q")).append(len(self.lengths) - 1)
            if not each.rows:
                self.dropped.append(len(self.lengths) - 1)
            else:
                self._counts.extend(audit.count_tokens(each.rows, end_ids))
                yield dict(each.conversation)

    def locate(self, indices: Iterable[int]) -> list[str]:
        """Where the files have the kept conversations with these indices."""
        kept_before = [dropped - nth for nth, dropped in enumerate(self.dropped)]
        return locate_records(self.files, [index + bisect_right(kept_before, index) for index in indices])

    def counts(self, index: int) -> audit.TokenCounts:
        size = len(audit.TokenCounts._fields)
        return audit.TokenCounts(*self._counts[size * index : size * (index + 1)])
