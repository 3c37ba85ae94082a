"""The real kaggle command line against a stub of Kaggle's server."""

import json
import shutil
from pathlib import Path

import kaggle_stub
import pytest
from kaggle_runs import RECORD, FinishedRuns
from kaggle_stub import DATASETS, UPLOAD
from small_wheels import pin, wheel

from saigakit.core import install

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    with kaggle_stub.serving(monkeypatch, tmp_path / "home") as stub:
        yield stub


@pytest.fixture
def folder(tmp_path):
    """Metadata of a kernel and a notebook with one parameter."""
    cells = [("learning_rate = 1e-4", ["parameters"]), ("print(learning_rate)", [])]
    notebook = {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
        "cells": [
            {
                "cell_type": "code",
                "id": f"cell{i}",
                "source": source,
                "outputs": [],
                "execution_count": None,
                "metadata": {"tags": tags},
            }
            for i, (source, tags) in enumerate(cells)
        ],
    }
    made = tmp_path / "stages" / "kernel"
    made.mkdir(parents=True)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "02_train.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    shutil.copy(REPOSITORY / "kaggle-metadata" / "02_train" / "kernel-metadata.json", made)
    return made


@pytest.fixture
def uploads(kaggle):
    kaggle.answer("blobs.BlobApiService/StartBlobUpload", {"token": "token", "createUrl": UPLOAD})
    kaggle.answer(DATASETS + "GetDatasetMetadata", {"info": {"isPrivate": True}})
    for call in ("CreateDataset", "CreateDatasetVersion"):
        kaggle.answer(DATASETS + call, {"status": "ok", "url": "https://kaggle.invalid/d"})
    return kaggle


@pytest.fixture
def registry(tmp_path, monkeypatch) -> Path:
    """A directory of tiny wheels in place of PyPI and GitHub, and pins that allow them."""
    place = tmp_path / "registry"
    rensa = []
    for python in ("311", "312"):
        made = wheel(place, "rensa", "0.5.0", source=f"python = {python}")
        rensa.append(made.rename(place / f"rensa-0.5.0-cp{python}-cp{python}-manylinux_2_28_x86_64.whl"))
    elsewhere = tmp_path / "github"
    llama = {
        kind: wheel(elsewhere, "llama-cpp-python", version)
        for kind, version in (("cpu", "0.3.35"), ("gpu", "0.3.35+cu125"))
    }
    pins = {
        "gguf": pin(wheel(place, "gguf", "0.19.0")),
        "rensa": pin(*rensa),
        "llama-cpp-python": {kind: pin(file, url=file.as_uri()) | {"version": "0.3.35"} for kind, file in llama.items()}
        | {"version": "0.3.35"},
    }
    monkeypatch.setattr(install, "PINS", pins)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(place))
    return place


@pytest.fixture
def run(uploads, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # the setuptools of this environment
    return FinishedRuns(uploads, tmp_path)


@pytest.fixture
def records(tmp_path):
    """Under a private name, which Kaggle must not see."""
    file = tmp_path / "жалобы.jsonl"
    file.write_text(f"{json.dumps(RECORD)}\n" * 3, encoding="utf-8")
    return file
