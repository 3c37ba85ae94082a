"""Kaggle Models and the Hub as stand-ins that accept uploads."""

import hub_writing_stub
import kaggle_stub
import pytest
from hub_writing_stub import TOKEN
from kaggle_stub import MODELS, UPLOAD


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    with kaggle_stub.serving(monkeypatch, tmp_path / "home") as stub:
        stub.answer("blobs.BlobApiService/StartBlobUpload", {"token": "token", "createUrl": UPLOAD})
        for call in ("CreateModel", "CreateModelInstance", "CreateModelInstanceVersion"):
            stub.answer(MODELS + call, {"id": 5, "url": "/m"})
        yield stub


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    home = tmp_path_factory.mktemp("hf_home")
    with hub_writing_stub.serving(TOKEN) as hub, hub_writing_stub.pushing(hub.endpoint, home) as run:
        yield hub, run


@pytest.fixture
def hub(served):
    served[0].clear()
    return served[0]
