"""Saving, finding and adopting checkpoints."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from saigakit.core.files import sha256
from saigakit.errors import SaigaError
from saigakit.train import checkpoints
from saigakit.train.checkpoints import MARK, Store

IDENTITY = checkpoints.identity({"epochs": 3, "max_hours": 9}, {"train": {"train.jsonl": "abc"}})
STATE = ("adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")


def fill(directory, text="state"):
    (directory / "state").mkdir()
    for name in (*STATE, "rng_state.pth"):
        (directory / "state" / name).write_text(f"{text} {name}", encoding="utf-8")
    (directory / "log.jsonl").write_text("{}\n", encoding="utf-8")


def write_adapter(text):
    return lambda directory: (directory / "adapter_model.safetensors").write_text(text, encoding="utf-8")


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "02_train.checkpoints", IDENTITY)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def write_two(store, monkeypatch):
    """Checkpoints of steps 1 and 2, as after a kill before the first one was deleted."""
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.shutil, "rmtree", lambda *_, **__: None)
        return store.write(1, fill, needed=1), store.write(2, fill, needed=1)


def test_keeps_only_the_newest_checkpoint(store):
    for step in (5, 10, 100):
        store.write(step, fill, needed=1)
    assert names(store.directory) == ["step-00000100"]
    assert store.find_newest() == store.directory / "step-00000100"


def test_mark_lists_every_file_with_its_hash(store):
    made = store.write(5, fill, needed=1)
    files = json.loads((made / MARK).read_text(encoding="utf-8"))["outputs"]
    assert {f"state/{name}" for name in STATE} | {"log.jsonl", "state/rng_state.pth"} == set(files)
    assert files["log.jsonl"] == sha256(made / "log.jsonl")


def test_ignores_a_checkpoint_that_is_being_written(store):
    store.write(5, fill, needed=1)

    def cut_off(directory):
        fill(directory)
        assert store.find_newest() == store.directory / "step-00000005"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.write(6, cut_off, needed=1)
    assert names(store.directory) == ["step-00000005"]
    assert store.find_newest() == store.directory / "step-00000005"


@pytest.mark.parametrize("name", [*(f"state/{name}" for name in (*STATE, "rng_state.pth")), "log.jsonl", MARK])
@pytest.mark.parametrize("how", ["lost", "cut", "changed"])
def test_reports_a_damaged_checkpoint_and_uses_the_previous_one(store, monkeypatch, capsys, name, how):
    first, second = write_two(store, monkeypatch)
    file = second / name
    content = file.read_bytes()
    if how == "lost":
        file.unlink()
    else:
        file.write_bytes(content[:-1] if how == "cut" else b"#" + content[1:])
    assert store.find_newest() == first
    printed = capsys.readouterr().out
    assert f"Skipping checkpoint {second}: " in printed and name in printed


def test_reports_a_checkpoint_whose_mark_names_a_file_outside(store, capsys):
    made = store.write(5, fill, needed=1)
    mark = json.loads((made / MARK).read_text(encoding="utf-8"))
    mark["outputs"]["../secret"] = "5ec2e7"
    (made / MARK).write_text(json.dumps(mark), encoding="utf-8")
    assert store.find_newest() is None
    assert f"its {MARK} is damaged ('../secret' is outside" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_reports_a_checkpoint_saved_without_a_required_file(store, capsys, name):
    def fill_in_part(directory):
        fill(directory)
        (directory / "state" / name).unlink()

    store.write(5, fill_in_part, needed=1)
    assert store.find_newest() is None
    assert f"state/{name.partition('.')[0]} is missing" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["parameters", "inputs"])
def test_refuses_a_foreign_checkpoint_that_does_not_state_every_setting(tmp_path, missing):
    wanted = {"parameters": {"neftune_alpha": None}, "inputs": {"adapter": None}}
    Store(tmp_path / "foreign", wanted | {missing: {}}).write(5, fill, needed=1)
    with pytest.raises(SaigaError, match=r"another run \(\w+: nothing there, None now\)"):
        Store(tmp_path / "ours", wanted).find_newest(tmp_path / "foreign")


@pytest.mark.parametrize("part", ["parameters", "inputs", "versions", "outputs"])
@pytest.mark.parametrize("value", [None, [], "text"])
def test_skips_a_checkpoint_whose_mark_has_a_part_of_another_kind(store, capsys, part, value):
    mark = store.write(5, fill, needed=1) / MARK
    mark.write_text(json.dumps(json.loads(mark.read_text(encoding="utf-8")) | {part: value}), encoding="utf-8")
    assert store.find_newest() is None
    assert f"its {MARK} is damaged" in capsys.readouterr().out


def test_refuses_a_checkpoint_of_another_run_and_names_the_differences(store):
    made = store.write(5, fill, needed=1)
    other = Store(store.directory, checkpoints.identity({"epochs": 4}, {"train": {"train.jsonl": "abd"}}))
    with pytest.raises(SaigaError, match=r"another run \(epochs: 3 there, 4 now; train: .*abc.* there, .*abd.* now\)"):
        other.find_newest()
    assert made.is_dir()


def test_runner_deletes_and_reports_a_checkpoint_of_another_run(store, monkeypatch, capsys):
    store.write(5, fill, needed=1)
    monkeypatch.setenv("SAIGAKIT_REPLACE", "1")
    assert Store(store.directory, checkpoints.identity({"epochs": 4}, {})).find_newest() is None
    printed = capsys.readouterr().out
    assert "epochs: 3 there, 4 now" in printed and "deleting it" in printed


def test_identity_ignores_time_paths_and_processes():
    longer = checkpoints.identity(
        {"epochs": 3, "max_hours": 5, "processes": 2, "save_minutes": 1, "resume_from": "x"}, {}
    )
    assert longer == checkpoints.identity({"epochs": 3, "base_source": "y"}, {})


def test_checkpoint_holds_the_best_adapter_and_restores_it(store):
    store.keep_best(write_adapter("of step 3"), needed=1)
    made = store.write(5, fill, needed=1)
    store.keep_best(write_adapter("of step 6"), needed=1)
    assert (made / "best" / "adapter_model.safetensors").read_text(encoding="utf-8") == "of step 3"
    store.adopt(made)
    assert (store.best_dir / "adapter_model.safetensors").read_text(encoding="utf-8") == "of step 3"
    assert checkpoints.find_problem(made) is None


def test_resuming_earlier_deletes_the_best_adapter_of_a_later_step(store):
    made = store.write(5, fill, needed=1)
    store.keep_best(write_adapter("of step 6"), needed=1)
    store.adopt(made)
    assert not store.best_dir.exists()


def test_adopts_a_read_only_copy_without_changing_it(store, tmp_path):
    made = store.write(5, fill, needed=1)
    attached = tmp_path / "input" / "02_train" / "checkpoint"
    attached.parent.mkdir(parents=True)
    made.rename(attached)
    for path in (attached.parent, attached, *attached.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: path.stat().st_mtime_ns for path in attached.rglob("*")}
    here = store.adopt(store.find_newest(attached.parent))
    assert here == store.directory / "step-00000005"
    assert checkpoints.find_problem(here) is None
    assert os.access(here / "log.jsonl", os.W_OK)
    assert {path: path.stat().st_mtime_ns for path in attached.rglob("*")} == before


def test_finds_the_highest_step_of_all_sources(store, tmp_path):
    elsewhere = Store(tmp_path / "other.checkpoints", IDENTITY)
    later = elsewhere.write(7, fill, needed=1)
    store.write(5, fill, needed=1)
    assert store.find_newest(elsewhere.directory) == later


FULL = """
import resource, sys
from pathlib import Path
import torch
from saigakit.train import checkpoints
from saigakit.errors import SaigaError
sys.path[:0] = [sys.argv[2], f"{sys.argv[2]}/../support"]
import test_checkpoints
def fill(directory):
    test_checkpoints.fill(directory)
    WRITE
