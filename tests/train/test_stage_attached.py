"""Choosing an attached training to resume."""

import json
import shutil

import pytest

from saigakit.config import TrainConfig
from saigakit.core import manifest
from saigakit.errors import SaigaError
from saigakit.registry import Lora
from saigakit.train import checkpoints, stage


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("SAIGAKIT_INPUT_ROOT", str(tmp_path / "input"))
    (tmp_path / "input").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "train.jsonl").write_text("{}\n", encoding="utf-8")
    return tmp_path


def config_in(place, **settings):
    files = {"train_file": "train.jsonl", "output_dir": str(place / "run" / "02_train")}
    return TrainConfig(**{"model": "saiga_tiny", "lora": Lora(rank=2), **files, **settings})


def identity_of(place, config):
    inputs = {"train": manifest.hashes(place / "run" / "train.jsonl")}
    if config.eval_file:
        inputs["held_out"] = manifest.hashes(place / "run" / config.eval_file)
    return {"parameters": stage._identity_parameters(config), "inputs": inputs}


def attached(place, name="one", *, ended="max_hours", kind="02_train", **changes):
    """The output of an earlier session, as Kaggle mounts it."""
    identity = identity_of(place, config_in(place, max_hours=9.0))
    identity["parameters"] |= changes
    directory = place / "input" / "notebooks" / "me" / name / "02_train"
    with manifest.making(directory, facts={"training": {"ended": ended}}, stage=kind, **identity):
        pass
    return directory


def with_resume_point(place, **settings):
    config = config_in(place, **settings)
    return stage.with_resume_point(config, checkpoints.identity(**identity_of(place, config)))


def test_resumes_an_attached_training_that_ran_out_of_time(place, capsys):
    directory = attached(place)
    assert with_resume_point(place) == config_in(place, resume_from=str(directory))
    assert "which ended by max_hours" in capsys.readouterr().out


@pytest.mark.parametrize("settings", [{"max_hours": 3}, {"save_minutes": 5}, {"base_source": "x"}])
def test_settings_of_a_session_may_differ(place, settings):
    directory = attached(place)
    assert with_resume_point(place, **settings).resume_from == str(directory)


def test_does_not_resume_a_continued_adapter_as_a_folded_one(place, capsys):
    attached(place, folded=False)
    assert with_resume_point(place).resume_from is None
    assert "another run (folded: False there, True now)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"epochs": 3}, "epochs"), ({"lora": Lora(rank=3)}, "lora"), ({"max_seq_length": 100}, "max_seq_length")],
)
def test_reports_and_ignores_a_training_of_other_parameters(place, capsys, settings, named):
    attached(place)
    assert with_resume_point(place, **settings) == config_in(place, **settings)
    assert f"another run ({named}: " in capsys.readouterr().out


def test_does_not_resume_a_training_on_other_records(place, capsys):
    attached(place)
    (place / "run" / "train.jsonl").write_text("{}\n{}\n", encoding="utf-8")
    assert with_resume_point(place).resume_from is None
    assert "another run (train: " in capsys.readouterr().out


@pytest.mark.parametrize("kind", [{"ended": "all_steps"}, {"kind": "03_merge_gguf"}])
def test_ignores_finished_trainings_and_other_stages_silently(place, capsys, kind):
    attached(place, **kind)
    assert with_resume_point(place).resume_from is None
    assert capsys.readouterr().out == ""


def test_resume_from_and_a_local_stage_take_precedence(place):
    attached(place)
    assert with_resume_point(place, resume_from="mine").resume_from == "mine"
    (place / "run" / "02_train").mkdir()
    assert with_resume_point(place).resume_from is None


def test_refuses_two_trainings_that_fit(place):
    attached(place, "one")
    attached(place, "two")
    with pytest.raises(SaigaError, match=r"More than one .*one/02_train, .*two/02_train"):
        with_resume_point(place)


def test_starts_a_new_training_if_nothing_is_attached(place):
    assert with_resume_point(place) == config_in(place)


