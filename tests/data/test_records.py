"""Lines and items of a file, the broken ones among them."""

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
    """Content of a file into its (line, record) pairs."""

    def read_content(content, name="records.jsonl"):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return list(records.read(tmp_path / name))

    return read_content


@pytest.fixture
def problems(read):
    """The problems of a file, each with its line."""

    def of(content):
        bad = [(line, record) for line, record in read(content) if isinstance(record, records.Bad)]
        return [f"{line}: {problem}" for line, record in bad for problem in record.problems]

    return of


def test_a_json_array_is_read_like_lines(read):
    assert read(json.dumps([RECORD, {"id": 2}], indent=2), "records.json") == [(2, RECORD), (6, {"id": 2})]
    assert read(f"\ufeff [\r\n{LINE} ] \n", "records.json") == [(2, RECORD)]
    assert read("[ ]") == []


def test_a_gzipped_file_is_read_and_a_damaged_one_is_an_error_with_its_name(read):
    whole = gzip.compress(LINE.encode("utf-8"))
    assert read(whole, "records.jsonl.gz") == [(1, RECORD)]
    for damaged in (whole[:-9], b"plain text", whole[:12] + b"\xff" * 30):
        with pytest.raises(SaigaError, match=r"records\.jsonl\.gz is not a whole gzip file"):
            read(damaged, "records.jsonl.gz")


def test_a_byte_order_mark_carriage_returns_and_blank_lines_are_fine(read):
    assert read(f"\ufeff{LINE}\r\n\r\n  \n{LINE}\r\n") == [(1, RECORD), (4, RECORD)]
    assert read(LINE) == [(1, RECORD)]  # no end of line at the end


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"user": "a", "bot": "b"', "line: is broken JSON (Expecting ',' delimiter, column 25)"),
        (b'{"user": "a", "bot": "b"} {}', "line: is broken JSON (Extra data"),
        (b"{'user': 'a'}", "line: is broken JSON"),
        (b'{"user": "a", "bot": "b", "bot": "c"}', "the key 'bot' is there twice"),
        (b'{"messages": [{"role": "user", "role": "bot"}]}', "the key 'role' is there twice"),
        ('{"user": "Кто?"}'.encode("cp1251"), "line: is not UTF-8 (byte 0xca); save the file as UTF-8"),
        (b'{"user": ' + b"[" * 100_000 + b"}", "line: is nested too deeply"),
        (b'{"user": ' + b"1" * 5000 + b"}", "line: is broken JSON (Exceeds the limit"),
    ],
)
def test_a_bad_line_is_named_and_the_next_one_is_read(read, problems, line, expected):
    content = b"\n".join([LINE.encode("utf-8"), line, LINE.encode("utf-8")])
    assert [number for number, record in read(content) if record == RECORD] == [1, 3]
    assert len(problems(content)) == 1
    assert problems(content)[0].startswith("2: ")
    assert expected in problems(content)[0]


def test_a_line_over_the_limit_is_named_and_the_next_one_is_read(read, problems):
    content = b'{"user": "' + b"x" * records.LINE_LIMIT + b'"}\n' + LINE.encode("utf-8")
    assert problems(content) == ["1: line: is longer than 100 MB; write one record on each line"]
    assert read(content)[1] == (2, RECORD)


def test_a_line_of_just_the_limit_is_read(read, problems, monkeypatch):
    monkeypatch.setattr(records, "LINE_LIMIT", len(LINE.encode("utf-8")))
    assert read(f"{LINE}\n{LINE}\n{LINE}") == [(1, RECORD), (2, RECORD), (3, RECORD)]
    monkeypatch.setattr(records, "LINE_LIMIT", len(LINE.encode("utf-8")) - 1)
    assert len(problems(f"{LINE}\n{LINE}")) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[\n{"a": 1},\n]', "3: line: is broken JSON"),
        ('[\n{"a": 1}\n{"a": 1}]', "3: line: a comma or ] is missing"),
        ('[\n{"a": 1},\n{"a": ', "3: line: is broken JSON"),
        ('[\n{"a": 1}\n', "3: line: a comma or ] is missing"),
        ('[{"a": 1}]\n{}', "1: line: there is text after the end"),
        ('[\n\n{"a": 1, "a": 2}]', "3: line: is broken JSON (the key 'a' is there twice)"),
    ],
)
def test_problems_of_a_json_array_have_lines_too(problems, text, expected):
    assert len(problems(text)) == 1
    assert problems(text)[0].startswith(expected)


def test_a_json_array_in_another_encoding_is_named(problems):
    assert problems('[\n{"user": "Кто?"}]'.encode("cp1251"))[0].startswith("2: line: is not UTF-8")


def test_a_json_array_over_the_limit_is_refused(problems, monkeypatch):
    monkeypatch.setattr(records, "ARRAY_LIMIT", 20)
    assert "write it as JSONL" in problems(json.dumps([RECORD]))[0]