try:
    checkpoints.Store(Path(sys.argv[1]), test_checkpoints.IDENTITY).write(6, fill, needed=123_456)
except SaigaError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "write",
    [
        "torch.save({'state': torch.zeros(200_000)}, directory / 'state' / 'optimizer.pt')",
        "import safetensors.torch; safetensors.torch.save_file({'a': torch.zeros(200_000)}, directory / 'state' / 'a')",
        "(directory / 'state' / 'a').write_bytes(bytes(800_000))",
    ],
    ids=["torch", "safetensors", "python"],
)
def test_full_disk_leaves_the_previous_checkpoint_intact(store, write):
    before = store.write(5, fill, needed=1)
    command = [sys.executable, "-c", FULL.replace("WRITE", write), str(store.directory), str(Path(__file__).parent)]
    limit = 500_000  # bytes of a file
    made = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert "checkpoint of step 6 cannot be written" in made.stdout
    assert "it needs 123,456 bytes, and " in made.stdout
    assert names(store.directory) == ["step-00000005"]
    assert store.find_newest() == before


def test_lock_admits_one_run_at_a_time(store):
    with store.lock(0), pytest.raises(SaigaError, match="Another run is using"), store.lock(0.2):
        pass
    with store.lock(0):
        pass


def test_lock_leaves_nothing(store):
    with store.lock(0):
        pass
    assert names(store.directory.parent) == []
    with store.lock(0):
        made = store.write(5, fill, needed=1)
    assert store.find_newest() == made


