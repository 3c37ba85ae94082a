"""Lines and items of a file, the broken ones among them."""

import gzip
import json
import zlib

import pytest

from saigakit import records

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


def test_a_gzipped_file_is_read_and_a_cut_one_raises(read):
    whole = gzip.compress(LINE.encode("utf-8"))
    assert read(whole, "records.jsonl.gz") == [(1, RECORD)]
    for damaged in (whole[:-9], b"plain text", whole[:12] + b"\xff" * 30):
        with pytest.raises((EOFError, gzip.BadGzipFile, zlib.error)):
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
