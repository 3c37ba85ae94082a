"""Files of records in the shapes people have into checked conversations, and those into training and held-out."""

import gzip
import json
import os
import random
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from saigakit import manifest, records
from saigakit.errors import DataError, SaigaError
from saigakit.records import Bad, named

if TYPE_CHECKING:
    import datasets

Message = dict[str, str]
T = TypeVar("T")
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "bot": "assistant",
    "gpt": "assistant",
}
_BATCH = 16 * 10**6  # characters; Arrow counts the bytes of one batch in 32 bits
_TOOL_KEYS = frozenset({"tools", "functions", "tool_calls", "function_call", "tool_call_id"})
_TOOL_ROLES = frozenset({"tool", "function", "function_call", "observation"})
_LATER = "tools come in a later version; remove these records or turn the calls into text"
_LISTS = {"messages": ("role", "content"), "conversations": ("from", "value")}
_SURROGATE = re.compile("[\ud800-\udfff]")
_LINE_ENDS = re.compile("[\u0085\u2028\u2029]")


def read_conversations(file: str | Path) -> "datasets.Dataset":
    """The records of a JSONL file (.gz too) or of a JSON array, as a Dataset with the column "messages".

    Three shapes are read: {"messages": [{"role", "content"}]}, {"system"?, "user", "bot"} and ShareGPT's
    {"conversations": [{"from", "value"}]}; a "system" beside a list becomes its first message. Other keys of a
    record ("id") are not read, which is printed with their number. An unknown key of a message, which could change
    what is learned, is a problem, and so are tools. Blank lines are skipped.
    Raises DataError with every problem of the file: no record is dropped.
    """
    path = Path(file)
    if not path.is_file():
        what = "is a directory; name the file in it" if path.is_dir() else "is not there"
        raise SaigaError(f"{path} {what}.")
    checking = _Checking(path)
    try:
        made = _to_dataset(checking.conversations(), manifest.sha256(path)[:16])
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise SaigaError(f"{path} is not a whole gzip file ({error}); copy it again.") from None
    checking.conclude()
    return made


