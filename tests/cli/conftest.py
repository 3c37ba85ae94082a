"""A finished run of four small notebooks, and copies of it that are run again or interrupted."""

import shutil
import subprocess
import sys
import time

import psutil
import pytest
import small_notebooks
from small_notebooks import RUN, WAIT

from saigakit.cli import runner


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A finished run with its notebooks and output, which tests copy before they change it."""
    place = tmp_path_factory.mktemp("made")
    notebooks = small_notebooks.write(place / "notebooks")
    command = [sys.executable, "-c", RUN, str(place / "run"), str(notebooks)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (place / "printed").write_text(done.stdout + done.stderr, encoding="utf-8")
    return place


@pytest.fixture
def place(made, tmp_path):
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def again(place, capsys):
    """Run the copy again and return the stages that were not reused."""

    def again(parameters=None):
        capsys.readouterr()
        runner.run(parameters or {}, place / "run", notebooks_dir=place / "notebooks")
        printed = capsys.readouterr().out
        return [stage for stage in small_notebooks.STAGES if f"{stage}: done in" in printed]

    return again


@pytest.fixture
def start(place):
    """Start a run that waits in a cell of 02_train, and return its process and that of its kernel."""
    started = []

    def start(*command):
        notebook, signed = place / "notebooks" / "02_train.ipynb", place / "run" / "started"
        if WAIT not in small_notebooks.sources(notebook):
            small_notebooks.insert(notebook, WAIT)
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        while not signed.is_file() or not signed.read_text():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        return process, psutil.Process(int(signed.read_text()))

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def run_command(place):
    return ["-c", RUN, place / "run", place / "notebooks"]
