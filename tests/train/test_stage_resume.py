"""Resuming: the same bytes and losses as an uninterrupted training."""

import json
import signal
import time
from dataclasses import replace
from pathlib import Path

import kill_resume
import psutil
import pytest
import torch
from matrix import matrix

from saigakit import train
from saigakit.core import launch, manifest, workspace
from saigakit.core.files import sha256
from saigakit.errors import SaigaError
from saigakit.registry import Lora
from saigakit.train import checkpoints, curve, run_state, worker
from saigakit.train.checkpoints import Store
from saigakit.train.preflight import Job

DROPOUT = Lora(rank=4, alpha=8, dropout=0.2)
STEPS = 12


class Child:
    """The child of a run, in this process, so that its store remains at the end."""

    def __init__(self, directory, monkeypatch, records, **settings):
        files = {"train_file": str(records), "eval_file": str(records)}
        self.config = kill_resume.config_for(directory, lora=DROPOUT, **files, **settings)
        self.directory, self.monkeypatch = Path(self.config.output_dir), monkeypatch
        self.directory.mkdir(parents=True)
        self.store = Store(directory / "checkpoints", checkpoints.identity({"of": str(settings)}, {}))

    def run(self, until=None):
        """Run from the last checkpoint to the end, or until interrupted in step `until`."""
        start = self.store.find_newest()
        config = replace(self.config, resume_from=start and str(self.store.adopt(start)))
        file = replace(Job.of(config, "float32"), store=self.store).write(self.directory)
        (self.directory / curve.LOG_FILE).unlink(missing_ok=True)
        steps = iter(range(1 if start is None else checkpoints.step_of(start) + 1, 1000))
        with self.monkeypatch.context() as patch:
            patch.setattr(launch, "is_asked_to_end", lambda: next(steps) == until)
            if until is None:
                worker.main(file)
            else:
                with pytest.raises(SaigaError, match=f"interrupted and saved at step {until} of {STEPS}. Run it again"):
                    worker.main(file)

    @property
    def result(self):
        """Hashes of adapter, optimizer and schedule, and the log without seconds."""
        newest = self.store.find_newest() / checkpoints.STATE
        assert checkpoints.step_of(newest.parent) == STEPS
        log = [
            {key: value for key, value in entry.items() if key != "seconds"} for entry in curve.read_log(self.directory)
        ]
        files = (self.directory / "adapter_model.safetensors", newest / "optimizer.pt", newest / "scheduler.pt")
        return [sha256(file) for file in files], log


@pytest.mark.parametrize(
    ("quantization", "adapter"), matrix([("none", None), ("nf4", None), ("nf4", "auto")], [("none", None)])
)
def test_resumed_training_is_bit_identical_to_an_uninterrupted_one(tiny, tmp_path, monkeypatch, quantization, adapter):
    results = []
    for stops in ([], [1], [4, 5, 9]):  # at a step with an evaluation (4), and at others
        child = Child(
            tmp_path / str(stops),
            monkeypatch,
            tiny / "records.jsonl",
            quantization=quantization,
            adapter=adapter,
            save_steps=STEPS,
        )
        for stop in stops:
            child.run(until=stop)
        child.run()
        results.append(child.result)
    assert [entry["step"] for entry in results[0][1] if "held_out_loss" in entry] == [0, 4, 8, 12]
    assert results[1] == results[0]
    assert results[2] == results[0]


@pytest.mark.slow
def test_result_depends_on_the_random_numbers_of_the_checkpoint(tiny, tmp_path, monkeypatch):
    """Shows that the test above can fail: dropout draws from them."""
    results = []
    for seed in (None, 5):
        child = Child(tmp_path / str(seed), monkeypatch, tiny / "records.jsonl", save_steps=STEPS)
        child.run(until=3)
        if seed is not None:
            monkeypatch.setattr(torch.random, "set_rng_state", lambda _: torch.manual_seed(5))
        child.run()
        results.append(child.result[0][0])
    assert results[0] != results[1]


@pytest.mark.slow
def test_run_killed_five_times_ends_like_an_undisturbed_one(tmp_path):
    unkilled, _ = kill_resume.finished(kill_resume.config_for(tmp_path / "unkilled"))
    moments = [kill_resume.Kill(step, step != 5, 0.003 * step) for step in (2, 3, 5, 8, 10)]
    made, where, printed = kill_resume.survive(tmp_path / "killed", moments)
    assert "too late: it had ended" not in where
    assert "Resuming from step" in printed
    assert made == unkilled


