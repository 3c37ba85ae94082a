"""A file of records into (line, record): JSONL or a JSON array, gzipped or not; a broken line does not end it."""

import codecs
import gzip
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

LINE_LIMIT = 100 * 10**6  # bytes; a conversation is never that long, a file without line ends is
ARRAY_LIMIT = 10**9  # bytes of a JSON array, which is read as a whole


@dataclass(frozen=True)
class Bad:
    """In place of a record: "field: what is wrong; what to do"."""

    problems: tuple[str, ...]


def read(path: Path) -> Iterator[tuple[int, object]]:
    """(line, record), or Bad for one. A damaged .gz raises EOFError, gzip.BadGzipFile or zlib.error."""
    with _open(path) as stream:
        is_array = stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    with _open(path) as stream:
        yield from _array_items(stream) if is_array else _line_records(stream)


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb"))


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
        return json.loads(line.decode("utf-8"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        return _broken(error, "write one whole JSON object on each line")


def _broken(error: ValueError | RecursionError, remedy: str) -> Bad:
    if isinstance(error, UnicodeDecodeError):
        return Bad((f"line: is not UTF-8 (byte 0x{error.object[error.start]:02x}); save the file as UTF-8",))
    if isinstance(error, RecursionError):
        return Bad((f"line: is nested too deeply; {remedy}",))
    what = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
    return Bad((f"line: is broken JSON ({what}); {remedy}",))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """json.loads keeps the last of two equal keys and says nothing."""
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {named(twice)} is there twice")
    return made


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
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    place = _after_blanks(text, text.index("[") + 1)
    is_over = text.startswith("]", place)
    while not is_over:
        try:
            record, end = decoder.raw_decode(text, place)
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


def named(key: str) -> str:
    """Short, on one line, and printable whatever is in it."""
    return repr(key if len(key) <= 40 else key[:40] + "…")
