"""Which attached training is gone on with, and which is not."""

import json
from dataclasses import asdict

import pytest

from saigakit.config import TrainConfig
from saigakit.core import manifest
from saigakit.errors import SaigaError
from saigakit.registry import Lora
from saigakit.train import stage


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


def attached(place, name="one", *, ended="max_hours", stage="02_train", **changes):
    """As Kaggle mounts the output of an earlier session."""
    config = config_in(place)
    parameters = {key: value for key, value in asdict(config).items() if not key.endswith(("_file", "_dir"))}
    parameters = json.loads(json.dumps(parameters | config.start)) | {"max_seq_length": 512, "max_hours": 9.0} | changes
    directory = place / "input" / "notebooks" / "me" / name / "02_train"
    inputs = {"train": manifest.hashes(place / "run" / "train.jsonl")}
    identity = {"stage": stage, "parameters": parameters, "inputs": inputs}
    with manifest.making(directory, facts={"training": {"ended": ended}}, **identity):
        pass
    return directory


def test_a_training_that_ended_by_time_is_gone_on_with(place, capsys):
    directory = attached(place)
    assert stage.with_resume_point(config_in(place)) == config_in(place, resume_from=str(directory))
    assert "training goes on from there" in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings", [{"max_hours": 3}, {"save_minutes": 5}, {"base_source": "x"}, {"max_seq_length": 512}]
)
def test_what_belongs_to_a_session_may_differ(place, settings):
    directory = attached(place)
    assert stage.with_resume_point(config_in(place, **settings)).resume_from == str(directory)


def test_one_that_continued_the_adapter_is_not_gone_on_with_by_folding_it(place, capsys):
    attached(place, folded=False)
    assert stage.with_resume_point(config_in(place)).resume_from is None
    assert "is not continued: other folded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"epochs": 3}, "epochs"), ({"lora": Lora(rank=3)}, "lora"), ({"max_seq_length": 100}, "max_seq_length")],
)
def test_a_training_of_other_parameters_is_named_and_not_continued(place, capsys, settings, named):
    attached(place)
    config = config_in(place, **settings)
    assert stage.with_resume_point(config) is config
    assert f"is not continued: other {named}." in capsys.readouterr().out


def test_a_training_on_other_records_is_not_continued(place, capsys):
    attached(place)
    (place / "run" / "train.jsonl").write_text("{}\n{}\n", encoding="utf-8")
    assert stage.with_resume_point(config_in(place)).resume_from is None
    assert "other training records." in capsys.readouterr().out


@pytest.mark.parametrize("kind", [{"ended": "all_steps"}, {"stage": "03_merge_gguf"}])
def test_what_is_finished_or_no_training_is_left_alone_without_a_word(place, capsys, kind):
    attached(place, **kind)
    assert stage.with_resume_point(config_in(place)).resume_from is None
    assert capsys.readouterr().out == ""


def test_one_that_is_named_or_here_goes_first(place):
    attached(place)
    assert stage.with_resume_point(config_in(place, resume_from="mine")).resume_from == "mine"
    (place / "run" / "02_train").mkdir()
    assert stage.with_resume_point(config_in(place)).resume_from is None


def test_two_that_fit_are_a_question_for_the_user(place):
    attached(place, "one")
    attached(place, "two")
    with pytest.raises(SaigaError, match=r"More than one .*one/02_train, .*two/02_train"):
        stage.with_resume_point(config_in(place))


def test_nothing_attached_is_a_new_training(place):
    config = config_in(place)
    assert stage.with_resume_point(config) is config


def test_a_training_with_other_held_out_records_is_not_continued(place, capsys):
    attached(place)
    (place / "run" / "held_out.jsonl").write_text("{}\n", encoding="utf-8")
    assert stage.with_resume_point(config_in(place, eval_file="held_out.jsonl")).resume_from is None
    assert "other held-out records." in capsys.readouterr().out