@pytest.mark.slow
def test_two_processes_save_together_when_one_is_interrupted_and_resume(tmp_path):
    settings = {"lora": DROPOUT, "processes": 2, "save_steps": 100, "epochs": 3, "eval_steps": 18}
    alone, _ = kill_resume.finished(kill_resume.config_for(tmp_path / "alone", **settings))
    config = kill_resume.config_for(tmp_path / "ended", **settings)
    process, printed = kill_resume.start(config)
    while kill_resume.losses_in(Path(config.output_dir), since=0) < 3:
        assert process.is_alive()
        time.sleep(0.005)
    psutil.Process(process.pid).children()[0].send_signal(signal.SIGTERM)
    process.join()
    assert "Run it again with the same run_dir" in printed.read_text(encoding="utf-8")
    resumed, said = kill_resume.finished(config)
    assert "Resuming from step" in said
    assert resumed == alone


HOUR = 3600


def run_out_of_time(monkeypatch, step):
    """Let a child in this process run out of time in step `step`."""
    made = iter(range(1, 1000))
    monkeypatch.setattr(run_state.Run, "is_out_of_time", lambda _: next(made) == step)


@pytest.fixture
def ended(tiny, tmp_path, monkeypatch, in_this_process):
    """A stage that ended by max_hours at step 5, evaluated only at the first and last step."""
    config = kill_resume.config_for(tmp_path / "first", save_steps=None, eval_steps=100, max_hours=100)
    with monkeypatch.context() as patch:
        run_out_of_time(patch, 5)
        train.train_adapter(config)
    return config


@pytest.fixture
def uninterrupted(tiny, tmp_path, in_this_process):
    made = train.train_adapter(kill_resume.config_for(tmp_path / "uninterrupted", save_steps=None, eval_steps=100))
    return without_seconds(made)


def without_seconds(made):
    log = [{key: value for key, value in entry.items() if key != "seconds"} for entry in curve.read_log(made)]
    return sha256(made / "adapter_model.safetensors"), log


def test_stage_that_ran_out_of_time_is_complete_and_holds_its_checkpoint(ended):
    made = Path(ended.output_dir)
    training = manifest.require_stage(made, "02_train", model="saiga_tiny")["training"]
    assert (training["ended"], training["step"], training["steps"]) == ("max_hours", 5, STEPS)
    assert checkpoints.find_problem(made / "checkpoint") is None
    assert {entry["step"] for entry in curve.read_log(made)} == {0, 1, 2, 3, 4, 5}
    assert not checkpoints.directory_for(made).exists()


def test_second_call_resumes_and_ends_like_an_uninterrupted_run(ended, uninterrupted, capfd):
    made = train.train_adapter(ended)
    assert ", which ended by max_hours at step 5 of 12." in capfd.readouterr().out
    assert without_seconds(made) == uninterrupted
    assert not (made / "checkpoint").exists()
    assert manifest.read(made)["training"]["ended"] == "finished"
    train.train_adapter(ended)
    assert "up to date" in capfd.readouterr().out


def test_reuses_the_finished_stage_when_no_time_is_left(ended, monkeypatch, capfd):
    monkeypatch.setenv("SAIGAKIT_SESSION_START", str(workspace.uptime() - 100 * HOUR))
    monkeypatch.setattr(launch, "distributed", lambda *_, **__: pytest.fail("a child was started"))
    train.train_adapter(ended)
    assert "at step 5 of 12: max_hours=100 leaves no time in this session" in capfd.readouterr().out


@pytest.mark.slow
def test_another_session_resumes_from_a_read_only_copy(ended, uninterrupted, tmp_path, monkeypatch, capfd):
    attached = tmp_path / "input" / "notebooks" / "someone" / "saiga-train"
    attached.mkdir(parents=True)
    Path(ended.output_dir).rename(attached / "02_train")
    for path in sorted(attached.rglob("*"), reverse=True):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: path.stat().st_mtime_ns for path in attached.rglob("*")}
    monkeypatch.setenv("SAIGAKIT_INPUT_ROOT", str(tmp_path / "input"))
    again = {"save_steps": None, "eval_steps": 100, "resume_from": "saiga-train/02_train"}
    made = train.train_adapter(kill_resume.config_for(tmp_path / "second", **again))
    assert "Resuming from step 5" in capfd.readouterr().out
    assert without_seconds(made) == uninterrupted
    assert {path: path.stat().st_mtime_ns for path in attached.rglob("*")} == before


