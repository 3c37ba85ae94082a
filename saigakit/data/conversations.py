"""Read and check conversations, and split them into a training and an evaluation set."""

import random
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

from saigakit.config import require_share
from saigakit.core.display import Every, count
from saigakit.core.files import replacing
from saigakit.core.lazy import datasets
from saigakit.data import records, schema, store
from saigakit.data.near_duplicates import digest
from saigakit.data.records import BadRecord, quote
from saigakit.data.schema import Conversation
from saigakit.errors import DataError, SaigaError

T = TypeVar("T")
_SHORT = 3  # spaces in a text that says too little to be a question of its own
KEPT_PROBLEMS = 1000  # the others are only counted


def read_conversations(
    source: str | Path | Sequence[str | Path], limit: int | None = None, *, max_bad: float = 0.0
) -> "datasets.Dataset":
    """Read records from JSONL (.gz too), JSON arrays or Parquet; see `schema.normalise_record` for their formats.

    A row has "messages" and, if any record has them, "tools"; tools and the arguments of calls are JSON text.
    Keys that are not read ("id") are printed. Raises DataError with the problems of all files: no record is dropped,
    unless at most the share `max_bad` of them cannot be used; then they are left out, which is printed.
    With `limit`, only the first conversations are read, and what follows is not checked.
    """
    files = [Path(file) for file in ([source] if isinstance(source, str | Path) else source)]
    for file in files:
        if not file.is_file():
            problem = "is a directory; name the files in it" if file.is_dir() else "is not there"
            raise SaigaError(f"{file} {problem}.")
    reader = _Reader(files, max_bad)
    expected = sum(file.stat().st_size for file in files) if limit is None else 0
    dataset = store.as_dataset(islice(reader.conversations(), limit), expected=expected)
    if len(dataset) != limit:
        reader.conclude()
    return dataset


def file_labels(files: Sequence[Path]) -> list[str]:
    """The shortest unambiguous label of each file: its name, its directory and name, or its path."""
    names = [file.name for file in files]
    longer = [f"{file.parent.name}/{file.name}" for file in files]
    return [
        name if names.count(name) == 1 else long if longer.count(long) == 1 else str(file)
        for file, name, long in zip(files, names, longer, strict=True)
    ]


def locate_records(files: Sequence[Path], indices: Sequence[int]) -> list[str]:
    """Where `read_conversations` found conversations, such as "records.jsonl:17"; one pass, up to the last of them."""
    wanted = set(indices)
    labelled = zip(files, file_labels(files), strict=True)
    places = ((label, line) for file, label in labelled for line, _ in records.read_records(file))
    numbered = enumerate(islice(places, max(wanted, default=-1) + 1))
    found = {index: f"{label}:{line}" for index, (label, line) in numbered if index in wanted}
    return [found[index] for index in indices]


class _Reader:
    def __init__(self, files: Sequence[Path], max_bad: float) -> None:
        self.files, self.max_bad = files, max_bad
        self.records = self.bad = self.empty = self.more_problems = 0
        self.problems: list[str] = []
        self.notes = schema.Notes()

    def conversations(self) -> Iterator[Conversation]:
        """Yield conversations, up to the first problem if none is allowed, and collect problems."""
        is_due = Every()
        for file, label in zip(self.files, file_labels(self.files), strict=True):
            before = self.records
            for line, record in records.read_records(file):
                self.records += 1
                found = record if isinstance(record, BadRecord) else schema.normalise_record(record, self.notes)
                if isinstance(found, BadRecord):
                    self.bad += 1
                    self._add(f"{label}:{line}: {problem}" for problem in found.problems)
                elif self.max_bad or not self.problems:
                    yield found
                if is_due():
                    print(f"{label}: {self.records - before:,} records checked", flush=True)
            if self.records == before:
                self.empty += 1
                self._add([f"{label}: has no records; write one JSON object per line, or leave the file out"])

    def _add(self, problems: Iterable[str]) -> None:
        found, room = list(problems), KEPT_PROBLEMS - len(self.problems)
        self.problems += found[:room]
        self.more_problems += len(found[room:])

    def conclude(self) -> None:
        """Raise DataError if there were too many problems; print those left out and what was not read as it is."""
        what = str(self.files[0]) if len(self.files) == 1 else f"{len(self.files)} files"
        name = self.files[0].name if len(self.files) == 1 else what
        if not self.records:
            raise DataError(f"{what} has no records; write one JSON object per line.", [])
        bad = f"{self.bad:,} of {count(self.records, 'record')} cannot be used"
        if self.empty or self.bad > self.max_bad * self.records:
            empty = f"; files without records: {self.empty}" if self.empty else ""
            raise DataError(f"{what}: {bad}{empty}.", self.problems, more=self.more_problems)
        if self.bad:
            print(f"{name}: {bad}: left out. The first: {self.problems[0]}", flush=True)
        if unread := self.notes.unread:
            counts = ", ".join(f"{quote(key)} in {count(n, 'record')}" for key, n in unread.most_common(10))
            more = f" and {len(unread) - 10} more" if len(unread) > 10 else ""
            print(f"{name}: keys that are not read: {counts}{more}.", flush=True)
        if as_json := self.notes.as_json:
            print(f"{name}: answers that are lists or objects, which become JSON text: {as_json:,}.", flush=True)


