"""Push, watch and fetch with the real kaggle command line against a stub of Kaggle's server."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from kaggle_stub import DATASETS, KERNELS, UPLOAD, KaggleStub
from small_wheels import pretend_installed
from terminal_output import control_characters, run_on_terminal

from saigakit import cli
from saigakit.core import install, manifest
from saigakit.errors import SaigaError
from saigakit.kaggle import kernels

pytest.importorskip("kagglesdk")
REPOSITORY = Path(__file__).parents[2]
STAGES = ("01_format", "02_train", "03_merge_gguf", "04_infer")
PUSHED = {"ref": "/code/alice/x", "url": "https://kaggle.invalid/code/alice/x", "versionNumber": 1}
STATUS, OUTPUT = KERNELS + "GetKernelSessionStatus", KERNELS + "ListKernelSessionOutput"


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    stub = KaggleStub()
    for name in [name for name in os.environ if "PROXY" in name.upper() or "KAGGLE" in name]:
        monkeypatch.delenv(name)
    for name, value in stub.environment(tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    yield stub
    stub.shutdown()
    stub.server_close()


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


def code(text):
    return ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_pushed_stage_arrives_as_its_metadata_says(kaggle, stage):
    kaggle.answer(KERNELS + "SaveKernel", PUSHED)
    slug = "alice/saigakit-" + stage.replace("_", "-")
    assert kernels.push(stage, {"model": "saiga_tiny"}) == slug
    [sent] = kaggle.sent(KERNELS + "SaveKernel")
    earlier = ["alice/saigakit-" + other.replace("_", "-") for other in STAGES[: STAGES.index(stage)]]
    assert (sent["slug"], sent["newTitle"]) == (slug, slug.removeprefix("alice/").replace("-", " "))
    gpu = stage in ("02_train", "04_infer")
    assert (sent.get("enableGpu", False), sent.get("machineShape")) == (gpu, "NvidiaTeslaT4" if gpu else None)
    assert "alice/saigakit-wheels" in sent["datasetDataSources"]
    assert sent.get("kernelDataSources", []) == earlier
    assert sent["isPrivate"] is True and sent["enableInternet"] is True
    [injected] = set(code(sent["text"])) - set(code((REPOSITORY / "notebooks" / f"{stage}.ipynb").read_text("utf-8")))
    assert injected.splitlines() == ["# Parameters", 'model = "saiga_tiny"']


def test_a_pushed_notebook_contains_its_parameters(kaggle, folder):
    kaggle.answer(KERNELS + "SaveKernel", PUSHED)
    kernels.push(folder, {"learning_rate": 3e-4})
    text = kaggle.sent(KERNELS + "SaveKernel")[0]["text"]
    values = {}
    exec("\n".join(code(text)[:2]), values)
    assert values["learning_rate"] == 3e-4
    assert str(folder.parent.parent) not in text


def test_an_unknown_parameter_is_refused_before_anything_is_sent(kaggle, folder):
    with pytest.raises(SaigaError, match="no parameter learn_rate; it has learning_rate"):
        kernels.push(folder, {"learn_rate": 3e-4})
    assert kaggle.calls == []


def test_a_refused_push_is_an_error_despite_exit_status_0(kaggle, folder):
    kaggle.answer(KERNELS + "SaveKernel", {"error": "Maximum batch GPU session count of 2 reached."})
    with pytest.raises(SaigaError, match=r"refused .*batch GPU session count of 2 reached"):
        kernels.push(folder)


@pytest.mark.parametrize(
    ("kind", "word"), [("invalidDatasetSources", "dataset sources"), ("invalidKernelSources", "kernel sources")]
)
def test_a_dropped_source_is_an_error_despite_exit_status_0(kaggle, folder, kind, word):
    kaggle.answer(KERNELS + "SaveKernel", PUSHED | {kind: ["alice/saigakit-gone"]})
    with pytest.raises(SaigaError, match=rf"{word}.*alice/saigakit-gone"):
        kernels.push(folder)


def test_a_server_error_is_reported_with_the_command(kaggle, folder):
    kaggle.answer(KERNELS + "SaveKernel", {"code": 409, "message": "The slug is taken"}, code=409)
    with pytest.raises(SaigaError, match=r"kernels push .* failed: .*409"):
        kernels.push(folder)


def test_without_a_login_the_error_says_how_to_log_in(kaggle, folder, monkeypatch):
    monkeypatch.delenv("KAGGLE_KEY")
    with pytest.raises(SaigaError, match="kaggle auth login"):
        kernels.push(folder)


def test_an_unknown_stage_is_refused_with_the_known_ones(kaggle):
    with pytest.raises(SaigaError, match="01_format, 02_train, 03_merge_gguf, 04_infer"):
        kernels.push("05_profit")


def test_watch_shows_each_status_once_and_returns_when_complete(kaggle, capsys):
    kaggle.answer(STATUS, {"status": "QUEUED"}, {"status": "RUNNING"}, {"status": "RUNNING"}, {"status": "COMPLETE"})
    kernels.watch("02_train", poll_s=0.01)
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in shown] == ["QUEUED", "RUNNING", "COMPLETE"]
    assert all(line.startswith("alice/saigakit-02-train:") for line in shown)


def test_a_failed_run_raises_with_kaggles_message_and_the_end_of_the_log(kaggle):
    kaggle.answer(STATUS, {"status": "ERROR", "failureMessage": "Your notebook ran out of memory"})
    lines = [{"stream_name": "stderr", "time": i, "data": f"line {i}\n"} for i in range(30)]
    kaggle.answer(OUTPUT, {"files": [], "log": json.dumps(lines)})
    with pytest.raises(SaigaError, match=r"ran out of memory") as caught:
        kernels.watch("alice/saigakit-02-train", poll_s=0.01)
    assert "line 29" in str(caught.value) and "line 14\n" not in str(caught.value)


def test_the_log_of_a_failed_run_reaches_a_terminal_without_control_characters(kaggle):
    kaggle.answer(STATUS, {"status": "ERROR", "failureMessage": "\x1b]0;evil\x07"})
    lines = [{"data": "loss 0.5\x1b]52;c;ZXZpbA==\x07\u202e\x9b\n"}]
    kaggle.answer(OUTPUT, {"files": [], "log": json.dumps(lines)})
    written = run_on_terminal("-m", "saigakit.cli", "watch", "alice/saigakit-02-train")
    assert b"]0;evil" in written and b"loss 0.5]52;c;" in written
    assert control_characters(written) == set()
    with pytest.raises(SaigaError) as caught:
        kernels.watch("alice/saigakit-02-train")
    assert control_characters(str(caught.value).encode()) == set()


def test_a_cancelled_run_is_an_error(kaggle):
    kaggle.answer(STATUS, {"status": "CANCEL_ACKNOWLEDGED"})
    with pytest.raises(SaigaError, match="was cancelled"):
        kernels.watch("alice/saigakit-02-train", poll_s=0.01)


def test_a_failed_poll_does_not_end_watching(kaggle, capsys):
    kaggle.answers[STATUS] = [(200, {"status": "RUNNING"}), (400, {}), (200, {"status": "COMPLETE"})]
    kernels.watch("alice/saigakit-02-train", poll_s=0.01)
    assert "does not answer" in capsys.readouterr().out


def test_watching_an_unknown_notebook_fails_at_once(kaggle):
    with pytest.raises(SaigaError, match="404"):
        kernels.watch("alice/saigakit-99-none", poll_s=0.01)


def finished(stub, files, log="[]"):
    """Let the stub serve these files as the output of a finished run."""
    stub.files = {str(number): content for number, content in enumerate(files.values())}
    listed = [{"url": f"http://files.invalid/{number}", "fileName": name} for number, name in enumerate(files)]
    stub.answer(OUTPUT, {"files": listed, "log": log})


def stage_output(tmp_path):
    with manifest.making(tmp_path / "02_train", stage="02_train", parameters={}, inputs={}) as made:
        (made / "adapter_model.safetensors").write_bytes(b"weights")
    return {f"02_train/{file.name}": file.read_bytes() for file in (tmp_path / "02_train").iterdir()}


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


def test_a_run_without_output_is_an_error(kaggle, tmp_path):
    kaggle.answer(OUTPUT, {"files": []})
    with pytest.raises(SaigaError, match="has no output"):
        kernels.fetch("alice/saigakit-02-train", tmp_path / "run")


@pytest.fixture
def uploads(kaggle):
    kaggle.answer("blobs.BlobApiService/StartBlobUpload", {"token": "token", "createUrl": UPLOAD})
    for call in ("CreateDataset", "CreateDatasetVersion"):
        kaggle.answer(DATASETS + call, {"status": "ok", "url": "https://kaggle.invalid/d"})
    return kaggle


def test_a_new_data_set_is_created_as_private_and_awaited(uploads, tmp_path):
    wheel = tmp_path / "saigakit-0.1.0-py3-none-any.whl"
    wheel.write_bytes(b"wheel")
    missing, status = (404, {"code": 404, "message": "none"}), DATASETS + "GetDatasetStatus"
    # Requested by saigakit, by the command line itself, and then until the data set is ready.
    uploads.answers[status] = [missing, missing, (200, {"status": "BLOBS_RECEIVED"}), (200, {"status": "READY"})]
    assert kernels.push_dataset("wheels", [wheel], poll_s=0.01) == "alice/saigakit-wheels"
    [sent] = uploads.sent(DATASETS + "CreateDataset")
    assert sent["ownerSlug"] == "alice" and sent["isPrivate"] is True
    assert uploads.uploads == [b"wheel"]


def test_an_existing_data_set_gets_a_new_version(uploads):
    uploads.answer(DATASETS + "GetDatasetStatus", {"status": "READY"})
    kernels.push_dataset("example-data", poll_s=0.01)
    assert len(uploads.sent(DATASETS + "CreateDatasetVersion")) == 1
    assert uploads.uploads == [(REPOSITORY / "kaggle-metadata/example-data/records.jsonl").read_bytes()]


def test_a_refused_data_set_is_an_error_despite_exit_status_0(uploads):
    uploads.answer(DATASETS + "GetDatasetStatus", {"status": "READY"})
    uploads.answer(DATASETS + "CreateDatasetVersion", {"status": "error", "error": "Incompatible dataset type"})
    with pytest.raises(SaigaError, match="Incompatible dataset type"):
        kernels.push_dataset("example-data", poll_s=0.01)


def test_saigakit_push_uploads_a_data_set_with_its_files(uploads, tmp_path):
    wheel = tmp_path / "saigakit.whl"
    wheel.write_bytes(b"wheel")
    uploads.answer(DATASETS + "GetDatasetStatus", {"status": "READY"})
    ended = CliRunner().invoke(cli.main, ["push", "wheels", str(wheel)])
    assert ended.exit_code == 0, ended.output
    assert uploads.uploads == [b"wheel"]


def test_saigakit_push_starts_a_notebook_with_its_parameters(kaggle):
    kaggle.answer(KERNELS + "SaveKernel", PUSHED)
    ended = CliRunner().invoke(cli.main, ["push", "02_train", "-p", "epochs", "3"])
    assert ended.exit_code == 0, ended.output
    assert "epochs = 3" in "\n".join(code(kaggle.sent(KERNELS + "SaveKernel")[0]["text"]))


@pytest.mark.parametrize(("name", "message"), [("wheels", "is not there"), ("02_train", "takes no files")])
def test_files_that_cannot_be_pushed_are_refused_before_anything_is_sent(kaggle, name, message):
    ended = CliRunner().invoke(cli.main, ["push", name, "dist/none.whl"])
    assert ended.exit_code == 1 and message in ended.output and "none.whl" in ended.output
    assert kaggle.calls == []


@pytest.mark.parametrize(
    "arguments", [["push", "02_train"], ["push", "example-data"], ["watch", "me/x"], ["fetch", "me/x", "out"]]
)
def test_a_kaggle_command_that_is_too_old_is_never_called(kaggle, tmp_path, monkeypatch, arguments):
    """2.2.4 would write a file of an output that is called ../name outside the directory."""
    monkeypatch.setattr(install.metadata, "requires", {"saigakit": ['kaggle>=2.2.5; extra == "kaggle"']}.get)
    pretend_installed(monkeypatch, tmp_path, "kaggle", "2.2.4")
    ended = CliRunner().invoke(cli.main, arguments)
    needed = "kaggle>=2.2.5 instead of 2.2.4. Run: pip install 'saigakit[kaggle,run]'"
    assert (ended.exit_code, ended.output) == (1, f"error: This needs {needed}\n")
    assert kaggle.calls == []


def test_a_data_set_without_files_is_not_uploaded(uploads):
    with pytest.raises(SaigaError, match="nothing to upload"):
        kernels.push_dataset("wheels")
    assert uploads.calls == []
