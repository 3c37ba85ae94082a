"""Data sets with the real kaggle command line against a stub of Kaggle's server."""

from pathlib import Path

import pytest
from click.testing import CliRunner
from kaggle_stub import DATASETS
from small_wheels import wheel

from saigakit import cli
from saigakit.errors import SaigaError
from saigakit.kaggle import datasets

REPOSITORY = Path(__file__).parents[2]


def test_a_new_data_set_is_created_as_private_and_awaited(uploads, tmp_path):
    own = wheel(tmp_path, "saigakit", "0.1.0")
    missing, status = (404, {"code": 404, "message": "none"}), DATASETS + "GetDatasetStatus"
    # Requested by saigakit, by the command line itself, and then until the data set is ready.
    uploads.answers[status] = [missing, missing, (200, {"status": "BLOBS_RECEIVED"}), (200, {"status": "READY"})]
    assert datasets.push_dataset("wheels", [own], poll_s=0.01) == "alice/saigakit-wheels"
    [sent] = uploads.sent(DATASETS + "CreateDataset")
    assert sent["ownerSlug"] == "alice" and sent["isPrivate"] is True
    assert uploads.uploads == [own.read_bytes()]


def test_an_existing_data_set_gets_a_new_version(uploads):
    uploads.answer(DATASETS + "GetDatasetStatus", {"status": "READY"})
    datasets.push_dataset("example-data", poll_s=0.01)
    assert len(uploads.sent(DATASETS + "CreateDatasetVersion")) == 1
    assert uploads.uploads == [(REPOSITORY / "kaggle-metadata/example-data/records.jsonl").read_bytes()]


def test_a_refused_data_set_is_an_error_despite_exit_status_0(uploads):
    uploads.answer(DATASETS + "GetDatasetStatus", {"status": "READY"})
    uploads.answer(DATASETS + "CreateDatasetVersion", {"status": "error", "error": "Incompatible dataset type"})
    with pytest.raises(SaigaError, match="Incompatible dataset type"):
        datasets.push_dataset("example-data", poll_s=0.01)


def test_saigakit_push_uploads_a_data_set_with_its_files(uploads, tmp_path):
    own = wheel(tmp_path, "saigakit", "0.1.0")
    uploads.answer(DATASETS + "GetDatasetStatus", {"status": "READY"})
    ended = CliRunner().invoke(cli.main, ["push", "wheels", str(own)])
    assert ended.exit_code == 0, ended.output
    assert uploads.uploads == [own.read_bytes()]


@pytest.mark.parametrize(("name", "message"), [("wheels", "is not there"), ("02_train", "takes no files")])
def test_files_that_cannot_be_pushed_are_refused_before_anything_is_sent(kaggle, name, message):
    ended = CliRunner().invoke(cli.main, ["push", name, "dist/none.whl"])
    assert ended.exit_code == 1 and message in ended.output and "none.whl" in ended.output
    assert kaggle.calls == []


def test_a_data_set_without_files_is_not_uploaded(uploads):
    with pytest.raises(SaigaError, match="nothing to upload"):
        datasets.push_dataset("wheels")
    assert uploads.calls == []


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["records.jsonl"], "records.jsonl is not a wheel"),
        (["broken.whl"], "broken.whl is not a wheel"),
        (["rensa"], "exactly one wheel of saigakit, and there is none"),
        (["saigakit", "saigakit-0.2.0"], "these are 2: saigakit-0.1.0-py3-none-any.whl, saigakit-0.2.0"),
    ],
)
def test_files_that_the_notebooks_could_not_install_are_not_uploaded_as_wheels(uploads, tmp_path, names, message):
    files = []
    for name in names:
        if "." in name and not name.startswith("saigakit"):
            files.append(tmp_path / name)
            files[-1].write_bytes(b"{}")
        else:
            package, _, version = name.partition("-")
            files.append(wheel(tmp_path, package, version or "0.1.0"))
    with pytest.raises(SaigaError) as caught:
        datasets.push_dataset("wheels", files)
    assert message in str(caught.value)
    assert uploads.uploads == []


def test_a_public_data_set_is_public(uploads):
    missing = (404, {"code": 404, "message": "none"})
    uploads.answers[DATASETS + "GetDatasetStatus"] = [missing, missing, (200, {"status": "READY"})]
    datasets.push_dataset("example-data", public=True, poll_s=0.01)
    [sent] = uploads.sent(DATASETS + "CreateDataset")
    assert not sent.get("isPrivate", False)
