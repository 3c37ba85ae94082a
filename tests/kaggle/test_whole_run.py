"""`saigakit kaggle`: data sets, four notebooks and results, with the real command line against a stub of Kaggle."""

import gzip
import json
import re
import signal
import subprocess
import sys

import pytest
from kaggle_runs import QUOTA, RECORD, SAVE, STAGES, call, code
from kaggle_stub import DATASETS

from saigakit.kaggle import whole_run


def test_one_command_turns_records_into_a_model_here(run, records):
    ended = call(records, "-p", "epochs", "3", "--name", "terms")
    assert ended.exit_code == 0, ended.output
    made = records.parent / "run"
    assert (made / "03_merge_gguf" / "model.gguf").read_bytes() == b"GGUF"
    assert (made / "02_train" / "adapter_model.safetensors").read_bytes() == b"weights"
    assert "log of 03_merge_gguf" in (made / "03_merge_gguf.log").read_text("utf-8")
    assert "saiga_tiny" in (made / "report.html").read_text("utf-8")
    assert ended.output.splitlines()[-1] == f"talk:   saigakit chat {made / '03_merge_gguf' / 'model.gguf'}"
    assert re.search(r"GPU +2\.00h +28\.00h", ended.output)
    assert run.pushed() == ["terms-01-format", "terms-02-train", "terms-03-merge-gguf", "terms-04-infer"]
    require_right_sources(run)


def require_right_sources(run):
    sent = run.stub.sent(SAVE)
    kernels = [[each.removeprefix("alice/terms-") for each in body.get("kernelDataSources", [])] for body in sent]
    assert kernels == [[], ["01-format"], ["01-format", "02-train"], ["01-format", "02-train", "03-merge-gguf"]]
    wheels = "alice/terms-wheels"
    assert [body["datasetDataSources"] for body in sent] == [[wheels, "alice/terms-records"], *[[wheels]] * 3]
    assert [body.get("machineShape") for body in sent] == [None, "NvidiaTeslaT4", None, "NvidiaTeslaT4"]
    assert all(body["isPrivate"] for body in sent)
    assert 'records = ["terms-records/records-1.jsonl"]' in "\n".join(code(sent[0]["text"]))
    assert "epochs = 3" in "\n".join(code(sent[1]["text"]))
    assert "жалобы" not in json.dumps([*sent, *run.stub.sent(DATASETS + "CreateDatasetVersion")], ensure_ascii=False)


@pytest.mark.slow
def test_a_second_call_pushes_nothing_again(run, records):
    assert call(records).exit_code == 0
    calls, uploads = len(run.pushed()), len(run.stub.uploads)
    ended = call(records)
    assert ended.exit_code == 0, ended.output
    assert (len(run.pushed()), len(run.stub.uploads)) == (calls, uploads)


@pytest.mark.slow
def test_changed_records_are_a_new_version_and_a_new_run(run, records):
    assert call(records).exit_code == 0
    uploads = len(run.stub.uploads)
    records.write_text(json.dumps(RECORD) + "\n", encoding="utf-8")
    assert call(records).exit_code == 0
    assert len(run.pushed()) == 8
    assert len(run.stub.uploads) == uploads + 1


@pytest.mark.slow
def test_other_parameters_of_03_repeat_only_what_depends_on_them(run, records):
    assert call(records).exit_code == 0
    assert call(records, "-p", "quant_type", "Q8_0").exit_code == 0
    assert run.pushed()[4:] == ["my-saiga-03-merge-gguf", "my-saiga-04-infer"]


@pytest.mark.slow
def test_a_failed_notebook_ends_the_run_and_is_started_again_by_the_next_call(run, records):
    run.statuses["my-saiga-02-train"] = "ERROR"
    ended = call(records)
    assert ended.exit_code == 1
    assert "my-saiga-02-train/1 failed on Kaggle" in ended.output and "log of 02_train" in ended.output
    assert not (records.parent / "run" / "03_merge_gguf").exists()
    run.statuses.clear()
    assert call(records).exit_code == 0
    assert run.pushed() == [
        f"my-saiga-{slug}" for slug in ("01-format", *["02-train"] * 2, "03-merge-gguf", "04-infer")
    ]


@pytest.mark.slow
def test_a_training_that_ran_out_of_time_goes_on_in_further_sessions(run, records):
    run.endings = ["max_hours", "max_hours", "finished"]
    ended = call(records)
    assert ended.exit_code == 0, ended.output
    trained = [body for body in run.stub.sent(SAVE) if "02-train" in body["slug"]]
    assert [body["slug"].removeprefix("alice/my-saiga-") for body in trained] == [
        "02-train", "02-train-again", "02-train",
    ]  # fmt: skip
    assert [body["kernelDataSources"][1:] for body in trained] == [
        [], ["alice/my-saiga-02-train"], ["alice/my-saiga-02-train-again"],
    ]  # fmt: skip
    assert run.stub.sent(SAVE)[-1]["kernelDataSources"][1] == "alice/my-saiga-02-train"


