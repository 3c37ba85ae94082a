"""Read records with their line numbers from JSONL, JSON arrays (both optionally gzipped) and Parquet."""

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

# The files that are read of a directory or a data set.
SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".json.gz", ".parquet")
LINE_LIMIT = 100 * 10**6  # bytes; no conversation is that long, but a file without line ends is
ARRAY_LIMIT = 10**9  # bytes of a JSON array, which is read into memory
_PARQUET_MAGIC = b"PAR1"
_PARQUET_ROWS = 256  # that are Python objects at once
_TABLE = "is a table; convert it to JSONL or Parquet with the columns user and bot (and system), or messages"
REFUSED = {  # what to do about other kinds of files
    ".zst": "is compressed with zstd; decompress it with `zstd -d`, or use gzip instead",
    ".csv": _TABLE,
    ".xlsx": _TABLE,
    ".zip": "is an archive; unpack it and name the file or the directory in it",
    ".parquet.gz": "is a gzipped Parquet file; decompress it with `gunzip`",
}


@dataclass(frozen=True)
class BadRecord:
    """The problems of a record, each as "field: what is wrong; what to do"."""

    problems: tuple[str, ...]


def read_records(path: Path) -> Iterator[tuple[int, object]]:
    """Yield (line, record or BadRecord); the "line" in Parquet is the number of the row.

    Raises SaigaError if the file itself is damaged or of an unsupported kind.
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
        with _open(path) as stream:
            is_array = stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
        with _open(path) as stream:
            yield from _array_items(stream) if is_array else _line_records(stream)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise SaigaError(f"{path} is a damaged gzip file ({error}); copy it again.") from None


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb"))


def _line_records(stream: BinaryIO) -> Iterator[tuple[int, object]]:
    """Only "\\n" ends a line: str.splitlines would also split at U+2028 in a text."""
    number = 0
    while line := stream.readline(LINE_LIMIT + 1):
        number += 1
        if len(line) > LINE_LIMIT and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = stream.readline(LINE_LIMIT)
            limit = LINE_LIMIT // 10**6
            yield number, BadRecord((f"line: is longer than {limit} MB; write one record per line",))
            continue
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line := line.strip():
            try:
                record = parse_json(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                record = _bad_json(error, "write one complete JSON object per line")
            yield number, record


def parse_json(text: str) -> object:
    """Raises ValueError, also for duplicate keys, or RecursionError."""
    return _DECODER.decode(text)


def explain_json_error(error: ValueError | RecursionError) -> str:
    """Why `parse_json` failed, in words that follow "is"."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte 0x{error.object[error.start]:02x})"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    detail = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
    return f"invalid JSON ({detail})"


def _bad_json(error: ValueError | RecursionError, remedy: str) -> BadRecord:
    remedy = "save the file as UTF-8" if isinstance(error, UnicodeDecodeError) else remedy
    return BadRecord((f"line: is {explain_json_error(error)}; {remedy}",))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """json.loads silently keeps the last of two equal keys."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {quote(twice)} occurs twice")
    return found


# Made once: json.loads builds one per call. Checking for duplicate keys then costs 1 µs of 10 for 2 KB of Russian.
_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _array_items(stream: BinaryIO) -> Iterator[tuple[int, object]]:
    content = stream.read(ARRAY_LIMIT + 1)
    if len(content) > ARRAY_LIMIT:
        yield 1, BadRecord((f"file: is a JSON array of more than {ARRAY_LIMIT / 10**9:g} GB; write it as JSONL",))
        return
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        yield content.count(b"\n", 0, error.start) + 1, _bad_json(error, "")
        return
    line = counted = 0
    for place, record in _items(text):
        line, counted = line + text.count("\n", counted, place), place
        yield line + 1, record


def _items(text: str) -> Iterator[tuple[int, object]]:
    """Yield (offset, item) of a JSON array up to the first broken one."""
    place = _after_blanks(text, text.index("[") + 1)
    is_over = text.startswith("]", place)
    while not is_over:
        try:
            record, end = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            yield place, _bad_json(error, "fix the array; the rest of it was not read")
            return
        yield place, record
        place = _after_blanks(text, end)
        is_over = text.startswith("]", place)
        if not is_over and not text.startswith(",", place):
            yield place, BadRecord(("line: a comma or ] is missing; fix the array; the rest of it was not read",))
            return
        place = place if is_over else _after_blanks(text, place + 1)
    if text[place + 1 :].strip():
        yield place, BadRecord(("line: there is text after the end of the JSON array; write a single array",))


def _after_blanks(text: str, place: int) -> int:
    while text.startswith((" ", "\t", "\r", "\n"), place):
        place += 1
    return place


def _parquet_rows(path: Path) -> Iterator[tuple[int, object]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        # With a buffer, a row group is read piece by piece; without one, all at once.
        with parquet.ParquetFile(path, buffer_size=2**20) as file:
            to_json = _converter(pyarrow.struct(list(file.schema_arrow)))
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    try:
                        record = to_json(row)
                    except ValueError as error:
                        record = BadRecord((f"record: {error}; keep one",))
                    yield number, record
    except (OverflowError, UnicodeDecodeError) as error:  # a time that Python cannot represent, or invalid UTF-8
        raise SaigaError(f"{path}, after row {number}: {error}. Remove the column with this value.") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise SaigaError(f"{path} is a damaged Parquet file ({' '.join(str(error).split())}); copy it again.") from None


def _converter(kind: "pyarrow.DataType") -> Callable[[Any], Any]:
    """Convert to what JSON would give: maps to objects, and without the fields that Arrow fills with null."""
    from pyarrow import types

    if types.is_struct(kind):
        fields = [(field.name, _converter(field.type)) for field in kind]
        return lambda value: {name: convert(value[name]) for name, convert in fields if value[name] is not None}
    if types.is_map(kind) and (types.is_string(kind.key_type) or types.is_large_string(kind.key_type)):
        item = _converter(kind.item_type)
        return lambda pairs: _object([(key, item(value)) for key, value in pairs if value is not None])
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        element = _converter(kind.value_type)
        return lambda values: [None if value is None else element(value) for value in values]
    return lambda value: value


def quote(key: str) -> str:
    """Shorten a key and make it printable on one line."""
    return repr(key if len(key) <= 40 else key[:40] + "…")
