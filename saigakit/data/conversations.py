"""Files of records into checked conversations, and those into training and held-out."""

import hashlib
import random
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar, cast

from saigakit.core.display import Every
from saigakit.core.files import replacing
from saigakit.data import records, schema, store
from saigakit.data.records import Bad, named
from saigakit.data.schema import Conversation
from saigakit.data.store import as_line
from saigakit.errors import DataError, SaigaError

if TYPE_CHECKING:
    from datasets import Dataset

T = TypeVar("T")
_SHORT = 3  # blanks in a text that says too little to be a question of its own
KEPT_PROBLEMS = 1000  # of a million bad records; the others are counted


def read_conversations(source: str | Path | Sequence[str | Path]) -> "Dataset":
    """The records of one file or of several: JSONL (.gz too), a JSON array or Parquet; see `schema.conversation`.

    A row has "messages" and, where there are any, "tools"; tools and the arguments of calls are JSON text. Other keys
    of a record ("id") are not read, which is printed with their number. Blank lines are skipped.
    Raises DataError with every problem of all files: no record is dropped.
    """
    files = [Path(file) for file in ([source] if isinstance(source, str | Path) else source)]
    for file in files:
        if not file.is_file():
            what = "is a directory; name the files in it" if file.is_dir() else "is not there"
            raise SaigaError(f"{file} {what}.")
    checking = _Checking(files)
    made = store.as_dataset(checking.conversations(), expected=sum(file.stat().st_size for file in files))
    checking.conclude()
    return made


def labels(files: Sequence[Path]) -> list[str]:
    """A file's name; with its directory where another has the same name, with all of its path where that is no help."""
    names = [file.name for file in files]
    longer = [f"{file.parent.name}/{file.name}" for file in files]
    return [
        name if names.count(name) == 1 else long if longer.count(long) == 1 else str(file)
        for file, name, long in zip(files, names, longer, strict=True)
    ]


def place_of(files: Sequence[Path], index: int) -> str:
    """Where `read_conversations` read a conversation: "records.jsonl:17"."""
    places = ((label, line) for file, label in zip(files, labels(files), strict=True) for line, _ in records.read(file))
    label, line = next(islice(places, index, None))
    return f"{label}:{line}"