def test_does_not_resume_a_training_with_another_evaluation_set(place, capsys):
    attached(place)
    (place / "run" / "held_out.jsonl").write_text("{}\n", encoding="utf-8")
    assert with_resume_point(place, eval_file="held_out.jsonl").resume_from is None
    assert "another run (held_out: nothing there, " in capsys.readouterr().out


@pytest.mark.parametrize("part", ["parameters", "inputs"])
def test_does_not_resume_a_training_whose_manifest_lacks_a_part_of_the_identity(place, capsys, part):
    """A value of None is part of it: whoever left it out may have trained with another one."""
    config = config_in(place)
    wanted = checkpoints.identity(**identity_of(place, config))
    left_out = "neftune_alpha" if part == "parameters" else "adapter"
    wanted["inputs"]["adapter"] = None
    directory = attached(place)
    content = manifest.read(directory)
    content["inputs"]["adapter"] = None
    del content[part][left_out]
    (directory / manifest.NAME).write_text(json.dumps(content), encoding="utf-8")
    assert stage.with_resume_point(config, wanted).resume_from is None
    assert f"another run ({left_out}: nothing there, None now)" in capsys.readouterr().out


@pytest.mark.parametrize("training", [None, "max_hours", ["max_hours"], {}])
def test_ignores_a_foreign_manifest_that_says_nothing_of_its_end(place, capsys, training):
    directory = attached(place)
    content = manifest.read(directory) | {"training": training}
    (directory / manifest.NAME).write_text(json.dumps(content), encoding="utf-8")
    assert with_resume_point(place).resume_from is None
    assert capsys.readouterr().out == ""


def killed(place, name="killed", *, steps=(4,), **changes):
    """The output of a session that was killed while training: checkpoints next to a stage that is not there."""
    identity = identity_of(place, config_in(place))
    identity["parameters"] |= changes
    directory = place / "input" / "notebooks" / "me" / name / "02_train.checkpoints"
    for step in steps:
        checkpoint_of(directory, step, checkpoints.identity(**identity))
    return directory


def checkpoint_of(directory, step, identity):
    def fill(partial):
        for name in checkpoints._REQUIRED:
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_text("{}\n", encoding="utf-8")

    made = checkpoints.Store(directory.with_name(f"store-{step}"), identity).write(step, fill, needed=1)
    directory.mkdir(exist_ok=True)
    made.rename(directory / made.name)


def test_resumes_the_attached_checkpoints_of_a_killed_session(place, capsys):
    directory = killed(place)
    assert with_resume_point(place, max_hours=3).resume_from == str(directory)
    assert capsys.readouterr().out == f"Resuming {directory}, whose session was killed.\n"


def test_leaves_attached_checkpoints_as_they_are(place, monkeypatch):
    directory = killed(place)
    monkeypatch.setenv("SAIGAKIT_REPLACE", "1")
    (directory / ".step-00000006.x.partial" / "files").mkdir(parents=True)
    before = sorted(directory.rglob("*"))
    with_resume_point(place)
    assert sorted(directory.rglob("*")) == before


def test_does_not_resume_the_checkpoints_of_another_run(place, capsys):
    killed(place, epochs=7.0)
    assert with_resume_point(place).resume_from is None
    assert "another run (epochs: 7.0 there, " in capsys.readouterr().out


def test_a_damaged_attached_checkpoint_is_reported_and_the_one_before_it_resumed(place, capsys):
    directory = killed(place, steps=(4, 6))
    (directory / "step-00000006" / "log.jsonl").write_text("cut", encoding="utf-8")
    assert with_resume_point(place).resume_from == str(directory)
    assert "step-00000006: log.jsonl changed" in capsys.readouterr().out
    shutil.rmtree(directory / "step-00000004")
    assert with_resume_point(place).resume_from is None


def test_refuses_a_killed_and_an_ended_training_that_both_fit(place):
    attached(place)
    killed(place)
    with pytest.raises(SaigaError, match=r"More than one .*one/02_train, .*killed/02_train\.checkpoints\."):
        with_resume_point(place)


def test_checkpoints_that_continued_a_stage_next_to_them_take_precedence(place):
    attached(place, "one")
    directory = killed(place, "one")
    assert with_resume_point(place).resume_from == str(directory)
