"""Read records with their line numbers from JSONL, JSON, CSV, Parquet and Arrow files."""

import codecs
import csv
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from saigakit.core.display import count
from saigakit.core.lazy import datasets, pyarrow
from saigakit.data import formats
from saigakit.errors import SaigaError

LINE_LIMIT = 16 * 10**6  # bytes; no conversation is that long, but a file without line ends is
ARRAY_LIMIT = 10**9  # bytes of JSON over several lines, which is read into memory
_HEAD = 2**16  # bytes by which the layout and the encoding are recognised
_ROWS = 256  # of a table that are Python objects at once
_KEYS = {"system", *chain.from_iterable(formats.SHAPES)}
_MESSAGES = re.compile(rb'\s*\[[ \t]*\{[ \t]*"(role|content|from|value)"')
_REST = "the rest of the file was not read"


class BadRecord(NamedTuple):
    """The problems of a record, each as "field: what is wrong; what to do"."""

    problems: tuple[str, ...]


def read_records(path: Path) -> Iterator[tuple[int, object]]:
    """Yield (line, record or BadRecord); the "line" in Parquet and Arrow is the number of the row.

    Raises SaigaError if the file itself is damaged or of an unsupported kind.
    """
    kind = formats.kind_of(path)
    if kind in (".parquet", ".arrow"):
        yield from _table_rows(path, kind)
        return
    try:
        with formats.open_text(path, kind) as stream:
            head = stream.read(_HEAD)
        formats.refuse_by_content(path, head)
        with formats.open_text(path, kind) as stream:
            yield from _text_records(stream, head, path.name.lower())
    except (EOFError, OSError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of the decompression
            raise
        packing = "gzip" if kind == ".gz" else "zstd"
        raise SaigaError(f"{path} is a damaged {packing} file ({error}); copy it again.") from None


def _text_records(stream: BinaryIO, head: bytes, name: str) -> Iterator[tuple[int, object]]:
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if found := formats.find_other_encoding(head):
        line, encoding = found
        remedy = f"save it as UTF-8, for example with `iconv -f {encoding} -t utf-8`"
        yield line, BadRecord((f"file: looks like {encoding}, not UTF-8; {remedy}",))
    elif name.endswith(formats.TABLES):
        yield from _csv_rows(stream, "\t" if ".tsv" in name[-8:] else ",")
    elif _spans_lines(start):
        yield from _json_items(stream)
    else:
        yield from _line_records(stream)


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


def _bad_json(error: ValueError | RecursionError, remedy: str, rest: str = "") -> BadRecord:
    return BadRecord((f"line: is {explain_json_error(error)}; {_find_remedy(error) or remedy}{rest}",))


def _find_remedy(error: ValueError | RecursionError) -> str | None:
    if isinstance(error, UnicodeDecodeError):
        return "save the file as UTF-8"
    if not isinstance(error, json.JSONDecodeError):
        return "keep one" if isinstance(error, ValueError) else None
    before, after = error.doc[max(0, error.pos - 20) : error.pos].rstrip(), error.doc[error.pos :][:20].lstrip()
    if after.startswith("\ufeff"):
        return "remove the byte order mark (U+FEFF) that joining files has left in front of it"
    if after.startswith(("'", "None", "True", "False")):
        return "this is Python, not JSON: write it with json.dumps"
    if re.match(r",\s*[\]}]", "," * before.endswith(",") + after):
        return "remove the comma before the bracket"
    if after.startswith(","):
        return "remove the comma after the object, or put [ ] around all objects"
    return None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """json.loads silently keeps the last of two equal keys."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        raise ValueError(f"the key {quote(twice)} occurs twice")
    return found


# Made once: json.loads builds one per call. Checking for duplicate keys then costs 1 µs of 10 for 2 KB of Russian.
_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _spans_lines(head: bytes) -> bool:
    """Whether it is an array, or its first object goes on in the next line, which a damaged line of JSONL does not.

    Lines may also be lists of messages, which are records.
    """
    first, _, rest = head.partition(b"\n")
    if _MESSAGES.match(head) and (not rest or first.rstrip().endswith(b"]")):
        return False
    second = rest.lstrip().partition(b"\n")[0].rstrip()
    is_array = head.startswith(b"[")
    try:
        parse_json(first.decode("utf-8").strip())
    except json.JSONDecodeError as error:
        is_object = second.startswith(b"{") and second.endswith(b"}")
        is_over = error.pos < len(error.doc)  # as in a text: there, the error is at its first quote
        return is_array or not (is_over or is_object or not second)
    except (ValueError, RecursionError):
        return is_array
    return is_array and not second.startswith(b"[")


def _json_items(stream: BinaryIO) -> Iterator[tuple[int, object]]:
    content = stream.read(ARRAY_LIMIT + 1)
    if len(content) > ARRAY_LIMIT:
        yield 1, BadRecord((f"file: is JSON over several lines of over {ARRAY_LIMIT / 10**9:g} GB; write it as JSONL",))
        return
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield content.count(b"\n", 0, error.start) + 1, _bad_json(error, "")
        return
    line = counted = 0
    for place, record in _split_items(text):
        line, counted = line + text.count("\n", counted, place), place
        yield line + 1, record


def _split_items(text: str) -> Iterator[tuple[int, object]]:
    """Yield (offset, item) of a JSON array, or of objects one after another, up to the first broken item."""
    place = _after_blanks(text, 0)
    is_array = text.startswith("[", place)
    place = _after_blanks(text, place + 1) if is_array else place
    is_over = text.startswith("]", place) if is_array else place == len(text)
    while not is_over:
        try:
            record, end = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            at = error.pos if isinstance(error, json.JSONDecodeError) else place
            yield at, _bad_json(error, f"fix the {'array' if is_array else 'object'}", f"; {_REST}")
            return
        yield place, record
        place = _after_blanks(text, end)
        is_over = text.startswith("]", place) if is_array else place == len(text)
        if is_array and not is_over:
            if not text.startswith(",", place):
                yield place, BadRecord((f"line: a comma or ] is missing; fix the array; {_REST}",))
                return
            place = _after_blanks(text, place + 1)
    if text[place + 1 :].strip():
        yield place, BadRecord(("line: there is text after the end of the JSON array; write a single array",))


def _after_blanks(text: str, place: int) -> int:
    while text.startswith((" ", "\t", "\r", "\n"), place):
        place += 1
    return place


def _csv_rows(stream: BinaryIO, delimiter: str) -> Iterator[tuple[int, object]]:
    """Yield rows as objects without their empty cells; the first row names the columns."""
    csv.field_size_limit(LINE_LIMIT)  # the default of 131,072 characters is too little for long documents
    rows = csv.reader(codecs.iterdecode(stream, "utf-8-sig"), delimiter=delimiter, strict=True)
    columns: list[str] = []
    following = 1
    try:
        for cells in filter(None, rows):
            line, following = rows.line_num - sum(cell.count("\n") for cell in cells), rows.line_num + 1
            if not columns:
                columns = [low if (low := cell.strip().lower()) in _KEYS else cell.strip() for cell in cells]
                if problem := _header_problem(columns):
                    yield line, BadRecord((f"file: {problem}",))
                    return
            elif len(cells) != len(columns):
                found = f"{count(len(cells), 'cell')} under {count(len(columns), 'column')}"
                yield line, BadRecord((f"line: has {found}; put quotes around a cell with the separator in it",))
            else:
                yield line, {name: cell for name, cell in zip(columns, cells, strict=True) if cell}
    except csv.Error as error:
        yield following, BadRecord((f"line: is invalid CSV ({error}); double the quotes in a cell; {_REST}",))
    except UnicodeDecodeError as error:
        yield rows.line_num + 1, _bad_json(error, "", f"; {_REST}")


def _header_problem(columns: list[str]) -> str | None:
    if twice := [name for name, n in Counter(columns).items() if n > 1]:
        return f"the column {quote(twice[0])} occurs twice; keep one"
    if not _KEYS.isdisjoint(columns):
        return None
    shown = ", ".join(map(quote, columns[:10]))
    remedy = "name them in the first line, such as user,bot"
    if len(columns) == 1 and (other := re.search(r"[,;\t]", columns[0])):
        remedy = f"the separator is {other[0]!r}: save .csv files with commas, .tsv files with tabs"
    return f"the columns are {shown}, and none of user, bot, instruction, output, messages …; {remedy}"


def _table_rows(path: Path, kind: str) -> Iterator[tuple[int, object]]:
    number = 0
    try:
        schema, rows = _open_table(path, kind)
        to_json = _converter(pyarrow.struct(list(schema)))
        for number, row in enumerate(rows, start=1):
            try:
                record = to_json(row)
            except ValueError as error:
                record = BadRecord((f"record: {error}; keep one",))
            yield number, record
    except (OverflowError, UnicodeDecodeError) as error:  # a time that Python cannot represent, or invalid UTF-8
        raise SaigaError(f"{path}, after row {number}: {error}. Remove the column with this value.") from None
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise SaigaError(f"{path} is a damaged {kind[1:].title()} file ({reason}); copy it again.") from None


def _open_table(path: Path, kind: str) -> tuple["pyarrow.Schema", Iterable[dict[str, Any]]]:
    if kind == ".arrow":
        table = datasets.Dataset.from_file(str(path))
        schema, batches = table.features.arrow_schema, table.data.to_batches(max_chunksize=_ROWS)
    else:
        from pyarrow import parquet

        file = parquet.ParquetFile(path, buffer_size=2**20)  # read piece by piece; without a buffer, all at once
        # In memory, each row may repeat all of its group; text is compressed to a twentieth at most.
        largest = max([1, *(file.metadata.row_group(index).total_byte_size for index in range(file.num_row_groups))])
        rows = max(1 if largest > 50 * path.stat().st_size else 8, min(_ROWS, 4 * LINE_LIMIT // largest))
        schema, batches = file.schema_arrow, file.iter_batches(batch_size=rows)

    def read() -> Iterator[dict[str, Any]]:
        for batch in batches:
            if batch.nbytes > batch.num_rows * LINE_LIMIT:
                raise SaigaError(f"{path} has records of more than {LINE_LIMIT // 10**6} MB; shorten or remove them.")
            yield from batch.to_pylist()

    return schema, read()


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
