"""A file (JSONL or a JSON array, gzipped or not, or Parquet) into (line, record); a bad record does not end it."""

import codecs
import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from saigakit.errors import SaigaError

if TYPE_CHECKING:
    import pyarrow

# What is taken of a directory or a data set.
SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".json.gz", ".parquet")
LINE_LIMIT = 100 * 10**6  # bytes; a conversation is never that long, a file without line ends is
ARRAY_LIMIT = 10**9  # bytes of a JSON array, which is read as a whole
_PARQUET_MAGIC = b"PAR1"
_PARQUET_ROWS = 256  # that are Python objects at once
_TABLE = "is a table; write it as JSONL or Parquet with the columns user and bot (and system), or messages"
REFUSED = {  # endings of what is not read, and what to do
    ".zst": "is compressed by zstd; unpack it with `zstd -d`, or compress it by gzip instead",
    ".csv": _TABLE,
    ".xlsx": _TABLE,
    ".zip": "is an archive; unpack it and name the file or the directory in it",
    ".parquet.gz": "is a gzipped Parquet file; unpack it with `gunzip`",
}


@dataclass(frozen=True)
class Bad:
    """In place of a record: "field: what is wrong; what to do"."""

    problems: tuple[str, ...]


def read(path: Path) -> Iterator[tuple[int, object]]:
    """(line, record), or Bad for one; in Parquet the row's number is the line.

    Raises SaigaError where the file is damaged as a whole, or of a kind that is not read.
    """
    for ending, remedy in REFUSED.items():
        if path.name.lower().removesuffix(".gz" if ending.count(".") == 1 else "").endswith(ending):
            raise SaigaError(f"{path} {remedy}.")
    with path.open("rb") as stream:
        is_parquet = stream.read(4) == _PARQUET_MAGIC
    if is_parquet or path.suffix.lower() == ".parquet":
        yield from _parquet_rows(path)
        return
    try:
        yield from _json_records(path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise SaigaError(f"{path} is not a whole gzip file ({error}); copy it again.") from None


def _json_records(path: Path) -> Iterator[tuple[int, object]]:
    with _open(path) as stream:
        is_array = stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    with _open(path) as stream:
        yield from _array_items(stream) if is_array else _line_records(stream)


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb"))


def _line_records(stream: BinaryIO) -> Iterator[tuple[int, object]]:
    """Only "\\n" ends a line: str.splitlines would also cut at U+2028 inside a text."""
    number = 0
    while line := stream.readline(LINE_LIMIT + 1):
        number += 1
        if len(line) > LINE_LIMIT and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = stream.readline(LINE_LIMIT)
            limit = LINE_LIMIT // 10**6
            yield number, Bad((f"line: is longer than {limit} MB; write one record on each line",))
            continue
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line := line.strip():
            yield number, _parsed(line)


def _parsed(line: bytes) -> object:
    try:
        return parse(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return _broken(error, "write one whole JSON object on each line")


def parse(text: str) -> object:
    """JSON of a text. Raises ValueError, also where a key is there twice, or RecursionError."""
    return _DECODER.decode(text)


def reason(error: ValueError | RecursionError) -> str:
    """Why `parse` refused a text, in words that follow "is"."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte 0x{error.object[error.start]:02x})"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    what = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
    return f"broken JSON ({what})"


def _broken(error: ValueError | RecursionError, remedy: str) -> Bad:
    remedy = "save the file as UTF-8" if isinstance(error, UnicodeDecodeError) else remedy
    return Bad((f"line: is {reason(error)}; {remedy}",))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """json.loads keeps the last of two equal keys and says nothing."""
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {named(twice)} is there twice")
    return made


# Made once: json.loads builds one in each call. Looking for doubled keys then costs 1 µs of 10 in 2 KB of Russian.
_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _array_items(stream: BinaryIO) -> Iterator[tuple[int, object]]:
    content = stream.read(ARRAY_LIMIT + 1)
    if len(content) > ARRAY_LIMIT:
        yield 1, Bad((f"file: is a JSON array of more than {ARRAY_LIMIT / 10**9:g} GB; write it as JSONL",))
        return
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        yield content.count(b"\n", 0, error.start) + 1, _broken(error, "")
        return
    line = counted = 0
    for place, record in _items(text):
        line, counted = line + text.count("\n", counted, place), place
        yield line + 1, record


def _items(text: str) -> Iterator[tuple[int, object]]:
    """(offset, item) of a JSON array; it ends at the first that is broken, and says so."""
    place = _after_blanks(text, text.index("[") + 1)
    is_over = text.startswith("]", place)
    while not is_over:
        try:
            record, end = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            yield place, _broken(error, "mend the array; what follows was not read")
            return
        yield place, record
        place = _after_blanks(text, end)
        is_over = text.startswith("]", place)
        if not is_over and not text.startswith(",", place):
            yield place, Bad(("line: a comma or ] is missing; mend the array; what follows was not read",))
            return
        place = place if is_over else _after_blanks(text, place + 1)
    if text[place + 1 :].strip():
        yield place, Bad(("line: there is text after the end of the JSON array; make it one array",))


def _after_blanks(text: str, place: int) -> int:
    while text.startswith((" ", "\t", "\r", "\n"), place):
        place += 1
    return place


def _parquet_rows(path: Path) -> Iterator[tuple[int, object]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        # With a buffer, a row group is read piece by piece; without one, as a whole.
        with parquet.ParquetFile(path, buffer_size=2**20) as file:
            as_json = _converter(pyarrow.struct(list(file.schema_arrow)))
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield number, _converted(row, as_json)
    except (OverflowError, UnicodeDecodeError) as error:  # a time that Python cannot hold, a text that is no UTF-8
        raise SaigaError(f"{path}, after row {number}: {error}. Remove the column that holds it.") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise SaigaError(
            f"{path} is not a whole Parquet file ({' '.join(str(error).split())}); copy it again."
        ) from None


def _converted(row: object, as_json: Callable[[Any], Any]) -> object:
    try:
        return as_json(row)
    except ValueError as error:
        return Bad((f"record: {error}; keep one",))


def _converter(kind: "pyarrow.DataType") -> Callable[[Any], Any]:
    """Into what JSON would give: a map is an object, and a field that Arrow fills with null is absent."""
    from pyarrow import types

    if types.is_struct(kind):
        fields = [(field.name, _converter(field.type)) for field in kind]
        return lambda value: {name: made(value[name]) for name, made in fields if value[name] is not None}
    if types.is_map(kind) and (types.is_string(kind.key_type) or types.is_large_string(kind.key_type)):
        item = _converter(kind.item_type)
        return lambda pairs: _object([(key, item(value)) for key, value in pairs if value is not None])
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        element = _converter(kind.value_type)
        return lambda values: [None if value is None else element(value) for value in values]
    return lambda value: value


def named(key: str) -> str:
    """Short, on one line, and printable whatever is in it."""
    return repr(key if len(key) <= 40 else key[:40] + "…")