SAVED = """
import os, sys
from pathlib import Path
sys.path[:0] = [sys.argv[2], f"{sys.argv[2]}/../support"]
import test_checkpoints
from saigakit.train import checkpoints
store, fsync = checkpoints.Store(Path(sys.argv[1]), test_checkpoints.IDENTITY), os.fsync
store.write(5, test_checkpoints.fill, needed=1)
def flush(descriptor):
    print("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
    fsync(descriptor)
os.fsync = flush
sys.addaudithook(lambda event, found: print(event, *found) if event in ("os.rename", "shutil.rmtree") else None)
store.write(6, test_checkpoints.fill, needed=1)
"""


def test_a_checkpoint_is_on_the_disk_before_the_previous_one_is_deleted(store):
    command = [sys.executable, "-c", SAVED, str(store.directory), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    (renamed,) = (at for at, line in enumerate(done) if "os.rename" in line and "/step-00000006 " in line + " ")
    deleted = next(
        at for at, line in enumerate(done) if line.startswith(f"shutil.rmtree {store.directory}/step-00000005")
    )
    flushed = {line.rpartition("/step-00000006/")[2] for line in done[:renamed] if line.startswith("fsync")}
    assert {"state", "log.jsonl", MARK, *(f"state/{name}" for name in STATE)} <= flushed
    assert f"fsync {store.directory}" in done[renamed:deleted]


def test_leftovers_of_a_run_that_was_killed_while_saving_are_deleted_at_the_next_start(store):
    code = SAVED.partition("def flush")[0] + "store.write(7, lambda _: os._exit(9), needed=1)"
    command = [sys.executable, "-c", code, str(store.directory), str(Path(__file__).parent)]
    assert subprocess.run(command, check=False).returncode == 9
    assert len(names(store.directory)) == 2
    assert store.find_newest() == store.directory / "step-00000005"
    assert names(store.directory) == ["step-00000005"]


def test_checkpoints_may_be_a_link_to_a_larger_disk(store, tmp_path):
    disk = tmp_path / "disk" / "checkpoints"
    disk.parent.mkdir()
    store.directory.symlink_to(disk, target_is_directory=True)
    for step in (5, 6):
        store.write(step, fill, needed=1)
    assert names(disk) == ["step-00000006"] and store.find_newest() == store.directory / "step-00000006"
    store.delete()
    assert not disk.exists()
