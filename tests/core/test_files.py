"""A file is complete under its final name, or the old one stays."""

import os
import re
import shutil
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
        assert partial.is_relative_to(tmp_path / "new") and file.read_text() == "before"
    assert names(file.parent) == ["x.txt"] and file.read_text() == "after"


@pytest.mark.parametrize("raised", [ValueError, KeyboardInterrupt])
def test_an_error_in_the_block_keeps_the_old_file_and_removes_the_temporary_one(tmp_path, raised):
    file = files.write_text(tmp_path / "x.txt", "before")
    with pytest.raises(raised), files.replacing(file) as partial:
        partial.write_text("half", encoding="utf-8")
        raise raised
    assert names(tmp_path) == ["x.txt"] and file.read_text() == "before"


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


HOLDING = """
import sys
from pathlib import Path
from saigakit.core import files
with files.replacing(Path(sys.argv[1])) as partial:
    partial.mkdir()
    (partial / "half").write_text("half of it")
    print("writing", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def writer(tmp_path):
    """A process that is writing `x`."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(tmp_path / "x")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == "writing\n"
        yield child
        child.kill()


def test_two_processes_that_write_one_name_do_not_mix(tmp_path, writer):
    with files.replacing(tmp_path / "x") as partial:
        partial.mkdir()
        (partial / "mine").touch()
    assert names(tmp_path / "x") == ["mine"]
    writer.communicate("")
    assert writer.returncode == 0 and names(tmp_path) == ["x"] and names(tmp_path / "x") == ["half"]


def test_starts_without_the_leftovers_of_a_killed_writer(tmp_path, writer):
    files.discard_abandoned(tmp_path / "x")
    (left,) = tmp_path.iterdir()  # its process lives
    writer.kill()
    writer.wait()
    with files.replacing(tmp_path / "other") as partial:
        partial.touch()
    assert left.is_dir()
    with files.replacing(tmp_path / "x") as partial:
        assert not left.exists()
        partial.touch()
    assert names(tmp_path) == ["other", "x"]


def test_a_temporary_directory_of_a_killed_process_is_deleted_by_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setenv("SAIGAKIT_CACHE", str(tmp_path))
    code = "import os; from saigakit.core import files; s = files.scratch(); s.__enter__(); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code], check=False, env=os.environ | {"PYTHONPATH": str(ROOT)})
    (left,) = (tmp_path / "tmp").iterdir()
    with files.scratch() as one, files.scratch() as other:
        assert not left.exists() and one.is_dir() and other.is_dir() and one != other
    assert names(tmp_path / "tmp") == []


def test_leaves_directories_that_it_has_not_made(tmp_path):
    mine = tmp_path / ".x.mine.partial"
    (mine / "deep").mkdir(parents=True)
    files.write_text(tmp_path / "x", "")
    assert (mine / "deep").is_dir()


def test_an_older_directory_comes_back_if_its_replacement_was_killed_between_two_renames(tmp_path):
    with files.temporary_dir(tmp_path, "stage") as living:
        (living / ".replaced").mkdir()
        (living / ".replaced" / "old").touch()
        (living / "stage").mkdir()
        shutil.copytree(living.parent, tmp_path / ".stage.killed.partial")
    files.discard_abandoned(tmp_path / "stage")
    assert names(tmp_path) == ["stage"] and names(tmp_path / "stage") == ["old"]


@pytest.mark.parametrize("name", ["x[1].gguf", "x*", "-x", "x y"])
def test_leftovers_of_any_name_are_found(tmp_path, name):
    with files.temporary_dir(tmp_path, name) as living:
        left = shutil.copytree(living.parent, tmp_path / f".{name}.killed.partial")
        files.discard_abandoned(tmp_path / name)
        assert living.is_dir() and not left.exists()


@pytest.mark.parametrize("exists", [False, True])
def test_a_link_to_a_larger_disk_stays_and_what_it_names_is_replaced(tmp_path, exists):
    disk = tmp_path / "disk"
    disk.mkdir()
    for link, old in ((tmp_path / "stage", disk / "old stage"), (tmp_path / "x.gguf", disk / "old.gguf")):
        link.symlink_to(old)
    if exists:
        (disk / "old stage").mkdir()
        (disk / "old.gguf").touch()
    with files.replacing(tmp_path / "stage") as partial:
        assert partial.is_relative_to(disk)
        partial.mkdir()
        (partial / "new").touch()
    files.write_text(tmp_path / "x.gguf", "new")
    assert (tmp_path / "stage").is_symlink() and (tmp_path / "x.gguf").is_symlink()
    assert names(disk / "old stage") == ["new"] and (disk / "old.gguf").read_text() == "new"
    assert names(disk) == ["old stage", "old.gguf"]


def test_only_one_process_holds_a_lock_and_its_file_does_not_stay(tmp_path, capsys):
    lock, impatient = tmp_path / "run" / ".lock", pytest.raises(SaigaError, match=r"Another run is using run_dir\.")
    with files.lock_file(lock, Path("run_dir"), 0):
        assert lock.is_file()
        with impatient, files.lock_file(lock, Path("run_dir"), 0.05):
            pass
    assert capsys.readouterr().out == "Waiting for another run that is using run_dir …\n"
    assert names(tmp_path / "run") == []


def test_a_lock_is_kept_by_a_child_that_inherited_it(tmp_path):
    lock = tmp_path / ".lock"
    with files.lock_file(lock, tmp_path, 0) as descriptor:
        child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[descriptor])
        copy = tmp_path / "copy"  # as if this process had been killed before it could remove it
        lock.rename(copy)
    with child, pytest.raises(SaigaError), files.lock_file(copy, tmp_path, 0):
        pass
    with files.lock_file(copy, tmp_path, 0):
        pass
