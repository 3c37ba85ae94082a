"""Faults of this machine and of the connection, as the kaggle command line meets them."""

from pathlib import Path

import pytest
from kaggle_runs import QUOTA

from saigakit.errors import SaigaError
from saigakit.kaggle import command_line, notebook


def test_an_answer_that_never_comes_ends_the_question():
    with pytest.raises(command_line.NoAnswerError, match="did not answer alice/terms within 0 s"):
        command_line.run_python("-c", "import time; time.sleep(60)", "alice/terms", limit_s=0.2)


def test_a_command_that_goes_on_ends_at_the_line_that_is_waited_for():
    code = "print('Installing', 'Kaggle session  1', 'loss', sep='\\n'); import time; time.sleep(60)"
    assert command_line.run_python("-c", code, until="Kaggle session") == "Kaggle session  1\n"


def test_a_full_disk_is_named():
    full = "import sys; sys.exit('OSError: [Errno 28] No space left on device')"
    with pytest.raises(SaigaError, match=r"The disk is full .* Free some space"):
        command_line.run_python("-c", full, "alice/terms")


def test_a_refused_quota_names_no_word_of_the_command(kaggle):
    kaggle.answer(QUOTA, {"code": 404, "message": "none"}, code=404)
    with pytest.raises(SaigaError, match="Kaggle refused the request: none"):
        command_line.quota()


def test_without_a_clone_the_message_says_what_to_get(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(notebook, "_ROOTS", (Path("kaggle-metadata"),))
    assert notebook.is_dataset("wheels")
    with pytest.raises(SaigaError, match="Run this in a clone of saigakit, which has the directory kaggle-metadata"):
        notebook.find_folder("02_train")
