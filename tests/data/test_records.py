"""Read lines, array items and Parquet rows, including broken ones."""

import bz2
import gzip
import json
import lzma
from datetime import date

import pyarrow
import pytest
from datasets import Dataset
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

    def of(content, name="records.jsonl"):
        bad = [(line, record) for line, record in read(content, name) if isinstance(record, records.BadRecord)]
        return [f"{line}: {problem}" for line, record in bad for problem in record.problems]

    return of


def test_a_json_array_is_read_like_lines(read):
    assert read(json.dumps([RECORD, {"id": 2}], indent=2), "records.json") == [(2, RECORD), (6, {"id": 2})]
    assert read(f"\ufeff [\r\n{LINE} ] \n", "records.json") == [(2, RECORD)]
    assert read("[ ]") == []


def test_reads_gzip_and_names_a_damaged_file(read):
    whole = gzip.compress(LINE.encode("utf-8"), mtime=0)
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
    assert problems(content) == ["1: line: is longer than 16 MB; write one record per line"]
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
    assert problems('[\n{"user": "Кто?"}]'.encode("cp1251"))[0].startswith("2: file: looks like cp1251, not UTF-8")


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
        ("records.XLSX", "is a table of Excel; save it as CSV in UTF-8"),
        ("records.zip", "is an archive; unpack it"),
        ("records.jsonl.xz", "decompress it with `xz -d`"),
        ("records.jsonl.bz2", "decompress it with `bunzip2`"),
        ("records.parquet.gz", "decompress it with `gunzip`"),
        ("records.parquet.zst", "decompress it with `zstd -d`"),
    ],
)
def test_rejects_other_kinds_of_files_with_a_remedy(read, name, remedy):
    with pytest.raises(SaigaError) as caught:
        read(LINE, name)
    assert name in str(caught.value)
    assert remedy in str(caught.value)


def zstd(text):
    return pyarrow.compress(text.encode("utf-8"), codec="zstd", asbytes=True)


@pytest.mark.parametrize(
    "content",
    [
        zstd(f"{LINE}\n{LINE}"),
        b"".join([zstd(f"{LINE}\n"), zstd(LINE[:9]), zstd(LINE[9:])]),  # one frame per record, as appending tools write
        b"\x50\x2a\x4d\x18\x04\x00\x00\x00size" + zstd(f"{LINE}\n{LINE}"),  # pzstd begins with a skippable frame
    ],
)
def test_reads_zstd_with_any_number_of_frames(read, content):
    assert read(content, "records.jsonl.zst") == [(1, RECORD), (2, RECORD)]


def test_reads_arrays_and_tables_in_zstd(read):
    assert read(zstd(json.dumps([RECORD])), "records.json.zst") == [(1, RECORD)]
    assert read(zstd("user,bot\nа,б"), "records.csv.zst") == [(2, {"user": "а", "bot": "б"})]


@pytest.mark.parametrize("damaged", [zstd(LINE)[:-3], b"plain text", zstd(LINE) + b"and more text", zstd(LINE)[:9]])
def test_an_error_names_a_damaged_zstd_file(read, damaged):
    with pytest.raises(SaigaError, match=r"records\.jsonl\.zst is a damaged zstd file \(.*\); copy it again"):
        read(damaged, "records.jsonl.zst")


def test_recognises_compression_by_the_first_bytes(read):
    for packed in (gzip.compress(LINE.encode("utf-8"), mtime=0), zstd(LINE)):
        assert read(packed, "records.jsonl") == [(1, RECORD)]
    assert read(zstd(LINE), "records.jsonl.gz") == [(1, RECORD)]