def test_a_name_in_a_message_is_short_and_printable():
    assert records.named("к" * 100) == repr("к" * 40 + "…")
    assert records.named("\ud800\n").isprintable()


@pytest.fixture
def read_table(tmp_path):
    """Columns into the (row, record) pairs of a Parquet file."""

    def read_columns(columns, name="records.parquet", **options):
        parquet.write_table(pyarrow.table(columns), tmp_path / name, **options)
        return list(records.read(tmp_path / name))

    return read_columns


def test_rows_of_a_parquet_file_are_records_with_their_number(read_table):
    rows = [RECORD, {"user": "б", "bot": "в"}]
    columns = {"user": [row["user"] for row in rows], "bot": [row["bot"] for row in rows]}
    assert read_table(columns) == [(1, rows[0]), (2, rows[1])]


def test_a_parquet_file_is_known_by_its_content(read_table):
    assert read_table({"user": ["а"]}, name="part-0") == [(1, {"user": "а"})]


def test_many_rows_in_many_row_groups_keep_their_order(read_table):
    read = read_table({"user": [str(index) for index in range(1000)]}, row_group_size=300)
    assert read == [(index + 1, {"user": str(index)}) for index in range(1000)]


def test_what_arrow_fills_with_null_is_absent_at_every_depth(read_table):
    calls = [{"name": "погода", "arguments": {"город": "Томск"}}, {"name": "время", "arguments": {"пояс": 7}}]
    messages = [[{"role": "assistant", "calls": calls}], [{"role": "user", "content": "а"}]]
    assert read_table({"messages": messages, "system": [None, "Кратко."]}) == [
        (1, {"messages": messages[0]}),
        (2, {"messages": messages[1], "system": "Кратко."}),
    ]


def test_a_null_in_a_list_stays(read_table):
    assert read_table({"tags": [["а", None]]}) == [(1, {"tags": ["а", None]})]


def test_a_map_is_an_object_also_where_it_is_empty(read_table):
    kind = pyarrow.list_(pyarrow.struct([("arguments", pyarrow.map_(pyarrow.string(), pyarrow.string()))]))
    column = pyarrow.array([[{"arguments": [("а", "б"), ("в", None)]}, {"arguments": []}]], kind)
    assert read_table({"calls": column}) == [(1, {"calls": [{"arguments": {"а": "б"}}, {"arguments": {}}]})]


def test_a_key_that_a_map_has_twice_is_a_problem(read_table):
    column = pyarrow.array([[("а", "б"), ("а", "в")]], pyarrow.map_(pyarrow.string(), pyarrow.string()))
    (_, bad), (_, good) = read_table({"arguments": pyarrow.chunked_array([column, column.slice(0, 0), [[("а", "б")]]])})
    assert bad.problems == ("record: the key 'а' is there twice; keep one",)
    assert good == {"arguments": {"а": "б"}}


def test_long_texts_and_other_types_come_as_python_has_them(read_table):
    text = "к" * 200_000
    columns = {"user": pyarrow.array([text], pyarrow.large_string()), "day": [date(2024, 1, 2)], "score": [0.5]}
    assert read_table(columns) == [(1, {"user": text, "day": date(2024, 1, 2), "score": 0.5})]


@pytest.mark.parametrize("damaged", [lambda whole: whole[:-20], lambda whole: b"{}", lambda whole: b""])
def test_a_damaged_parquet_file_is_an_error_with_its_name(read_table, read, tmp_path, damaged):
    read_table({"user": ["а"] * 100})
    whole = (tmp_path / "records.parquet").read_bytes()
    with pytest.raises(SaigaError, match=r"records\.parquet is not a whole Parquet file"):
        read(damaged(whole), "records.parquet")


def test_a_parquet_file_damaged_in_the_middle_is_an_error_with_its_name(read_table, read, tmp_path):
    read_table({"user": [str(index) * 50 for index in range(5000)]}, compression="zstd")
    whole = bytearray((tmp_path / "records.parquet").read_bytes())
    whole[1000:3000] = bytes(2000)
    with pytest.raises(SaigaError, match=r"records\.parquet is not a whole Parquet file"):
        read(bytes(whole), "records.parquet")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("records.jsonl.zst", "unpack it with `zstd -d`"),
        ("records.csv", "is a table; write it as JSONL or Parquet"),
        ("records.csv.gz", "is a table"),
        ("records.XLSX", "is a table"),
        ("records.zip", "is an archive; unpack it"),
        ("records.parquet.gz", "unpack it with `gunzip`"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_what_to_do(read, name, said):
    with pytest.raises(SaigaError) as caught:
        read(LINE, name)
    assert name in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["records.txt", "records", "records.csv.jsonl", "my.zip.json"])
def test_any_other_name_does_not_matter(read, name):
    assert read(LINE, name) == [(1, RECORD)]
