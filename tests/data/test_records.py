"""Read lines, array items and Parquet rows, including broken ones."""

import gzip
import json
from datetime import date

import pyarrow
import pytest
from pyarrow import parquet

from saigakit.data import records
from saigakit.errors import SaigaError

RECORD = {"user": "Кто ты?", "bot": "Сайга."}
LINE = json.dumps(RECORD, ensure_ascii=False)


@pytest.fixture
def read(tmp_path):
    """Write a file and read its (line, record) pairs."""

    def read_content(content, name="records.jsonl"):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return list(records.read_records(tmp_path / name))

    return read_content


@pytest.fixture
def problems(read):
    """The problems of a file, each after its line number."""

    def of(content):
        bad = [(line, record) for line, record in read(content) if isinstance(record, records.BadRecord)]
        return [f"{line}: {problem}" for line, record in bad for problem in record.problems]

    return of


def test_a_json_array_is_read_like_lines(read):
    assert read(json.dumps([RECORD, {"id": 2}], indent=2), "records.json") == [(2, RECORD), (6, {"id": 2})]
    assert read(f"\ufeff [\r\n{LINE} ] \n", "records.json") == [(2, RECORD)]
    assert read("[ ]") == []


def test_reads_gzip_and_names_a_damaged_file(read):
    whole = gzip.compress(LINE.encode("utf-8"))
    assert read(whole, "records.jsonl.gz") == [(1, RECORD)]
    for damaged in (whole[:-9], b"plain text", whole[:12] + b"\xff" * 30):
        with pytest.raises(SaigaError, match=r"records\.jsonl\.gz is a damaged gzip file"):
            read(damaged, "records.jsonl.gz")


def test_accepts_a_byte_order_mark_carriage_returns_and_blank_lines(read):
    assert read(f"\ufeff{LINE}\r\n\r\n  \n{LINE}\r\n") == [(1, RECORD), (4, RECORD)]
    assert read(LINE) == [(1, RECORD)]  # no end of line at the end


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"user": "a", "bot": "b"', "line: is invalid JSON (Expecting ',' delimiter, column 25)"),
        (b'{"user": "a", "bot": "b"} {}', "line: is invalid JSON (Extra data"),
        (b"{'user': 'a'}", "line: is invalid JSON"),
        (b'{"user": "a", "bot": "b", "bot": "c"}', "the key 'bot' occurs twice"),
        (b'{"messages": [{"role": "user", "role": "bot"}]}', "the key 'role' occurs twice"),
        ('{"user": "Кто?"}'.encode("cp1251"), "line: is not UTF-8 (byte 0xca); save the file as UTF-8"),
        (b'{"user": ' + b"[" * 100_000 + b"}", "line: is nested too deeply"),
        (b'{"user": ' + b"1" * 5000 + b"}", "line: is invalid JSON (Exceeds the limit"),
    ],
)
def test_names_a_bad_line_and_reads_the_next_one(read, problems, line, expected):
    content = b"\n".join([LINE.encode("utf-8"), line, LINE.encode("utf-8")])
    assert [number for number, record in read(content) if record == RECORD] == [1, 3]
    assert len(problems(content)) == 1
    assert problems(content)[0].startswith("2: ")
    assert expected in problems(content)[0]


def test_names_a_line_over_the_limit_and_reads_the_next_one(read, problems):
    content = b'{"user": "' + b"x" * records.LINE_LIMIT + b'"}\n' + LINE.encode("utf-8")
    assert problems(content) == ["1: line: is longer than 100 MB; write one record per line"]
    assert read(content)[1] == (2, RECORD)


def test_reads_a_line_of_exactly_the_limit(read, problems, monkeypatch):
    monkeypatch.setattr(records, "LINE_LIMIT", len(LINE.encode("utf-8")))
    assert read(f"{LINE}\n{LINE}\n{LINE}") == [(1, RECORD), (2, RECORD), (3, RECORD)]
    monkeypatch.setattr(records, "LINE_LIMIT", len(LINE.encode("utf-8")) - 1)
    assert len(problems(f"{LINE}\n{LINE}")) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[\n{"a": 1},\n]', "3: line: is invalid JSON"),
        ('[\n{"a": 1}\n{"a": 1}]', "3: line: a comma or ] is missing"),
        ('[\n{"a": 1},\n{"a": ', "3: line: is invalid JSON"),
        ('[\n{"a": 1}\n', "3: line: a comma or ] is missing"),
        ('[{"a": 1}]\n{}', "1: line: there is text after the end"),
        ('[\n\n{"a": 1, "a": 2}]', "3: line: is invalid JSON (the key 'a' occurs twice)"),
    ],
)
def test_problems_of_a_json_array_have_line_numbers(problems, text, expected):
    assert len(problems(text)) == 1
    assert problems(text)[0].startswith(expected)


def test_names_the_line_of_a_json_array_in_another_encoding(problems):
    assert problems('[\n{"user": "Кто?"}]'.encode("cp1251"))[0].startswith("2: line: is not UTF-8")