@pytest.mark.parametrize(
    ("packed", "remedy"),
    [
        (lzma.compress(LINE.encode("utf-8")), "is compressed with xz; decompress it with `xz -d`"),
        (bz2.compress(LINE.encode("utf-8")), "is compressed with bzip2"),
        (b"PK\x03\x04" + bytes(30), "is an archive; unpack it"),
        (gzip.compress(b"PK\x03\x04" + bytes(30), mtime=0), "is an archive; unpack it"),
        (gzip.compress(b"PAR1" + bytes(30), mtime=0), "a compressed parquet file; decompress it"),
        (gzip.compress(zstd(LINE), mtime=0), "is compressed twice"),
    ],
    ids=["xz", "bzip2", "zip", "zip in gzip", "Parquet in gzip", "zstd in gzip"],
)
def test_rejects_other_compression_by_the_first_bytes(read, packed, remedy):
    with pytest.raises(SaigaError, match=r"records\.jsonl is ") as caught:
        read(packed, "records.jsonl")
    assert remedy in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "user,bot\nа,б\n", [(2, {"user": "а", "bot": "б"})]),
        ("a.CSV", "\ufeffuser,bot\r\nа,б\r\n\r\nв,г", [(2, {"user": "а", "bot": "б"}), (4, {"user": "в", "bot": "г"})]),
        ("a.tsv", "user\tbot\nа, б\tв", [(2, {"user": "а, б", "bot": "в"})]),
        (
            "a.csv",
            'user,bot\n"а\n\nб","в ""г"", д"\nе,ж',
            [(2, {"user": "а\n\nб", "bot": 'в "г", д'}), (5, {"user": "е", "bot": "ж"})],
        ),
        (
            "a.csv",
            ",instruction,input,output\n0,а,,б",
            [(2, {"": "0", "instruction": "а", "output": "б"})],
        ),
        (
            "a.csv",
            f'id,messages\n1,"{json.dumps([RECORD]).replace(chr(34), chr(34) * 2)}"',
            [(2, {"id": "1", "messages": json.dumps([RECORD])})],
        ),
        ("a.csv", "user,bot\n" + "к" * 200_000 + ",б", [(2, {"user": "к" * 200_000, "bot": "б"})]),
        ("a.csv", "", []),
        ("a.csv", "User, BOT ,Id\nа,б,1", [(2, {"user": "а", "bot": "б", "Id": "1"})]),
    ],
)
def test_reads_tables_with_a_header(read, name, content, expected):
    assert read(content, name) == expected


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "user,bot\nа,б,в\nг,д", ["2: line: has 3 cells under 2 columns; put quotes around a cell"]),
        ("a.csv", "user,bot\nа\nб", ["2: line: has 1 cell under 2 columns", "3: line: has 1 cell under"]),
        ("a.csv", "title,url\nа,б\nв,г", ["1: file: the columns are 'title', 'url', and none of user, bot, instr"]),
        ("a.csv", "user;bot\nа;б\nв;г", ["the separator is ';': save .csv files with commas, .tsv files with tabs"]),
        ("a.tsv", "user,bot\nа,б", ["the separator is ',': "]),
        ("a.csv", "user,bot,user\nа,б,в", ["1: file: the column 'user' occurs twice; keep one"]),
        ("a.csv", 'user,bot\nа,б\n"в,г\nд,е', ["3: line: is invalid CSV (unexpected end of data); double the quotes"]),
        ("a.csv", 'user,bot\n"а"б,в\nд,е', ["2: line: is invalid CSV"]),
        ("a.csv", "user,bot\nа,б\nв,г\n".encode() + b"\xff,\xff\n" * 9, ["4: line: is not UTF-8 (byte 0xff); save"]),
        ("a.csv", "user;bot\nПривет;Ответ\n".encode("cp1251"), ["2: file: looks like cp1251"]),
        ("a.csv", "user\tbot\nа\tб\n".encode("utf-16"), ["1: file: looks like utf-16"]),  # Excel's "Unicode text"
    ],
)
def test_problems_of_tables_have_line_numbers(problems, name, content, expected):
    found = problems(content, name)
    assert len(found) == len(expected)
    assert all(part in problem for part, problem in zip(expected, found, strict=True)), found