class _Checking:
    """One reading of a file, and what was found on the way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records = self.bad = 0
        self.problems: list[str] = []
        self.ignored: Counter[str] = Counter()

    def conversations(self) -> Iterator[list[Message]]:
        for line, record in records.read(self.path):
            self.records += 1
            messages = record if isinstance(record, Bad) else _normalised(record)
            if isinstance(messages, Bad):
                self.bad += 1
                self.problems += [f"{self.path.name}:{line}: {problem}" for problem in messages.problems]
            else:
                self.ignored.update(_keys_not_read(cast(dict[str, Any], record)))
                yield messages

    def conclude(self) -> None:
        if not self.records:
            raise DataError(f"{self.path} holds no record; write one JSON object on each line.", [])
        if self.problems:
            raise DataError(f"{self.path}: {self.bad} of {self.records} records cannot be used.", self.problems)
        if self.ignored:
            counts = ", ".join(f"{named(key)} in {count} records" for key, count in self.ignored.most_common(10))
            more = f" and {len(self.ignored) - 10} more" if len(self.ignored) > 10 else ""
            print(f"{self.path.name}: keys beside the conversation, not read: {counts}{more}.", flush=True)


def _to_dataset(conversations: Iterable[list[Message]], fingerprint: str) -> "datasets.Dataset":
    """In memory, so that nothing is left in the cache of `datasets`; a fingerprint spares it hashing the texts."""
    import pyarrow

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tqdm asks for ipywidgets, and no bar is shown here
        import datasets

    message = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])
    schema = pyarrow.schema([("messages", pyarrow.list_(message))])
    batches = [pyarrow.RecordBatch.from_pylist(rows, schema=schema) for rows in _batches(conversations)]
    return datasets.Dataset(pyarrow.Table.from_batches(batches, schema=schema), fingerprint=fingerprint)


def _batches(conversations: Iterable[list[Message]]) -> Iterator[list[dict[str, list[Message]]]]:
    rows: list[dict[str, list[Message]]] = []
    size = 0
    for messages in conversations:
        rows.append({"messages": messages})
        size += sum(len(message["content"]) for message in messages)
        if size > _BATCH:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


def _normalised(record: object) -> list[Message] | Bad:
    if not isinstance(record, dict):
        return Bad((f"record: is {_kind(record)}; it must be an object",))
    problems = [
        f"{key}: {_LATER}" for key in sorted(_TOOL_KEYS & record.keys()) if record[key] not in (None, [], {}, "", "[]")
    ]
    shapes = [key for key in _LISTS if key in record]
    if not shapes and not {"user", "bot"} & record.keys():
        keys = ", ".join(map(named, list(record)[:10])) or "none"
        return Bad(
            (f"record: has no messages, no conversations and no user and bot (its keys: {keys}); write one of these",)
        )
    if len(shapes) + ({"user", "bot"} <= record.keys()) > 1:
        return Bad(("record: holds two conversations (of messages, conversations, user and bot); keep one",))
    turns = [("system", record["system"], "system")] if record.get("system") not in (None, "") else []
    if shapes:
        turns += _listed(shapes[0], record[shapes[0]], problems)
    else:
        turns += [("user", record.get("user"), "user"), ("bot", record.get("bot"), "assistant")]
    problems += [problem for field, content, _ in turns if (problem := _content_problem(field, content))]
    if not problems and (problem := _order_problem(turns)):
        problems.append(problem)
    return Bad(tuple(problems)) if problems else [{"role": role, "content": content} for _, content, role in turns]


def _listed(name: str, messages: object, problems: list[str]) -> list[tuple[str, Any, str]]:
    """(field, content, role) of each message; what is wrong but for the contents goes to `problems`."""
    role_key, content_key = _LISTS[name]
    if not isinstance(messages, list) or not messages:
        problems.append(f"{name}: is {_kind(messages)}; it must be a list of messages")
        return []
    turns = []
    for index, message in enumerate(messages):
        field = f"{name}[{index}]"
        if not isinstance(message, dict):
            problems.append(f"{field}: is {_kind(message)}; it must be an object with {role_key} and {content_key}")
            continue
        for key in sorted(key for key in message if key not in (role_key, content_key) and message[key] is not None):
            what = f"is there, and {_LATER}" if key in _TOOL_KEYS else "is an unknown key and would be lost; remove it"
            problems.append(f"{field}: {named(key)} {what}")
        role = message.get(role_key)
        if not isinstance(role, str) or role not in ROLES:
            problems.append(f"{field}.{role_key}: {_role_problem(role)}")
            continue
        turns.append((f"{field}.{content_key}", message.get(content_key), ROLES[role]))
    return turns


def _role_problem(role: object) -> str:
    if role is None:
        return "is missing; use system, user or assistant"
    if role in _TOOL_ROLES:
        return _LATER
    return f"is {named(role) if isinstance(role, str) else _kind(role)}; use system, user or assistant"


def _content_problem(field: str, content: object) -> str | None:
    if content is None:
        return f"{field}: is missing; add the text"
    if not isinstance(content, str):
        return f"{field}: is {_kind(content)}; it must be a text"
    if not content.strip():
        return f"{field}: is empty; write the text or remove the record"
    if found := _SURROGATE.search(content):
        return f"{field}: holds half a character ({found.group()!a}); write the whole one"
    return None


def _order_problem(turns: Sequence[tuple[str, Any, str]]) -> str | None:
    first = 1 if turns[0][2] == "system" else 0
    for index, (field, _, role) in enumerate(turns[first:]):
        expected = ("user", "assistant")[index % 2]
        if role != expected:
            where = field.partition(".")[0]
            return (
                f"{where}: {role} speaks where {expected} should; system first if at all, then user, assistant, user …"
            )
    field, _, role = turns[-1]
    if role != "assistant":
        return f"{field.partition('.')[0]}: {role} has the last word; end with an answer of the assistant"
    return None


def _keys_not_read(record: Mapping[str, Any]) -> set[str]:
    read = {"system", *(_LISTS if _LISTS.keys() & record.keys() else ("user", "bot")), *_TOOL_KEYS}
    return {key for key in record if record[key] is not None} - read


def _kind(value: object) -> str:
    """A JSON value's type in words."""
    if isinstance(value, list | str) and not value:
        return "empty"
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def prompt_texts(messages: Iterable[Mapping[str, str]]) -> frozenset[str]:
    """What the user says, to compare prompts by: letter case and runs of blanks do not tell two apart."""
    return frozenset(" ".join(item["content"].split()).casefold() for item in messages if item["role"] == "user")


