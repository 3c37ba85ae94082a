"""Batches of texts from a file into a file, by the command as a user runs it."""

import json
import signal
import subprocess
import sys
import time

import pytest

from saigakit import infer
from saigakit.errors import SaigaError

SCHEMA = {"type": "array", "items": {"type": "string", "x-quote": True}, "minItems": 1, "maxItems": 2}
TEXTS = [f"Азот номер {number} — газ." for number in range(8)]


@pytest.fixture
def texts_file(tmp_path):
    lines = [json.dumps({"text": text} if index % 2 else text, ensure_ascii=False) for index, text in enumerate(TEXTS)]
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def lines_of(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


def test_every_text_gets_a_line(llm, texts_file, tmp_path):
    output = tmp_path / "answers.jsonl"
    assert infer.extract_file(llm, SCHEMA, texts_file, output) == {"value": 8, "error": 0}
    lines = {line["index"]: line for line in lines_of(output)}
    assert sorted(lines) == list(range(8))
    for index, line in lines.items():
        assert list(line) == ["index", "value", "quotes"]
        assert line["value"] == [TEXTS[index][quote["start"] : quote["end"]] for quote in line["quotes"]]
        assert line["value"] == infer.extract(llm, TEXTS[index], SCHEMA)


def test_the_next_call_answers_only_what_is_missing(llm, texts_file, tmp_path, monkeypatch, capsys):
    output = tmp_path / "answers.jsonl"
    infer.extract_file(llm, SCHEMA, texts_file, output)
    whole = output.read_bytes()
    cut = whole[: whole.rindex(b"\n", 0, -1) + 20]  # the last line is incomplete, as of a process that was killed
    output.write_bytes(cut)
    assert infer.extract_file(llm, SCHEMA, texts_file, output) == {"value": 8, "error": 0}
    assert output.read_bytes() == whole
    assert "half a line at the end is removed" in capsys.readouterr().out
    monkeypatch.setattr(infer.batch_file, "extract_all", None)  # nothing is asked any more
    assert infer.extract_file(llm, SCHEMA, texts_file, output) == {"value": 8, "error": 0}
    assert output.read_bytes() == whole


def test_a_bad_line_is_an_error_of_its_own(llm, tmp_path):
    file, output = tmp_path / "texts.jsonl", tmp_path / "answers.jsonl"
    file.write_text('"Азот — газ."\n{"question": 1}\nне JSON\n""\n{"text": "Кислород"}\n', encoding="utf-8")
    assert infer.extract_file(llm, SCHEMA, file, output) == {"value": 2, "error": 3}
    errors = {line["index"]: line["error"] for line in lines_of(output) if "error" in line}
    assert errors.keys() == {1, 2, 3}
    assert 'neither a JSON string nor an object with the string "text"' in errors[1] == errors[2]
    assert errors[3] == "The text is empty."


def test_a_file_with_a_mark_of_its_encoding_and_a_deep_line(llm, tmp_path):
    file, output = tmp_path / "texts.jsonl", tmp_path / "answers.jsonl"
    file.write_text('\ufeff"Азот — газ."\n' + "[" * 100_000 + "\n", encoding="utf-8")
    assert infer.extract_file(llm, SCHEMA, file, output) == {"value": 1, "error": 1}


def test_a_file_in_another_encoding_is_a_sentence(llm, tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_bytes('"Азот"\n'.encode("cp1251"))
    with pytest.raises(SaigaError, match=r"texts\.jsonl is not UTF-8 at byte 1: save it as UTF-8"):
        infer.extract_file(llm, SCHEMA, file, tmp_path / "answers.jsonl")


@pytest.mark.parametrize(
    "content",
    [
        '{"index": 0, "value": ["Кислород"], "quotes": [{"path": "/0", "start": 0, "end": 8}]}\n',
        '{"index": 0, "value": [], "quotes": []}\n',
        '{"index": 99, "error": "?"}\n',
        '{"something": "else"}\n',
        "другой файл\n",
    ],
)
def test_a_file_with_something_else_is_not_touched(llm, texts_file, tmp_path, content):
    output = tmp_path / "answers.jsonl"
    output.write_text(content, encoding="utf-8")
    with pytest.raises(SaigaError, match=r"answers\.jsonl holds something else than answers to these texts"):
        infer.extract_file(llm, SCHEMA, texts_file, output)
    assert output.read_text(encoding="utf-8") == content


def test_the_command_goes_on_after_it_was_killed(gguf_file, texts_file, tmp_path):
    schema, output = tmp_path / "schema.json", tmp_path / "answers.jsonl"
    schema.write_text(json.dumps({**SCHEMA, "items": {"type": "string"}}), encoding="utf-8")
    texts_file.write_text("".join(json.dumps(f"Азот номер {n}") + "\n" for n in range(130)), encoding="utf-8")
    arguments = ["extract", str(gguf_file), "--schema", str(schema), "--input", str(texts_file), "--quote", "x"]
    command = [sys.executable, "-m", "saigakit.cli", *arguments, "--output", str(output), "--n-ctx", "256"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stderr) == (1, "error: quotes: the schema has no property 'x'. It has none.\n")
    schema.write_text(json.dumps(SCHEMA), encoding="utf-8")
    command = [each for each in command if each not in ("--quote", "x")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        while not (output.is_file() and output.stat().st_size):
            assert child.poll() is None
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
    before = len(lines_of(output))
    assert 0 < before < 130
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"130 answers and 0 errors: {output}" in finished.stdout
    assert sorted(line["index"] for line in lines_of(output)) == list(range(130))
