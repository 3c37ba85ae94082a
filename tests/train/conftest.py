"""The records of the tiny Saiga, and trainings in this process."""

from pathlib import Path

import pytest

from saigakit.core import launch
from saigakit.train import worker


@pytest.fixture(scope="module")
def records(tiny) -> Path:
    return tiny / "records.jsonl"


@pytest.fixture
def in_this_process(monkeypatch) -> None:
    monkeypatch.setattr(launch, "distributed", lambda _, arguments, **__: worker.main(Path(arguments[0])))