class PromptDigests(NamedTuple):
    """Hashes by which two conversations are compared; at 8 bytes, a million collide once in 40 million data sets."""

    prompt: int  # the system prompt and all user texts
    texts: frozenset[int]  # user texts except short ones: many conversations have "Спасибо"

    @classmethod
    def of(cls, messages: Iterable[Mapping[str, Any]]) -> Self:
        texts = [
            (item["role"], " ".join(item["content"].split()).casefold())
            for item in messages
            if item["role"] in ("system", "user")
        ]
        questions = frozenset(digest(text) for role, text in texts if role == "user" and text.count(" ") >= _SHORT)
        return cls(digest("\n".join(text for _, text in texts)), questions)


def _max_sharing(total: int) -> int:
    """A text in more conversations than these is an instruction, not a question."""
    return max(10, total // 5)


def asking_alike(these: "datasets.Dataset", those: "datasets.Dataset") -> list[int]:
    """The indices of `those` that ask the same as one of `these`."""
    prompts: set[int] = set()
    texts: Counter[int] = Counter()
    for each in store.iter_conversations(these):
        digests = PromptDigests.of(each["messages"])
        prompts.add(digests.prompt)
        texts.update(digests.texts)
    most = _max_sharing(len(these))
    found = (PromptDigests.of(each["messages"]) for each in store.iter_conversations(those))
    return [
        index
        for index, digests in enumerate(found)
        if digests.prompt in prompts or any(0 < texts[text] <= most for text in digests.texts)
    ]


def split_conversations(
    conversations: "datasets.Dataset", *, eval_fraction: float, seed: int
) -> tuple["datasets.Dataset", "datasets.Dataset"]:
    """(train, held_out); see `split_indices`."""
    train, held_out = split_indices(conversations, eval_fraction=eval_fraction, seed=seed)
    return store.select_rows(conversations, train), store.select_rows(conversations, held_out)


def split_indices(
    conversations: "datasets.Dataset", *, eval_fraction: float, seed: int, may_be_empty: bool = False
) -> tuple["array[int]", "array[int]"]:
    """Shuffle once with `seed`, hold out at least one conversation, and ask no question in both parts.

    Conversations with a common user text stay together, except for short texts ("Спасибо") and instructions that many
    share. A group that is too big for the fraction goes to training. If there is only one group, all go to training
    with `may_be_empty`; otherwise SaigaError is raised.
    """
    require_share("eval_fraction", eval_fraction)
    order = array("q", range(len(conversations)))
    random.Random(seed).shuffle(order)
    group_of = _group(conversations)
    groups = sum(group == index for index, group in enumerate(group_of))
    if groups < 2 and may_be_empty:
        return order, array("q")
    if groups < 2:
        raise SaigaError(
            f"{count(len(order), 'conversation')} with {count(groups, 'distinct prompt')} cannot be split: at least 2 "
            "without a common user text are needed. Add records or set held_out to a file."
        )
    is_held_out = _choose_groups(order, group_of, min(len(order) - 1, max(1, round(eval_fraction * len(order)))))
    train = array("q", (index for index in order if not is_held_out[group_of[index]]))
    return train, array("q", (index for index in order if is_held_out[group_of[index]]))


def _group(conversations: "datasets.Dataset") -> "array[int]":
    """For each conversation the first of those with which it shares a text, directly or through others."""
    parent = array("q", range(len(conversations)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    def unite(digests: "array[int]", owners: "array[int]", most: int) -> None:
        for _, group in groupby(sorted(range(len(digests)), key=digests.__getitem__), key=digests.__getitem__):
            places = list(group)
            for place in places[1:] if len(places) <= most else ():
                first, second = sorted((root(owners[places[0]]), root(owners[place])))
                parent[second] = first

    prompts, texts, owners = array("Q"), array("Q"), array("q")
    for index, conversation in enumerate(store.iter_conversations(conversations)):
        digests = PromptDigests.of(conversation["messages"])
        prompts.append(digests.prompt)
        texts.extend(digests.texts)
        owners.extend([index] * len(digests.texts))
    unite(prompts, array("q", range(len(prompts))), len(prompts))
    unite(texts, owners, _max_sharing(len(prompts)))
    return array("q", map(root, range(len(parent))))


def _choose_groups(order: Sequence[int], group_of: Sequence[int], wanted: int) -> bytearray:
    """1 at each group to hold out: in this order those that fit into `wanted`, or else the smallest."""
    sizes = array("q", bytes(8 * len(order)))
    for group in group_of:
        sizes[group] += 1
    chosen, taken = bytearray(len(order)), 0
    for group in map(group_of.__getitem__, order):
        if not chosen[group] and taken + sizes[group] <= wanted:
            chosen[group] = 1
            taken += sizes[group]
    if not taken:
        chosen[min(map(group_of.__getitem__, order), key=sizes.__getitem__)] = 1
    return chosen


def spread(items: Sequence[T], count: int) -> list[T]:
    """Pick at most `count` items at even distances, since they may be sorted by kind."""
    taken = min(count, len(items))
    return [items[index * len(items) // taken] for index in range(taken)]


def common_system_prompt(conversations: Iterable[Mapping[str, Any]]) -> str | None:
    """The system prompt of all conversations, empty if none has one, None if they differ."""
    found: set[str] = set()
    for conversation in store.iter_conversations(conversations):
        first = conversation["messages"][0]
        found.add(first["content"] if first["role"] == "system" else "")
        if len(found) > 1:
            return None
    return found.pop() if found else None


def write_conversations(conversations: Iterable[Mapping[str, Any]], file: str | Path) -> Path:
    """Write JSONL, completely or not at all, in which only "\n" ends a line, even for str.splitlines."""
    path = Path(file)
    with replacing(path) as partial, partial.open("wb") as stream:
        stream.writelines(map(store.to_json_line, store.iter_conversations(conversations)))
    return path