def split_conversations(
    conversations: "datasets.Dataset", *, eval_fraction: float, seed: int
) -> tuple["datasets.Dataset", "datasets.Dataset"]:
    """(train, held_out): shuffled once, at least one held out, no text of a user on both sides.

    Conversations with a user's text in common go to the same side; a group too big for the fraction is trained on.
    """
    if isinstance(eval_fraction, bool) or not isinstance(eval_fraction, int | float) or not 0 < eval_fraction < 1:
        raise SaigaError(f"eval_fraction={eval_fraction!r} must be a number between 0 and 1, such as 0.05.")
    order = list(range(len(conversations)))
    random.Random(seed).shuffle(order)
    group_of = _groups([prompt_texts(row["messages"]) for row in conversations])
    groups: dict[int, list[int]] = {}
    for index in order:
        groups.setdefault(group_of[index], []).append(index)
    if len(groups) < 2:
        raise SaigaError(
            f"{len(order)} conversations with {len(groups)} distinct prompts cannot be split: at least 2 are needed, "
            "with no text of the user in common. Add records or give a held_out file."
        )
    wanted = min(len(order) - 1, max(1, round(eval_fraction * len(order))))
    chosen: set[int] = set()
    for group in groups.values():
        if len(chosen) + len(group) <= wanted:
            chosen.update(group)
    if not chosen:
        smallest = min(groups.values(), key=len)
        chosen.update(smallest)
    return (
        conversations.select([index for index in order if index not in chosen]),
        conversations.select([index for index in order if index in chosen]),
    )


def _groups(texts: Sequence[frozenset[str]]) -> list[int]:
    """For each conversation the group of those that share a text with it, directly or through others."""
    parent = list(range(len(texts)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    seen: dict[str, int] = {}
    for index, own in enumerate(texts):
        for text in own:
            parent[root(index)] = root(seen.setdefault(text, index))
    return [root(index) for index in range(len(texts))]


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count`, evenly over the items, which may be sorted by kind."""
    taken = min(count, len(items))
    return [items[index * len(items) // taken] for index in range(taken)]


def common_system_prompt(conversations: "datasets.Dataset") -> str | None:
    """The one that all conversations begin with; None where they differ or have none."""
    beginnings = {first["content"] if first["role"] == "system" else None for first, *_ in conversations["messages"]}
    return beginnings.pop() if len(beginnings) == 1 else None


def write_conversations(conversations: Iterable[Mapping[str, Any]], file: str | Path) -> Path:
    """JSONL, written beside and renamed. Only "\n" looks like a line's end in it, even to str.splitlines."""
    path = Path(file)
    beside = path.with_name(f".{path.name}.partial")
    with beside.open("w", encoding="utf-8", newline="\n") as stream:
        for row in conversations:
            line = json.dumps({"messages": row["messages"]}, ensure_ascii=False)
            stream.write(_LINE_ENDS.sub(lambda found: f"\\u{ord(found.group()):04x}", line) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    return beside.replace(path)