class _Checking:
    """One reading of files, and what was found on the way."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        self.records = self.bad = self.empty = self.more_problems = 0
        self.problems: list[str] = []
        self.ignored: Counter[str] = Counter()
        self.labels = labels(files)
        self.is_due = Every()

    def conversations(self) -> Iterator[Conversation]:
        """Those that are good; after the first bad one none, for they will not be used."""
        for file, label in zip(self.files, self.labels, strict=True):
            before = self.records
            for line, record in records.read(file):
                self.records += 1
                made = record if isinstance(record, Bad) else schema.conversation(record)
                if isinstance(made, Bad):
                    self.bad += 1
                    self._add(f"{label}:{line}: {problem}" for problem in made.problems)
                elif not self.problems:
                    self.ignored.update(schema.keys_not_read(cast(dict[str, Any], record)))
                    yield made
                if self.is_due():
                    print(f"{label}: {self.records - before:,} records checked", flush=True)
            if self.records == before:
                self.empty += 1
                self._add([f"{label}: holds no record; write one JSON object on each line, or leave the file out"])

    def _add(self, problems: Iterable[str]) -> None:
        for problem in problems:
            if len(self.problems) < KEPT_PROBLEMS:
                self.problems.append(problem)
            else:
                self.more_problems += 1

    def conclude(self) -> None:
        what = str(self.files[0]) if len(self.files) == 1 else f"{len(self.files)} files"
        if not self.records:
            raise DataError(f"{what} holds no record; write one JSON object on each line.", [])
        if self.problems:
            empty = f", and {self.empty} of the files hold none" if self.empty else ""
            summary = f"{what}: {self.bad} of {self.records} records cannot be used{empty}."
            raise DataError(summary, self.problems, more=self.more_problems)
        if self.ignored:
            counts = ", ".join(f"{named(key)} in {count} records" for key, count in self.ignored.most_common(10))
            more = f" and {len(self.ignored) - 10} more" if len(self.ignored) > 10 else ""
            name = self.files[0].name if len(self.files) == 1 else what
            print(f"{name}: keys beside the conversation, not read: {counts}{more}.", flush=True)


class Asked(NamedTuple):
    """What two conversations are compared by, in 8 bytes each: of a million, two are alike by chance once in 40 million
    data sets."""

    whole: int  # the system prompt and everything that the user says
    texts: frozenset[int]  # those of the user's that say something: "Спасибо" stands in many conversations

    @classmethod
    def of(cls, messages: Iterable[Mapping[str, Any]]) -> Self:
        said = [(item["role"], _plain(item["content"])) for item in messages if item["role"] in ("system", "user")]
        texts = frozenset(_digest(text) for role, text in said if role == "user" and text.count(" ") >= _SHORT)
        return cls(_digest("\n".join(text for _, text in said)), texts)


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")


def _many(total: int) -> int:
    """A text in more conversations than these is an instruction, and tells none of them apart."""
    return max(10, total // 5)


def asking_alike(these: "Dataset", those: "Dataset") -> list[int]:
    """The indices of `those` that ask what one of `these` asks."""
    wholes: set[int] = set()
    texts: Counter[int] = Counter()
    for each in store.conversations(these):
        asked = Asked.of(each["messages"])
        wholes.add(asked.whole)
        texts.update(asked.texts)
    most = _many(len(these))
    found = (Asked.of(each["messages"]) for each in store.conversations(those))
    return [
        index
        for index, asked in enumerate(found)
        if asked.whole in wholes or any(0 < texts[text] <= most for text in asked.texts)
    ]


def split_conversations(conversations: "Dataset", *, eval_fraction: float, seed: int) -> tuple["Dataset", "Dataset"]:
    """(train, held_out): the parts of `split_indices`."""
    train, held_out = split_indices(conversations, eval_fraction=eval_fraction, seed=seed)
    return store.select(conversations, train), store.select(conversations, held_out)


def split_indices(conversations: "Dataset", *, eval_fraction: float, seed: int) -> tuple["array[int]", "array[int]"]:
    """(train, held_out): shuffled once, at least one held out, no question on both sides.

    Conversations with a user's text in common go to the same side, but for short ones ("Спасибо") and for those that
    many share (an instruction); a group too big for the fraction is trained on.
    """
    if isinstance(eval_fraction, bool) or not isinstance(eval_fraction, int | float) or not 0 < eval_fraction < 1:
        raise SaigaError(f"eval_fraction={eval_fraction!r} must be a number between 0 and 1, such as 0.05.")
    order = array("q", range(len(conversations)))
    random.Random(seed).shuffle(order)
    group_of = _groups(conversations)
    groups = sum(group == index for index, group in enumerate(group_of))
    if groups < 2:
        raise SaigaError(
            f"{len(order)} conversations with {groups} distinct prompts cannot be split: at least 2 are needed, "
            "with no text of the user in common. Add records or give a held_out file."
        )
    is_held_out = _held_out(order, group_of, min(len(order) - 1, max(1, round(eval_fraction * len(order)))))
    train = array("q", (index for index in order if not is_held_out[group_of[index]]))
    return train, array("q", (index for index in order if is_held_out[group_of[index]]))


def _groups(conversations: "Dataset") -> "array[int]":
    """For each conversation the first of those that share a text with it, directly or through others."""
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

    wholes, digests, owners = array("Q"), array("Q"), array("q")
    for index, conversation in enumerate(store.conversations(conversations)):
        asked = Asked.of(conversation["messages"])
        wholes.append(asked.whole)
        for digest in asked.texts:
            digests.append(digest)
            owners.append(index)
    unite(wholes, array("q", range(len(wholes))), len(wholes))
    unite(digests, owners, _many(len(wholes)))
    return array("q", map(root, range(len(parent))))


def _held_out(order: Sequence[int], group_of: Sequence[int], wanted: int) -> bytearray:
    """1 at each group to hold out: in this order those that fit into `wanted`, else the smallest one."""
    sizes = array("q", bytes(8 * len(order)))
    for group in group_of:
        sizes[group] += 1
    chosen, seen = bytearray(len(order)), bytearray(len(order))
    taken, smallest = 0, group_of[order[0]]
    for group in map(group_of.__getitem__, order):
        if seen[group]:
            continue
        seen[group] = 1
        if sizes[group] < sizes[smallest]:
            smallest = group
        if taken + sizes[group] <= wanted:
            chosen[group] = 1
            taken += sizes[group]
    if not taken:
        chosen[smallest] = 1
    return chosen


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count`, evenly over the items, which may be sorted by kind."""
    taken = min(count, len(items))
    return [items[index * len(items) // taken] for index in range(taken)]


class CommonSystemPrompt:
    """Finds the one system prompt of all conversations that are added."""

    def __init__(self) -> None:
        self._found: set[str] = set()

    def add(self, conversation: Mapping[str, Any]) -> None:
        if len(self._found) < 2:
            first = conversation["messages"][0]
            self._found.add(first["content"] if first["role"] == "system" else "")

    @property
    def value(self) -> str | None:
        """An empty string if no conversation has a system prompt, None if they differ."""
        return next(iter(self._found)) if len(self._found) == 1 else None


def common_system_prompt(conversations: Iterable[Mapping[str, Any]]) -> str | None:
    """See `CommonSystemPrompt.value`; reads no further than to the first that differs."""
    prompt = CommonSystemPrompt()
    for conversation in store.conversations(conversations):
        prompt.add(conversation)
        if prompt.value is None:
            break
    return prompt.value


def write_conversations(conversations: Iterable[Mapping[str, Any]], file: str | Path) -> Path:
    """JSONL, complete or absent. Only "\n" looks like a line's end in it, even to str.splitlines."""
    path = Path(file)
    with replacing(path) as partial, partial.open("wb") as stream:
        stream.writelines(map(as_line, store.conversations(conversations)))
    return path
