"""Store conversations and token rows as a `datasets.Dataset` in a memory-mapped temporary file."""

import json
import mmap
import os
import tempfile
import uuid
import weakref
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import suppress
from itertools import islice
from typing import Any, TypeVar

from saigakit.core import workspace
from saigakit.core.lazy import datasets, pyarrow
from saigakit.data.schema import Conversation
from saigakit.errors import SaigaError
from saigakit.prompt.template import drop_nulls

T = TypeVar("T")
BATCH = 256  # rows that are Python objects at once
_BATCH_TEXT = 256 * 10**6  # characters in one batch; far more than fits into a context
_PER_RELEASE = 1024  # rows after which mapped pages are given back
_mapped: "weakref.WeakSet[mmap.mmap]" = weakref.WeakSet()
_LINE_ENDS = {character: f"\\u{ord(character):04x}" for character in "\u0085\u2028\u2029"}
_ENCODER = json.JSONEncoder(ensure_ascii=False)


def as_dataset(conversations: Iterable[Conversation], *, expected: int = 0) -> "datasets.Dataset":
    """Keep only the optional keys that any conversation has, with null for the others.

    `expected`: the minimum size of the copy in bytes. Raises SaigaError if the disk is full.
    """
    used: set[str] = set()

    def batches() -> Iterator["pyarrow.RecordBatch"]:
        for batch in batched(_bounded(conversations)):
            for each in batch:
                calls = (call for message in each["messages"] for call in message.get("tool_calls", ()))
                used.update({"tools"} & each.keys(), *each["messages"], *calls)
            yield pyarrow.RecordBatch.from_pylist(batch, schema=every_key)

    every_key = _schema()
    table = map_into_memory(batches(), every_key, "The checked copy of the records", expected=expected)
    schema = _schema(used)
    return make_dataset(table.select(schema.names).cast(schema))


def _bounded(conversations: Iterable[Conversation]) -> Iterator[Conversation]:
    """Raises SaigaError for a batch that would fill the memory: a small compressed file may hold it."""
    size = 0
    for number, each in enumerate(conversations):
        size = len(str(each)) + (size if number % BATCH else 0)
        if size > _BATCH_TEXT:
            raise SaigaError(
                f"{BATCH} conversations around number {number + 1} hold more than {_BATCH_TEXT // 10**6} MB of text; "
                "shorten or remove the longest."
            )
        yield each


def _schema(used: Set[str] | None = None) -> "pyarrow.Schema":
    """Without the optional keys that are not in `used`, if it is given."""
    import pyarrow as pa

    def kept(fields: Mapping[str, pa.DataType]) -> list[pa.Field]:
        return [pa.field(name, kind) for name, kind in fields.items() if used is None or name in used]

    text = pa.string()
    call = pa.struct({"id": text, "type": text, "function": pa.struct({"name": text, "arguments": text})})
    optional = {"reasoning_content": text, "tool_calls": pa.list_(call), "tool_call_id": text, "name": text}
    optional["weight"] = pa.int64()
    message = pa.struct([pa.field("role", text), pa.field("content", text), *kept(optional)])
    return pa.schema([pa.field("messages", pa.list_(message)), *kept({"tools": text})])


def map_into_memory(
    batches: Iterable["pyarrow.RecordBatch"], schema: "pyarrow.Schema", what: str, *, expected: int = 0
) -> "pyarrow.Table":
    """Write `batches` to an unnamed file, which disappears with the process, and map it.

    Raises SaigaError naming `what` if the disk is full.
    """
    directory = workspace.scratch_dir()
    if workspace.free_disk(directory) < expected:
        raise workspace.disk_full(what, expected)
    stream = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115  # closed below, also where closing fails
    try:
        with pyarrow.ipc.new_stream(stream, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        stream.flush()
        content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        if not workspace.is_full(error):
            raise
        raise workspace.disk_full(what, max(expected, os.fstat(stream.fileno()).st_size)) from None
    finally:
        with suppress(OSError):  # of a full disk: the buffer has no room either
            stream.close()
    _mapped.add(content)
    return pyarrow.ipc.open_stream(pyarrow.py_buffer(content)).read_all()


def make_dataset(table: "pyarrow.Table") -> "datasets.Dataset":
    return datasets.Dataset(table, fingerprint=uuid.uuid4().hex[:16])  # the default is a hash of the content


def select_rows(dataset: "datasets.Dataset", indices: Iterable[int]) -> "datasets.Dataset":
    return dataset.select(indices, new_fingerprint=uuid.uuid4().hex[:16])  # the default is a hash of them


def iter_conversations(rows: Iterable[Mapping[str, Any]]) -> Iterator[Conversation]:
    """Drop the nulls of each row. A Dataset is read in batches."""
    if isinstance(rows, datasets.Dataset):
        batches = rows.iter(BATCH)
        rows = (dict(zip(batch, row, strict=True)) for batch in batches for row in zip(*batch.values(), strict=True))
    for count, row in enumerate(rows, start=1):
        yield clean_row(row)
        if count % _PER_RELEASE == 0:
            # Out of this process: what is read again comes from the system's cache or the disk.
            for content in list(_mapped):
                content.madvise(mmap.MADV_DONTNEED)


def clean_row(row: Mapping[str, Any]) -> Conversation:
    """Restore a conversation as it was before a Dataset filled missing keys with null."""
    conversation = drop_nulls(row)
    conversation["messages"] = [drop_nulls(message) for message in row["messages"]]
    for message in conversation["messages"]:
        if "tool_calls" in message:
            message["tool_calls"] = [drop_nulls(call) for call in message["tool_calls"]]
    return conversation


def batched(items: Iterable[T], size: int = BATCH) -> Iterator[list[T]]:
    """itertools.batched of Python 3.12."""
    source = iter(items)
    return iter(lambda: list(islice(source, size)), [])


def to_json_line(conversation: Mapping[str, Any]) -> bytes:
    row = clean_row(conversation)
    line = _ENCODER.encode({key: row[key] for key in ("messages", "tools") if key in row})
    for character, escaped in _LINE_ENDS.items():
        line = line.replace(character, escaped)
    return f"{line}\n".encode()
