"""What reaches a terminal: text from files and other machines without control characters."""

import json
import os
import re
import struct
import subprocess
import sys
from contextlib import closing

import pytest
import small_notebooks
from terminal_output import control_characters, run_on_terminal

from saigakit import export, infer
from saigakit.cli import execution
from saigakit.registry import MODELS

CLI = ("-m", "saigakit.cli")
TITLE, CLIPBOARD = "\x1b]0;evil\x07", "\x1b]52;c;ZXZpbA==\x07"
HIDDEN = f"{TITLE}{CLIPBOARD}\x9b31m\x08\x7f\u202eabc\u2066"


def record(question, answer, **more):
    return json.dumps({"user": question, "bot": answer, **more}, ensure_ascii=False) + "\n"


@pytest.fixture(scope="module")
def evil_gguf(tiny, tmp_path_factory):
    """Its system prompt and the tokens of an answer contain escape sequences."""
    file = export.to_gguf(
        model="saiga_tiny", adapter="released", output=tmp_path_factory.mktemp("gguf") / "m.gguf", quant_type="Q8_0"
    )
    system = MODELS["saiga_tiny"].system_prompt.encode()
    content = file.read_bytes().replace(system, TITLE.encode().ljust(len(system)))
    with closing(infer.load(file, n_ctx=256)) as llm:
        texts = {llm._model.token_get_text(token).encode() for token in range(llm.n_vocab())}
    for number, text in enumerate(sorted(text for text in texts if len(text) >= 8 and not text.isascii())):
        new = f"\x1b]{number};\x07".encode().ljust(len(text), b"x")  # tokens must differ
        content = content.replace(struct.pack("<Q", len(text)) + text, struct.pack("<Q", len(text)) + new)
    file.write_bytes(content)
    return file


def chat(file, **options):
    return [*CLI, "chat", file, "--temperature", "0", "--n-ctx", "256"]


def test_an_answer_and_a_system_prompt_lose_their_escape_sequences_on_a_terminal(evil_gguf):
    written = run_on_terminal(*chat(evil_gguf), answers="Привет\n")
    assert b"system: " in written and b"]0;evil" in written
    assert re.search(rb"\n.*\]\d+;", written)
    assert control_characters(written) == set()


def test_an_answer_in_a_pipe_is_exact(evil_gguf):
    command = [sys.executable, *map(str, chat(evil_gguf))]
    done = subprocess.run(command, input="Привет\n".encode(), capture_output=True, check=True, timeout=60)
    assert re.search(rb"\x1b\]\d+;\x07", done.stdout)
    assert b"]0;evil" in done.stderr and control_characters(done.stderr) == set()


@pytest.mark.slow
def test_check_shows_records_and_file_names_without_control_characters(tmp_path):
    directory = tmp_path / f"a{TITLE}b"
    directory.mkdir()
    text = record("Кто ты? " + HIDDEN, f"Я\tСайга.\n👨‍👩‍👧 {HIDDEN}", **{f"key{HIDDEN}": "1"})
    (directory / f"one{CLIPBOARD}.jsonl").write_text(text, encoding="utf-8")
    written = run_on_terminal(*CLI, "check", directory, "--model", "saiga_tiny", env={**os.environ, "COLUMNS": "100"})
    assert b"]52;c;ZXZpbA==" in written and "👨‍👩‍👧".encode() in written, written.decode()
    assert control_characters(written) == set()


def test_an_error_quotes_a_record_without_control_characters(tmp_path):
    (tmp_path / f"bad{TITLE}.jsonl").write_text(record("?", "!").replace('"?"', f'"{HIDDEN}'), encoding="utf-8")
    written = run_on_terminal(*CLI, "check", tmp_path / f"bad{TITLE}.jsonl", "--model", "saiga_tiny")
    assert b"error: " in written and b"bad]0;evil.jsonl" in written
    assert control_characters(written) == set()


@pytest.mark.slow
def test_a_notebook_prints_without_control_characters(tmp_path):
    notebooks = small_notebooks.write(tmp_path / "notebooks")
    shown = f"print({HIDDEN!r} + 'shown')\nfail(1)"
    small_notebooks.insert(notebooks / "01_format.ipynb", shown)
    written = run_on_terminal(*CLI, "run", "--run-dir", tmp_path / "run", "--notebooks", notebooks)
    assert b"]0;evil" in written and b"abcshown" in written, written.decode()
    assert b"NameError" in written and b"[0;31m" not in written
    assert control_characters(written) == set()


def test_a_progress_bar_of_a_notebook_is_shown_now_and_then_and_at_its_end(capsys):
    screen = execution.Screen()
    for done in range(100):
        screen.write(f"\r{done} %")
    screen.write("\r100 %\n")
    assert capsys.readouterr().out == "\n100 %\n"
