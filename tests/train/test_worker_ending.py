"""The real child of a training that is asked to end, or whose wall clock jumps."""

import os
import signal
import sys
import time

import pytest
from small_children import started
from small_trainings import config_for

from saigakit.core import manifest
from saigakit.train import checkpoints

TRAIN = """
from pathlib import Path
from saigakit import train
from saigakit.config import TrainConfig
train.train_adapter(TrainConfig.read(Path({file!r})))
"""


@pytest.fixture
def asked(records, tmp_path):
    """Interrupt a training once it has printed a text; return the seconds to its end and the lines from then on."""

    def asked(text, **settings):
        given = {"quantization": "none", "adapter": None, "epochs": 200, "eval_steps": 1000} | settings
        file = config_for(records, tmp_path, **given).write(tmp_path / "config.json")
        with started(TRAIN.format(file=str(file))) as process:
            while text not in process.stdout.readline():
                assert process.poll() is None
            start = time.monotonic()
            process.send_signal(signal.SIGINT)
            lines = process.stdout.read().splitlines()
        return time.monotonic() - start, lines

    return asked


@pytest.mark.slow
def test_a_training_that_is_asked_while_it_loads_ends_at_once(asked, tmp_path):
    seconds, lines = asked("Training set: ")
    assert lines[-1] == "Ending at once: there is nothing to save yet."
    assert seconds < 30  # all 200 epochs take minutes
    assert not checkpoints.directory_for(tmp_path / "02_train").exists()


@pytest.mark.slow
def test_a_training_that_is_asked_in_a_step_saves_it_and_says_for_how_long(asked, tmp_path):
    _, lines = asked("step 3: checkpoint saved in ", save_steps=1)
    assert "Ending after this step, with a checkpoint: up to 1 s. Interrupt again to end at once." in lines
    assert "interrupted and saved at step" in lines[-1]
    (saved,) = checkpoints.directory_for(tmp_path / "02_train").glob("step-*")
    assert checkpoints.find_problem(saved) is None
    assert f"saved at step {checkpoints.step_of(saved)} of" in lines[-1]


# A wall clock that is put forward by a day some calls after the libraries have been imported.
JUMP = """
import itertools, sys, time
calls, now = itertools.count(), time.time
time.time = lambda: now() + 86400 * ("saigakit.train.worker" in sys.modules and next(calls) > 20)
"""


@pytest.mark.slow
def test_a_clock_that_is_put_forward_does_not_end_a_training(records, tmp_path, monkeypatch):
    from saigakit import train

    (tmp_path / "sitecustomize.py").write_text(JUMP, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    made = train.train_adapter(config_for(records, tmp_path, quantization="none", adapter=None))
    assert manifest.read(made)["training"]["ended"] == "finished"