PRETTY = json.dumps(RECORD, ensure_ascii=False, indent=2)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (PRETTY, [(1, RECORD)]),
        (f"\ufeff{PRETTY}\r\n{PRETTY}\n\n{PRETTY}{LINE}", [(1, RECORD), (5, RECORD), (10, RECORD), (13, RECORD)]),
        ('{"user": "а",\n "bot": "б"}', [(1, {"user": "а", "bot": "б"})]),
        (
            '{"messages": [\n{"role": "user"},\n{"role": "bot"}\n]}\n{}',
            [(1, {"messages": [{"role": "user"}, {"role": "bot"}]}), (5, {})],
        ),
        ('{"a":\n\n 1}', [(1, {"a": 1})]),
    ],
)
def test_reads_objects_over_several_lines(read, content, expected):
    assert read(content) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('[{"a": 1}]\n[{"a": 2}, {"a": 3}]\n', [(1, [{"a": 1}]), (2, [{"a": 2}, {"a": 3}])]),
        ('[{"a": 1},\n {"a": 2}]\n', [(1, {"a": 1}), (2, {"a": 2})]),
        ('[{"a": 1}]\n', [(1, {"a": 1})]),  # one line is an array of records
        ('[{"role": "user"}, {}]\n', [(1, [{"role": "user"}, {}])]),  # unless they are messages
        (f'[{{"from": "{"я" * 2**16}"}}]\n[{{"a": 2}}]', [(1, [{"from": "я" * 2**16}]), (2, [{"a": 2}])]),
        ('[{"role": "user"},\n {}]\n', [(1, {"role": "user"}), (2, {})]),
    ],
)
def test_lists_in_lines_are_records(read, content, expected):
    assert read(content) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (f"{PRETTY}\n{PRETTY[:-20]}\n{PRETTY}\n{PRETTY}", "; fix the object; the rest of the file was not read"),
        (
            f"{PRETTY},\n{PRETTY},\n{PRETTY}",
            "(Expecting value, column 2); remove the comma after",
        ),
        ('{\n"user": "а",\n"bot": "б",\n}\n', "remove the comma before the bracket; the rest of the file was not read"),
        (
            f"{PRETTY}\n\ufeff{PRETTY}",
            "5: line: is invalid JSON (Expecting value, column 1); remove the byte",
        ),
        ('{\n"a": 1,\n"a": 2\n}\n{}', "1: line: is invalid JSON (the key 'a' occurs twice); keep one"),
    ],
)
def test_broken_objects_over_several_lines_are_one_problem(problems, content, expected):
    (problem,) = problems(content)
    assert expected in problem


@pytest.mark.parametrize(
    "first",
    [
        '{"user": "а", "bot": "б"',
        '{"user": "а",',
        '{"user":',
        '{"messages": [',
        '{"messages": [{"role": "user"},',
        "{",
        '{"user": "а',
        "{'user': 'а'}",
        '{"user": "а", "user": "б"}',
    ],
)
def test_a_damaged_first_line_of_jsonl_does_not_hide_the_others(read, problems, first):
    content = f"{first}\n{LINE}\n{LINE}"
    assert [number for number, record in read(content) if record == RECORD] == [2, 3]
    assert len(problems(content)) == 1 and problems(content)[0].startswith("1: line: ")


