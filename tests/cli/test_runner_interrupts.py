"""Ctrl-C, SIGTERM and a closed terminal while a notebook runs a child that saves."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import small_notebooks
from small_children import in_a_terminal, read_until
from small_notebooks import has_ended

# A child that needs longer to save than Jupyter gives a kernel to end.
SAVES = """
import os, sys, time
from pathlib import Path
from saigakit.core import launch
with launch.child(), launch.ending_gently():
    Path(sys.argv[1], "started").write_text(str(os.getpid()))
    print("training", flush=True)
    while not launch.is_asked_to_end():
        time.sleep(0.01)
    for _ in range(SECONDS):
        time.sleep(1)
        print("saving", flush=True)
    Path(sys.argv[1], "saved").touch()
"""
CELL = (
    "import sys\nfrom saigakit.core import launch\nlaunch.run([sys.executable, '-c', {code!r}, run_dir], saving=True)"
)
SENTENCE = "Ending after this step, with a checkpoint. Interrupt again to end at once."


def command(place):
    return ["-m", "saigakit.cli", "run", "--run-dir", str(place / "run"), "--notebooks", str(place / "notebooks")]


@pytest.fixture
def start(place):
    """Start a run whose 02_train begins with `cell`, which writes a number into the file `started`."""
    started = []

    def start(cell, prelude=""):
        small_notebooks.insert(place / "notebooks" / "02_train.ipynb", cell)
        call = f"{prelude}\nfrom saigakit.cli.commands import main\nmain({command(place)[2:]!r})"
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen([sys.executable, "-c", call], text=True, start_new_session=True, **pipes)
        started.append(process)
        return process, wait_for(place / "run" / "started", process)

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_for(signed, process):
    while not signed.is_file() or not signed.read_text():
        assert process.poll() is None
        time.sleep(0.02)
    return psutil.Process(int(signed.read_text()))


@pytest.mark.parametrize("number", [pytest.param(signal.SIGHUP, marks=pytest.mark.slow), signal.SIGINT])
def test_an_interrupted_run_lets_the_child_save_and_echoes_it(place, start, number):
    process, child = start(CELL.format(code=SAVES.replace("SECONDS", "3")))
    os.killpg(process.pid, number)
    output, errors = process.communicate(timeout=60)
    assert (place / "run" / "saved").exists()
    lines = output.splitlines()
    assert lines[lines.index("training") + 1 :] == [SENTENCE, *["saving"] * 3]
    assert errors.splitlines() == [
        "interrupted in 02_train; finished stages: 01_format. Run the same command to resume."
    ]
    assert process.returncode == 130
    assert has_ended(child)
    assert not (place / "run" / "02_train.failed.ipynb").exists()


@pytest.mark.slow
def test_a_second_interrupt_ends_the_child_at_once(place, start):
    process, child = start(CELL.format(code=SAVES.replace("SECONDS", "60")))
    os.killpg(process.pid, signal.SIGINT)
    while process.stdout.readline() != f"{SENTENCE}\n":
        assert process.poll() is None
    asked = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    assert has_ended(child)
    assert time.monotonic() - asked < 2
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.startswith("interrupted in 02_train")
    assert not (place / "run" / "saved").exists()


@pytest.mark.slow
def test_closing_the_terminal_lets_the_child_save(place):
    small_notebooks.insert(place / "notebooks" / "02_train.ipynb", CELL.format(code=SAVES.replace("SECONDS", "3")))
    with in_a_terminal(f"from saigakit.cli.commands import main\nmain({command(place)[2:]!r})") as (process, terminal):
        read_until(terminal, "training")
        os.close(terminal)
        process.wait(60)
    assert (place / "run" / "saved").exists()
    assert not (place / "run" / ".02_train.partial.ipynb").exists()


STUBBORN = """\
import os, signal, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.SIG_IGN)
(Path(run_dir) / "started").write_text(str(os.getpid()))
time.sleep(600)"""


@pytest.mark.slow
def test_a_notebook_that_does_not_react_and_does_not_save_is_ended(start):
    process, kernel = start(STUBBORN, "from saigakit.core import launch; launch.PATIENCE_S = 1")
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert "interrupted in 02_train" in errors
    assert has_ended(kernel)


SWALLOWING = """\
try:
    import os, time
    from pathlib import Path
    (Path(run_dir) / "started").write_text(str(os.getpid()))
    time.sleep(600)
except KeyboardInterrupt:
    print("swallowed")"""


@pytest.mark.slow
def test_no_cell_runs_after_one_that_was_interrupted_between_two(place, start):
    process, _ = start(SWALLOWING)
    os.killpg(process.pid, signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert output.splitlines()[-1] == "swallowed"
    assert errors.startswith("interrupted in 02_train")
