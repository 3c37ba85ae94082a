"""What a terminal in another encoding shows, and paths whose bytes are no UTF-8."""

import json
import os
import pty
import subprocess
import sys

import pytest
from click.testing import CliRunner

from saigakit import cli

BYTES = "surrogateescape"
NAME = b"\xff\xfe-\xd1".decode("utf-8", BYTES)


def in_terminal(encoding, *arguments):
    """Run a command in a pseudo-terminal; return what it shows and its exit status."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"PYTHONIOENCODING": encoding, "COLUMNS": "100"}
    command = [sys.executable, "-m", "saigakit.cli", *map(str, arguments)]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 1 << 16):
                shown += part
        except OSError:  # the other end is closed
            pass
    os.close(ours)
    return shown.decode(encoding, "replace"), process.returncode


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["cp1251", "koi8-r", "ascii"])
def test_a_terminal_without_unicode_shows_russian_records(tmp_path, encoding):
    messages = [{"role": "user", "content": "Ёлка → 🎄?"}, {"role": "assistant", "content": "Да, ёлка!"}]
    (tmp_path / "records.jsonl").write_text(json.dumps({"messages": messages}), encoding="utf-8")
    shown, status = in_terminal(encoding, "check", tmp_path / "records.jsonl", "--model", "saiga_tiny")
    assert status == 0 and "Traceback" not in shown, shown
    assert encoding == "ascii" or "Ёлка ? ??" in shown  # click writes UTF-8 where only ASCII is promised


@pytest.mark.parametrize("encoding", ["cp1251", "koi8-r", "ascii", "utf-8"])
def test_what_doctor_has_found_can_be_told_apart_in_each_terminal(monkeypatch, encoding):
    monkeypatch.setenv("HF_TOKEN", "with spaces in it")
    shown, status = in_terminal(encoding, "doctor")
    passed, failed = ("✓", "✗") if encoding == "utf-8" else ("ok", "NO")
    assert status == 0 and "Traceback" not in shown, shown
    assert shown.startswith(f"{passed} Python ") and f"\n{failed} Hub token " in shown, shown


def test_help_and_errors_are_shown_in_a_terminal_without_unicode():
    shown, status = in_terminal("ascii", "--help")
    assert status == 0 and "saigakit demo" in shown
    shown, status = in_terminal("koi8-r", "check", "нет → такого.jsonl")
    assert status == 1 and "error: 'нет ? такого.jsonl' is not there" in shown, shown


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", f"{NAME}.jsonl"),
        ("train", "-f", f"{NAME}.yaml"),
        ("train", "-f", "x.yaml", "-p", "output_dir", f"{NAME}/02_train"),
        ("run", "--run-dir", NAME),
        ("export", "--model", "saiga_tiny", "--output", f"{NAME}.gguf"),
        ("chat", f"{NAME}.gguf"),
        ("evaluate", "--model", "saiga_tiny", "--run-dir", NAME),
        ("fetch", "02_train", NAME),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_path_that_is_not_utf8_is_refused_before_the_work(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli.main, arguments)
    assert done.exit_code == 1, done.exception
    assert done.stderr.startswith("error: '\\udcff\\udcfe-\\udcd1")
    assert done.stderr.endswith("' is not UTF-8; rename the file or directory.\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["the current directory", "a file in the directory"])
def test_a_name_that_is_not_utf8_is_refused_where_it_is_found(tiny, tmp_path, monkeypatch, place):
    directory = tmp_path / (NAME if place == "the current directory" else "records")
    directory.mkdir()
    (directory / f"{NAME}.jsonl").write_bytes((tiny / "records.jsonl").read_bytes())
    (directory / "b.jsonl").write_bytes((tiny / "records.jsonl").read_bytes())
    monkeypatch.chdir(directory)
    given = "b.jsonl" if place == "the current directory" else "."
    done = CliRunner().invoke(cli.main, ["check", given, "--model", "saiga_tiny"])
    assert done.exit_code == 1 and "is not UTF-8; rename the file or directory." in done.stderr, done.exception
    assert {*directory.iterdir()} == {directory / "b.jsonl", directory / f"{NAME}.jsonl"}