def test_rejects_a_json_array_over_the_limit(problems, monkeypatch):
    monkeypatch.setattr(records, "ARRAY_LIMIT", 20)
    assert "write it as JSONL" in problems(json.dumps([RECORD]))[0]


def test_a_quoted_key_is_short_and_printable():
    assert records.quote("к" * 100) == repr("к" * 40 + "…")
    assert records.quote("\ud800\n").isprintable()


@pytest.fixture
def read_table(tmp_path):
    """Write a Parquet file and read its (row, record) pairs."""

    def read_columns(columns, name="records.parquet", **options):
        parquet.write_table(pyarrow.table(columns), tmp_path / name, **options)
        return list(records.read_records(tmp_path / name))

    return read_columns


def test_reads_the_rows_of_a_parquet_file_with_their_numbers(read_table):
    rows = [RECORD, {"user": "б", "bot": "в"}]
    columns = {"user": [row["user"] for row in rows], "bot": [row["bot"] for row in rows]}
    assert read_table(columns) == [(1, rows[0]), (2, rows[1])]


def test_recognises_parquet_by_its_content(read_table):
    assert read_table({"user": ["а"]}, name="part-0") == [(1, {"user": "а"})]


def test_rows_of_several_row_groups_keep_their_order(read_table):
    read = read_table({"user": [str(index) for index in range(1000)]}, row_group_size=300)
    assert read == [(index + 1, {"user": str(index)}) for index in range(1000)]


def test_fields_that_arrow_fills_with_null_are_absent_at_every_depth(read_table):
    calls = [{"name": "погода", "arguments": {"город": "Томск"}}, {"name": "время", "arguments": {"пояс": 7}}]
    messages = [[{"role": "assistant", "calls": calls}], [{"role": "user", "content": "а"}]]
    assert read_table({"messages": messages, "system": [None, "Кратко."]}) == [
        (1, {"messages": messages[0]}),
        (2, {"messages": messages[1], "system": "Кратко."}),
    ]


def test_a_null_in_a_list_is_kept(read_table):
    assert read_table({"tags": [["а", None]]}) == [(1, {"tags": ["а", None]})]


def test_a_map_is_an_object_even_if_empty(read_table):
    kind = pyarrow.list_(pyarrow.struct([("arguments", pyarrow.map_(pyarrow.string(), pyarrow.string()))]))
    column = pyarrow.array([[{"arguments": [("а", "б"), ("в", None)]}, {"arguments": []}]], kind)
    assert read_table({"calls": column}) == [(1, {"calls": [{"arguments": {"а": "б"}}, {"arguments": {}}]})]


def test_a_duplicate_key_of_a_map_is_a_problem(read_table):
    column = pyarrow.array([[("а", "б"), ("а", "в")]], pyarrow.map_(pyarrow.string(), pyarrow.string()))
    (_, bad), (_, good) = read_table({"arguments": pyarrow.chunked_array([column, column.slice(0, 0), [[("а", "б")]]])})
    assert bad.problems == ("record: the key 'а' occurs twice; keep one",)
    assert good == {"arguments": {"а": "б"}}


def test_long_texts_and_other_types_become_python_values(read_table):
    text = "к" * 200_000
    columns = {"user": pyarrow.array([text], pyarrow.large_string()), "day": [date(2024, 1, 2)], "score": [0.5]}
    assert read_table(columns) == [(1, {"user": text, "day": date(2024, 1, 2), "score": 0.5})]


@pytest.mark.parametrize("damaged", [lambda whole: whole[:-20], lambda whole: b"{}", lambda whole: b""])
def test_an_error_names_a_damaged_parquet_file(read_table, read, tmp_path, damaged):
    read_table({"user": ["а"] * 100})
    whole = (tmp_path / "records.parquet").read_bytes()
    with pytest.raises(SaigaError, match=r"records\.parquet is a damaged Parquet file"):
        read(damaged(whole), "records.parquet")


def test_an_error_names_a_parquet_file_damaged_in_the_middle(read_table, read, tmp_path):
    read_table({"user": [str(index) * 50 for index in range(5000)]}, compression="zstd")
    whole = bytearray((tmp_path / "records.parquet").read_bytes())
    whole[1000:3000] = bytes(2000)
    with pytest.raises(SaigaError, match=r"records\.parquet is a damaged Parquet file"):
        read(bytes(whole), "records.parquet")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("records.jsonl.zst", "decompress it with `zstd -d`"),
        ("records.csv", "is a table; convert it to JSONL or Parquet"),
        ("records.csv.gz", "is a table"),
        ("records.XLSX", "is a table"),
        ("records.zip", "is an archive; unpack it"),
        ("records.parquet.gz", "decompress it with `gunzip`"),
    ],
)
def test_rejects_other_kinds_of_files_with_a_remedy(read, name, remedy):
    with pytest.raises(SaigaError) as caught:
        read(LINE, name)
    assert name in str(caught.value)
    assert remedy in str(caught.value)


@pytest.mark.parametrize("name", ["records.txt", "records", "records.csv.jsonl", "my.zip.json"])
def test_accepts_any_other_name(read, name):
    assert read(LINE, name) == [(1, RECORD)]
