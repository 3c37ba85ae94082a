"""Kaggle Models as a stand-in that accepts uploads."""

import os

import pytest
from kaggle_stub import MODELS, UPLOAD, KaggleStub


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    pytest.importorskip("kagglesdk")
    stub = KaggleStub()
    for name in [name for name in os.environ if "PROXY" in name.upper() or "KAGGLE" in name]:
        monkeypatch.delenv(name)
    for name, value in stub.environment(tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    stub.answer("blobs.BlobApiService/StartBlobUpload", {"token": "token", "createUrl": UPLOAD})
    for call in ("CreateModel", "CreateModelInstance", "CreateModelInstanceVersion"):
        stub.answer(MODELS + call, {"id": 5, "url": "/m"})
    yield stub
    stub.shutdown()
    stub.server_close()
