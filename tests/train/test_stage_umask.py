"""The files of a stage have the permissions that the umask gives them, also those copied from read-only inputs."""

import stat

import kill_resume
import pytest

from saigakit import data, train
from saigakit.core import workspace
from saigakit.train import checkpoints


def wrong(directory, umask):
    """The paths whose permissions are not those of a new file or directory."""
    expected = {path: (0o777 if path.is_dir() else 0o666) & ~umask for path in directory.rglob("*")}
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in expected}
    return {str(path.relative_to(directory)): oct(found[path]) for path in expected if found[path] != expected[path]}


@pytest.mark.parametrize("umask", [0o077, 0o002], indirect=True, ids=oct)
def test_permissions_of_formatted_records_follow_the_umask(tiny, tmp_path, umask):
    data.check_records(records=str(tiny / "records.jsonl"), model="saiga_tiny", run_dir=tmp_path)
    assert (tmp_path / "01_format" / "train.jsonl").is_file()
    assert wrong(tmp_path, umask) == {}


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("umask", [0o077, 0o002], indirect=True, ids=oct)
def test_permissions_of_a_resumed_training_follow_the_umask(tiny, tmp_path, monkeypatch, umask):
    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.setenv("SAIGAKIT_SESSION_START", str(workspace.uptime() - 11 * 3600))  # ends after a step
    made = train.train_adapter(kill_resume.config_for(run, eval_steps=1))
    assert (made / checkpoints.IN_STAGE / checkpoints.BEST).is_dir()
    assert wrong(run, umask) == {}
    attached = made.rename(tmp_path / "attached")
    for path in [*attached.rglob("*"), attached]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    train.train_adapter(kill_resume.config_for(run, eval_steps=1, resume_from=str(attached)))
    checkpoints.Store(run / "adopted", {}).adopt(attached / checkpoints.IN_STAGE)
    assert wrong(run, umask) == {}