def test_refuses_to_resume_with_other_settings(ended, tmp_path):
    other = kill_resume.config_for(
        tmp_path / "second", save_steps=None, eval_steps=100, epochs=2, resume_from=ended.output_dir
    )
    with pytest.raises(SaigaError, match=r"a checkpoint of another run \(epochs: 1 there, 2 now\)"):
        train.train_adapter(other)


def test_refuses_to_resume_a_finished_stage(ended, tmp_path):
    made = train.train_adapter(ended)
    config = kill_resume.config_for(tmp_path / "second", save_steps=None, eval_steps=100, resume_from=str(made))
    with pytest.raises(SaigaError, match="has no intact checkpoint"):
        train.train_adapter(config)


@pytest.mark.slow
def test_starts_again_and_reports_a_damaged_checkpoint(ended, uninterrupted, capfd):
    optimizer = Path(ended.output_dir) / "checkpoint" / "state" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-10])
    made = train.train_adapter(ended)
    assert ": state/optimizer.pt changed" in capfd.readouterr().out
    assert without_seconds(made) == uninterrupted


def test_full_disk_ends_training_and_keeps_the_previous_checkpoint(tiny, tmp_path, monkeypatch):
    child = Child(tmp_path, monkeypatch, tiny / "records.jsonl", save_steps=2)
    write, written = torch.save, []

    def full(content, file, *arguments, **more):
        written.append(file)
        if len(written) > 4 and "optimizer" in str(file):  # in the second checkpoint
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
        return write(content, file, *arguments, **more)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        SaigaError, match=r"checkpoint of step 4 cannot be written .* needs [\d,]+ bytes, and [\d,]+ were free"
    ):
        child.run()
    assert checkpoints.step_of(child.store.find_newest()) == 2


@pytest.mark.slow
def test_run_killed_after_stopping_early_does_not_train_further(tiny, tmp_path, monkeypatch):
    worsens = {"learning_rate": 30.0, "epochs": 5, "eval_steps": 2, "early_stopping": 1, "save_steps": 1}
    child = Child(tmp_path, monkeypatch, tiny / "records.jsonl", quantization="none", **worsens)
    child.run()
    adapter, log = child.directory / "adapter_model.safetensors", curve.read_log(child.directory)
    before = sha256(adapter)
    assert checkpoints.step_of(child.store.find_newest()) == log[-1]["step"] < 60
    adapter.unlink()
    child.run()
    assert curve.read_log(child.directory) == log
    assert sha256(adapter) == before
    result = json.loads((child.directory / "result.json").read_text(encoding="utf-8"))
    assert (result["ended"], result["step"]) == ("early_stopping", log[-1]["step"])


def test_time_left_counts_from_the_start_of_the_session(monkeypatch):
    start = workspace.uptime()
    run = run_state.Run(kill_resume.config_for("x", max_hours=1), [], [], None, None, start)
    run.slowest_step_s, run.save_s, run.evaluation_s = 100.0, 200.0, 40.0
    reserve = 100 + 2 * 200 + 40 + run_state.MARGIN_S
    monkeypatch.setattr(workspace, "uptime", lambda: start + HOUR - reserve - 1)
    assert not run.is_out_of_time()
    monkeypatch.setattr(workspace, "uptime", lambda: start + HOUR - reserve + 1)
    assert run.is_out_of_time()


def test_stage_holds_no_temporary_files(ended):
    made = {path.name for path in Path(ended.output_dir).iterdir()}
    assert made == {
        *("adapter_config.json", "adapter_model.safetensors", "checkpoint", "curve.png", "log.jsonl"),
        *("saigakit.json", "samples.md", "train_config.json"),
    }
    assert json.loads((Path(ended.output_dir) / "train_config.json").read_text(encoding="utf-8"))["resume_from"] is None