def test_a_line_end_in_a_text_does_not_hide_the_other_lines(read, problems):
    content = f'{{"user": "а\nб", "bot": "в"}}\n{LINE}'
    assert read(content)[2] == (3, RECORD) and len(problems(content)) == 2


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ('{"user": "а",}', "remove the comma before the bracket"),
        ('{"messages": [1, ]}', "remove the comma before the bracket"),
        (f"{LINE},", "remove the comma after the object, or put [ ] around all objects"),
        (f"\ufeff{LINE}", "remove the byte order mark (U+FEFF) that joining files has left in front of it"),
        (f"{LINE}\ufeff{LINE}", "remove the byte order mark"),
        (str(RECORD), "this is Python, not JSON: write it with json.dumps"),
        ('{"user": None}', "this is Python, not JSON"),
        ("{\"user\": 'а'}", "this is Python, not JSON"),
        ('{"user": "а", ', "write one complete JSON object per line"),
        (f"{LINE} {LINE}", "write one complete JSON object per line"),
        ('{"user": "а", "bot": "б", "bot": "в"}', "keep one"),
    ],
)
def test_the_remedy_fits_the_mistake(read, problems, line, remedy):
    assert problems(f"{LINE}\n{line}\n{LINE}") == [problems(f"{LINE}\n{line}")[0]]
    assert problems(f"{LINE}\n{line}")[0].startswith("2: line: is invalid JSON (")
    assert problems(f"{LINE}\n{line}")[0].endswith(f"; {remedy}") or remedy in problems(f"{LINE}\n{line}")[0]


@pytest.mark.parametrize(
    ("encoding", "remedy"),
    [
        ("utf-16", "looks like utf-16, not UTF-8; save it as UTF-8, for example with `iconv -f utf-16 -t utf-8`"),
        ("utf-16le", "`iconv -f utf-16le -t utf-8`"),
        ("utf-16be", "`iconv -f utf-16be -t utf-8`"),
        ("cp1251", "looks like cp1251, not UTF-8; save it as UTF-8, for example with `iconv -f cp1251 -t utf-8`"),
        ("koi8-r", "`iconv -f koi8-r -t utf-8`"),
        ("cp866", "`iconv -f cp866 -t utf-8`"),
    ],
)
@pytest.mark.parametrize("layout", [lambda text: f"{text}\n" * 50, lambda text: f"[{text},\n{text}]"])
def test_names_another_encoding_once_per_file(problems, encoding, remedy, layout):
    text = json.dumps({"user": "Как зовут кота?", "bot": "Его зовут Матроскин."}, ensure_ascii=False)
    (problem,) = problems(layout(text).encode(encoding))
    assert problem.startswith("1: file: ") and remedy in problem


def test_names_the_first_line_in_another_encoding(problems):
    content = "{}\n{}\n" + '{"user": "Как зовут кота?"}\n' * 3
    assert problems(content.encode("cp1251"))[0].startswith("3: file: looks like cp1251")


@pytest.mark.parametrize("text", ["été déjà là", "über größer"])
def test_does_not_guess_an_encoding_that_is_not_russian(problems, text):
    assert problems(f'{{"user": "{text}"}}'.encode("latin-1"))[0].startswith("1: line: is not UTF-8 (byte 0x")


def test_half_a_letter_at_the_end_of_the_head_is_still_utf8(read):
    for shift in range(2):
        record = {"user": "a" * shift + "к" * 70_000}
        assert read(json.dumps(record, ensure_ascii=False)) == [(1, record)]


def test_reads_a_saved_data_set_without_the_nulls_that_fill_it(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "а"}], "system": "б"},
        {"messages": [{"role": "user", "content": "а"}, {"role": "assistant", "content": "в", "weight": 1}]},
    ]
    Dataset.from_list(rows * 300).save_to_disk(tmp_path / "saved")
    read = list(records.read_records(tmp_path / "saved" / "data-00000-of-00001.arrow"))
    assert read == [(number + 1, rows[number % 2]) for number in range(600)]


def test_an_error_names_a_damaged_arrow_file(tmp_path):
    Dataset.from_list([RECORD] * 100).save_to_disk(tmp_path / "saved")
    file = tmp_path / "saved" / "data-00000-of-00001.arrow"
    whole = file.read_bytes()
    for damaged in (whole[:-200], b"{}", b""):
        file.write_bytes(damaged)
        with pytest.raises(SaigaError, match=r"\.arrow is a damaged Arrow file"):
            list(records.read_records(file))


@pytest.mark.parametrize("name", ["records.txt", "records", "records.csv.jsonl", "my.zip.json", "my.csv.txt"])
def test_accepts_any_other_name(read, name):
    assert read(LINE, name) == [(1, RECORD)]
