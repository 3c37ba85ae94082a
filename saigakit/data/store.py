"""Keep conversations and token rows as a `datasets.Dataset`, mapped from a file that ends with the process."""

import json
import mmap
import os
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from saigakit.core import workspace
from saigakit.data.schema import Conversation

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

T = TypeVar("T")
BATCH = 256  # rows that are Python objects at once
_LINE_ENDS = {character: f"\\u{ord(character):04x}" for character in "\u0085\u2028\u2029"}
_ENCODER = json.JSONEncoder(ensure_ascii=False)


def as_dataset(conversations: Iterable[Conversation], *, expected: int = 0) -> "Dataset":
    """The columns are "messages" and, if any conversation has them, "tools".

    A message has the keys that any message of any conversation has, null where it lacks one. `expected`: bytes that
    the copy has at least. Raises SaigaError if the disk has no room for it.
    """
    import pyarrow

    used: set[str] = set()

    def batches() -> Iterator["pyarrow.RecordBatch"]:
        for batch in batched(conversations):
            for each in batch:
                calls = (call for message in each["messages"] for call in message.get("tool_calls", ()))
                used.update({"tools"} & each.keys(), *each["messages"], *calls)
            yield pyarrow.RecordBatch.from_pylist(batch, schema=every_key)

    every_key = _schema()
    table = map_into_memory(batches(), every_key, "The checked copy of the records", expected=expected)
    schema = _schema(used)
    return dataset_of(table.select(schema.names).cast(schema))


def _schema(used: Set[str] | None = None) -> "pyarrow.Schema":
    """Of all keys, or without the optional ones that are not in `used`."""
    import pyarrow as pa

    def kept(fields: Mapping[str, pa.DataType]) -> list[pa.Field]:
        return [pa.field(name, kind) for name, kind in fields.items() if used is None or name in used]

    text = pa.string()
    call = pa.struct({"id": text, "type": text, "function": pa.struct({"name": text, "arguments": text})})
    optional = {"tool_calls": pa.list_(call), "tool_call_id": text, "name": text, "weight": pa.int64()}
    message = pa.struct([pa.field("role", text), pa.field("content", text), *kept(optional)])
    return pa.schema([pa.field("messages", pa.list_(message)), *kept({"tools": text})])


def map_into_memory(
    batches: Iterable["pyarrow.RecordBatch"], schema: "pyarrow.Schema", what: str, *, expected: int = 0
) -> "pyarrow.Table":
    """Write `batches` to a file without a name, which ends with the process, and map it.

    Raises SaigaError, which says that `what` needs room, if the disk is full.
    """
    import pyarrow

    directory = workspace.scratch_dir()
    if workspace.free_disk(directory) < expected:
        raise workspace.scratch_full(what, expected)
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
        raise workspace.scratch_full(what, max(expected, os.fstat(stream.fileno()).st_size)) from None
    finally:
        with suppress(OSError):  # of a full disk: the buffer has no room either
            stream.close()
    return pyarrow.ipc.open_stream(pyarrow.py_buffer(content)).read_all()


def dataset_of(table: "pyarrow.Table") -> "Dataset":
    from datasets import Dataset

    return Dataset(table, fingerprint=uuid.uuid4().hex[:16])  # its own would be a hash of all that is in the table


def select(dataset: "Dataset", indices: Iterable[int]) -> "Dataset":
    return dataset.select(indices, new_fingerprint=uuid.uuid4().hex[:16])  # its own would be a hash of the indices


def conversations(dataset: Iterable[Mapping[str, Any]]) -> Iterator[Conversation]:
    """Each row of a Dataset, read by batches, or of any other collection, without its nulls."""
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        yield from map(without_nulls, dataset)
        return
    for batch in dataset.iter(BATCH):
        for values in zip(*batch.values(), strict=True):
            yield without_nulls(dict(zip(batch, values, strict=True)))


def without_nulls(row: Mapping[str, Any]) -> Conversation:
    """A row as the conversation that was written."""
    made = _filled(row)
    made["messages"] = [_filled(message) for message in row["messages"]]
    for message in made["messages"]:
        if "tool_calls" in message:
            message["tool_calls"] = [_filled(call) for call in message["tool_calls"]]
    return made


def _filled(item: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in item.items() if value is not None}


def batched(items: Iterable[T], size: int = BATCH) -> Iterator[list[T]]:
    """itertools.batched of Python 3.12."""
    source = iter(items)
    return iter(lambda: list(islice(source, size)), [])


def as_line(conversation: Mapping[str, Any]) -> bytes:
    """A conversation as a line of JSON, in which only "\n" looks like the end of a line, even to str.splitlines."""
    row = without_nulls(conversation)
    line = _ENCODER.encode({key: row[key] for key in ("messages", "tools") if key in row})
    for character, escaped in _LINE_ENDS.items():
        line = line.replace(character, escaped)
    return f"{line}\n".encode()
