"""A file is complete under its final name, or the old one stays."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from saigakit.core import files
from saigakit.errors import SaigaError

ROOT = Path(__file__).parents[2]

WRITING = """
import itertools, sys
from pathlib import Path
from saigakit.core.files import write_text
for letter in itertools.cycle("ab"):
    write_text(Path(sys.argv[1]), letter * 10**6)
    print(letter, flush=True)
"""


@pytest.mark.parametrize("rounds", [1, 4, 9])
def test_a_text_file_is_complete_whenever_its_writer_is_killed(tmp_path, rounds):
    file = tmp_path / "state.json"
    child = subprocess.Popen(
        [sys.executable, "-c", WRITING, str(file)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    with child:
        assert child.stdout is not None
        for _ in range(rounds):
            child.stdout.readline()
        child.send_signal(signal.SIGKILL)
    text = file.read_text(encoding="utf-8")
    assert text in ("a" * 10**6, "b" * 10**6)


def names(directory):
    return sorted(item.name for item in directory.iterdir())


def test_replaces_the_file_when_the_block_ends(tmp_path):
    file = files.write_text(tmp_path / "new" / "x.txt", "before")
    with files.replacing(file) as partial:
        partial.write_text("after", encoding="utf-8")
        assert partial == tmp_path / "new" / ".x.txt.partial" and file.read_text() == "before"
    assert names(file.parent) == ["x.txt"] and file.read_text() == "after"


@pytest.mark.parametrize("raised", [ValueError, KeyboardInterrupt])
def test_an_error_in_the_block_keeps_the_old_file_and_removes_the_temporary_one(tmp_path, raised):
    file = files.write_text(tmp_path / "x.txt", "before")
    with pytest.raises(raised), files.replacing(file) as partial:
        partial.write_text("half", encoding="utf-8")
        raise raised
    assert names(tmp_path) == ["x.txt"] and file.read_text() == "before"


def test_starts_without_the_leftovers_of_a_killed_writer(tmp_path):
    (tmp_path / ".x.txt.partial").write_text("half of an earlier run", encoding="utf-8")
    with files.replacing(tmp_path / "x.txt") as partial:
        assert not partial.exists()
        partial.touch()


def test_a_full_disk_is_reported_with_the_file_and_leaves_the_old_one(tmp_path, monkeypatch):
    file = files.write_text(tmp_path / "x.json", "before")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(SaigaError, match=r"x\.json could not be written: .*No space left"):
        files.write_text(file, "after")
    assert names(tmp_path) == ["x.json"] and file.read_text() == "before"


def test_a_directory_appears_when_the_block_ends(tmp_path):
    with files.replacing(tmp_path / "merged") as partial:
        partial.mkdir()
        (partial / "config.json").touch()
        assert not (tmp_path / "merged").exists()
    assert names(tmp_path) == ["merged"] and names(tmp_path / "merged") == ["config.json"]
    with pytest.raises(ValueError), files.replacing(tmp_path / "other") as partial:
        (partial / "deep").mkdir(parents=True)
        raise ValueError
    assert names(tmp_path) == ["merged"]


def test_a_missing_input_and_a_closed_pipe_are_not_failures_of_the_output(tmp_path):
    with pytest.raises(FileNotFoundError, match="shard"), files.replacing(tmp_path / "out" / "x"):
        (tmp_path / "base" / "shard").read_bytes()
    with pytest.raises(BrokenPipeError), files.replacing(tmp_path / "out" / "x"):
        raise BrokenPipeError(32, "Broken pipe")
    ours = pytest.raises(SaigaError, match=r"x could not be written: .*Is a directory")
    with ours, files.replacing(tmp_path / "out" / "x") as partial:
        partial.mkdir()
        partial.write_text("", encoding="utf-8")


def test_an_existing_file_or_directory_is_refused(tmp_path):
    files.require_absent(tmp_path / "x")
    with pytest.raises(SaigaError, match="already exists; nothing was overwritten"):
        files.require_absent(tmp_path)


def test_discards_a_partial_file_and_a_partial_directory(tmp_path):
    for final in (tmp_path / "file", tmp_path / "directory"):
        assert files.discard_partial(final) == tmp_path / f".{final.name}.partial"
    (tmp_path / ".directory.partial" / "half").mkdir(parents=True)
    (tmp_path / ".file.partial").touch()
    for final in (tmp_path / "file", tmp_path / "directory"):
        files.discard_partial(final)
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["a", "a/b.gguf", "a b/..c", "жалобы.jsonl", "a\\b", "...", "x/./y"])
def test_a_name_inside_a_directory_is_joined_to_it(tmp_path, name):
    assert files.inside(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize(
    "name",
    ["../x", "a/../../x", "a/../x", "/etc/x", "..", "", ".", "..\\x", "a\\..\\..\\x", "C:x", "C:\\x", "\\x", "\0"],
)
def test_a_name_that_leads_out_of_a_directory_is_refused(tmp_path, name):
    with pytest.raises(SaigaError, match=rf"{re.escape(repr(name))} is outside {tmp_path}"):
        files.inside(tmp_path, name)