@pytest.mark.slow
def test_the_results_of_the_last_session_count_when_the_sessions_are_used_up(run, records):
    run.endings = ["max_hours"]
    ended = call(records, "--sessions", "2")
    assert ended.exit_code == 0, ended.output
    assert run.stub.sent(SAVE)[-1]["kernelDataSources"][1] == "alice/my-saiga-02-train-again"
    assert "ended by max_hours" in ended.output


def test_a_dry_run_shows_quota_and_plan_and_sends_nothing(run, records):
    ended = call(records, "--dry-run")
    assert ended.exit_code == 0, ended.output
    assert "28.00h" in ended.output
    for name in ("my-saiga-wheels", "my-saiga-records", *(f"my-saiga-{stage.replace('_', '-')}" for stage in STAGES)):
        assert f"alice/{name}" in ended.output
    assert "NvidiaTeslaT4, up to 3 sessions" in ended.output
    assert {name for name, _ in run.stub.calls} == {QUOTA}
    assert not (records.parent / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-p", "epochs", "drei"], "epochs='drei' is not a number"),
        (["-p", "epoch", "3"], "No notebook has a parameter 'epoch'"),
        (["--name", "Мои термины"], "give 3 to 30 characters of a-z"),
        (["--accelerator", "TpuV6E8"], "no TPU"),
        (["--offline", "alice/saiga"], "owner/model/framework/variation/version"),
    ],
)
def test_what_would_fail_later_is_refused_before_anything_is_sent(run, records, options, message):
    ended = call(records, *options)
    assert ended.exit_code == 1 and message in ended.output, ended.output
    assert run.pushed() == [] and run.stub.uploads == []


def test_damaged_records_are_named_before_anything_is_sent(run, records):
    records.write_text('{"messages": 5}\n', encoding="utf-8")
    ended = call(records)
    assert ended.exit_code == 1 and "жалобы.jsonl:1" in ended.output, ended.output
    assert run.stub.calls == []


@pytest.mark.slow
def test_a_gzip_file_arrives_unpacked(run, records):
    packed = records.with_suffix(".jsonl.gz")
    packed.write_bytes(gzip.compress(records.read_bytes()))
    assert call(packed).exit_code == 0
    assert records.read_bytes() in run.stub.uploads


@pytest.mark.slow
def test_a_run_without_internet_has_its_base_and_all_wheels_attached(run, records, registry):
    ended = call(records, "--offline", "alice/saiga/transformers/7b/2")
    assert ended.exit_code == 0, ended.output
    for body in run.stub.sent(SAVE):
        assert body["enableInternet"] is False
        assert body["modelDataSources"] == ["alice/saiga/transformers/7b/2"]
        assert 'base_source = "saiga/transformers/7b/2"' in "\n".join(code(body["text"]))
    uploaded = {body["name"] for body in run.stub.sent("blobs.BlobApiService/StartBlobUpload")}
    assert {"saigakit-0.1.0-py3-none-any.whl", "gguf-0.19.0-py3-none-any.whl"} <= uploaded


def test_a_local_run_in_the_same_directory_is_never_overwritten(run, records):
    mine = records.parent / "run" / "03_merge_gguf"
    mine.mkdir(parents=True)
    (mine / "model.gguf").write_bytes(b"mine")
    ended = call(records)
    assert ended.exit_code == 1 and "nothing was overwritten" in ended.output
    assert run.stub.calls == []
    assert (mine / "model.gguf").read_bytes() == b"mine"


@pytest.mark.slow
def test_ctrl_c_says_that_the_run_goes_on_and_the_same_command_follows_it(run, records):
    run.statuses["my-saiga-02-train"] = "RUNNING"
    directory = str(records.parent / "run")
    command = [
        sys.executable,
        "-m",
        "saigakit.cli",
        "kaggle",
        str(records),
        "--model",
        "saiga_tiny",
        "--run-dir",
        directory,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        next(line for line in child.stdout if "02-train/1: RUNNING" in line)
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=30)
    assert child.returncode == 130
    assert "alice/my-saiga-02-train/1 goes on there" in errors
    assert "saigakit watch alice/my-saiga-02-train/1" in errors and "saigakit stop alice/my-saiga-02-train/1" in errors
    run.statuses.clear()
    assert call(records).exit_code == 0
    assert len(run.pushed()) == 4


@pytest.mark.slow
def test_everything_for_a_maintainer_is_pushed_as_public_in_order(run, monkeypatch):
    missing = (404, {"code": 404, "message": "none"})
    ready = (200, {"status": "READY"})
    run.stub.answers[DATASETS + "GetDatasetStatus"] = [missing, missing, ready, missing, missing, ready]
    whole_run.push_everything(public=True, poll_s=0.01)
    created = run.stub.sent(DATASETS + "CreateDataset")
    assert [body["slug"] for body in created] == ["saigakit-wheels", "saigakit-example-data"]
    assert run.pushed() == [f"saigakit-{stage.replace('_', '-')}" for stage in STAGES]
    assert not any(body.get("isPrivate") for body in run.stub.sent(SAVE) + created)
