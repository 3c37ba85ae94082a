"""Fetch the output of a run with the real kaggle command line against a stub of Kaggle's server."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from kaggle_runs import OUTPUT, finished, stage_output

from saigakit.core import manifest
from saigakit.errors import SaigaError
from saigakit.kaggle import kernels


def wait_until(is_true):
    deadline = time.monotonic() + 30
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_fetch_downloads_the_output_and_the_log(kaggle, tmp_path):
    finished(kaggle, stage_output(tmp_path), log='[{"data": "done"}]')
    run = kernels.fetch("02_train", tmp_path / "run")
    assert (run / "02_train" / "adapter_model.safetensors").read_bytes() == b"weights"
    assert manifest.require_stage(run / "02_train", "02_train")
    assert "done" in (run / "saigakit-02-train.log").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["../../x", "02_train/../../../x", "{outside}/x"])
def test_an_output_outside_the_directory_is_refused(kaggle, tmp_path, name):
    finished(kaggle, stage_output(tmp_path) | {name.format(outside=tmp_path): b"evil"})
    with pytest.raises(SaigaError, match="Refusing to download"):
        kernels.fetch("alice/saigakit-02-train", tmp_path / "fetched" / "run")
    assert not (tmp_path / "fetched" / "run").exists() and not list(tmp_path.rglob("x"))


def test_a_fetched_manifest_that_names_a_file_outside_is_refused(kaggle, tmp_path):
    (tmp_path / "mine.gguf").write_bytes(b"mine")
    output = stage_output(tmp_path)
    content = json.loads(output["02_train/saigakit.json"])
    content["outputs"]["../../../mine.gguf"] = hashlib.sha256(b"mine").hexdigest()
    finished(kaggle, output | {"02_train/saigakit.json": json.dumps(content).encode()})
    with pytest.raises(SaigaError, match=r"'\.\./\.\./\.\./mine\.gguf' is outside"):
        kernels.fetch("alice/saigakit-02-train", tmp_path / "fetched" / "run")


def test_fetch_never_overwrites(kaggle, tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(SaigaError, match="nothing was overwritten"):
        kernels.fetch("alice/saigakit-02-train", tmp_path / "run")


def test_a_damaged_file_leaves_nothing_under_the_final_name(kaggle, tmp_path):
    finished(kaggle, stage_output(tmp_path) | {"02_train/adapter_model.safetensors": b"<html>expired</html>"})
    with pytest.raises(SaigaError, match=r"adapter_model\.safetensors .* arrived damaged"):
        kernels.fetch("alice/saigakit-02-train", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_without_a_login_fetch_says_so_in_one_sentence(kaggle, tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("KAGGLE_KEY")
    with pytest.raises(SaigaError, match=r"^Nobody is logged in to Kaggle"):
        kernels.fetch("alice/saigakit-02-train", tmp_path / "run")
    assert capfd.readouterr().out == ""
    assert list(tmp_path.glob(".run.*")) == []


def test_a_run_without_output_is_an_error(kaggle, tmp_path):
    kaggle.answer(OUTPUT, {"files": []})
    with pytest.raises(SaigaError, match="has no output"):
        kernels.fetch("alice/saigakit-02-train", tmp_path / "run")


def test_a_killed_download_goes_on_where_it_was(kaggle, tmp_path):
    weights = bytes(range(256)) * 20_000
    finished(kaggle, stage_output(tmp_path, **{"model.gguf": weights, "card.md": b"card"}))
    number = next(name for name, content in kaggle.files.items() if content == weights)
    kaggle.stalled[number] = 4_000_000
    command = [sys.executable, "-m", "saigakit.cli", "fetch", "02_train", str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as child:
        wait_until(lambda: sum(file.stat().st_size for file in tmp_path.rglob("model.gguf")) > len(weights) + 1_000_000)
        os.killpg(child.pid, signal.SIGKILL)
    kaggle.released.set()
    kaggle.stalled.clear()
    kaggle.downloads.clear()
    assert not (tmp_path / "run").exists()
    run = kernels.fetch("02_train", tmp_path / "run")
    assert (run / "02_train" / "model.gguf").read_bytes() == weights
    assert max(begin for name, begin in kaggle.downloads if name == number) >= 1_000_000


def test_only_what_was_damaged_is_fetched_again(kaggle, tmp_path):
    files = stage_output(tmp_path, **{"a.bin": b"a" * 1000, "b.bin": b"b" * 1000})
    finished(kaggle, files | {"02_train/a.bin": b"x" * 1000})
    with pytest.raises(SaigaError, match=r"a\.bin of .* arrived damaged\. Run the same command again"):
        kernels.fetch("02_train", tmp_path / "run")
    finished(kaggle, files)
    assert (kernels.fetch("02_train", tmp_path / "run") / "02_train" / "a.bin").read_bytes() == b"a" * 1000


def test_an_output_without_a_finished_stage_is_an_error_and_is_kept(kaggle, tmp_path):
    finished(kaggle, {"02_train.checkpoints/step-00000008/log.jsonl": b"{}"})
    with pytest.raises(SaigaError, match="no finished stage among its output") as caught:
        kernels.fetch("alice/saigakit-02-train", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    kept = str(caught.value).split("which is in ")[1].split(". How")[0]
    assert (tmp_path / kept / "02_train.checkpoints" / "step-00000008" / "log.jsonl").read_bytes() == b"{}"
