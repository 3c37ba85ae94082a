"""Faults of `saigakit kaggle`: what is known in the first minute, and nothing that was finished is lost."""

import json
import shutil
import zipfile

import pyarrow
import pytest
from kaggle_runs import OUTPUT, RECORD, SAVE, STATUS, call, code
from kaggle_stub import DATASETS

from saigakit import cli
from saigakit.kaggle import whole_run


@pytest.mark.parametrize("content", ["", "[5]", '{"02_train": '])
def test_a_damaged_state_file_is_named(run, records, content):
    (records.parent / "run").mkdir()
    (records.parent / "run" / whole_run.STATE).write_text(content, encoding="utf-8")
    ended = call(records)
    assert ended.exit_code == 1 and f"{whole_run.STATE} is damaged" in ended.output, ended.output


@pytest.mark.parametrize("name", ["held_out", "chat_template", "02_train.adapter", "base_source", "importance"])
@pytest.mark.parametrize("is_relative", [False, True])
def test_a_file_that_kaggle_does_not_get_is_refused(run, records, monkeypatch, name, is_relative):
    file = records.with_name("mine.jsonl")
    shutil.copy(records, file)
    if is_relative:
        monkeypatch.chdir(file.parent)
    notebooks = ["--notebooks", str(cli.runner.find_notebooks())]
    ended = call(records, "-p", name, file.name if is_relative else str(file), *notebooks)
    assert ended.exit_code == 1 and "Kaggle" in ended.output and "mine.jsonl" in ended.output, ended.output
    assert run.stub.calls == []


def test_a_second_name_for_the_records_is_refused(run, records):
    ended = call(records, "-p", "records", "others.jsonl")
    assert ended.exit_code == 1 and "records='others.jsonl'" in ended.output, ended.output
    assert run.stub.calls == []


def test_a_released_adapter_is_refused_without_internet(run, records):
    ended = call(records, "--offline", "a/b/transformers/c/1", "--dry-run", model="saiga2_7b")
    assert ended.exit_code == 1 and "-p 02_train.adapter None" in ended.output, ended.output


@pytest.mark.slow
def test_zstd_files_keep_the_name_of_what_is_in_them(run, records):
    packed = records.with_name("ОТЗЫВЫ.JSONL.ZST")

    with pyarrow.output_stream(str(packed), compression="zstd") as stream:
        stream.write(records.read_bytes())
    run.statuses["my-saiga-01-format"] = "ERROR"  # that is enough
    assert "my-saiga-01-format/1 failed" in call(packed).output
    assert '["my-saiga-records/records-1.jsonl.zst"]' in "\n".join(code(run.stub.sent(SAVE)[0]["text"]))


@pytest.mark.slow
def test_a_run_that_cannot_be_followed_is_not_started_again(run, records):
    answer = run.stub.answers[STATUS]
    run.stub.answers[STATUS] = [(403, {"code": 403, "message": "denied"})]
    assert call(records).exit_code == 1
    run.stub.answers[STATUS] = answer
    run.statuses["my-saiga-01-format"] = "ERROR"
    assert "my-saiga-01-format/1 failed" in call(records).output
    assert run.pushed() == ["my-saiga-01-format"]


@pytest.mark.slow
def test_the_model_comes_home_though_04_fails(run, records):
    run.statuses["my-saiga-04-infer"] = "ERROR"
    assert call(records).exit_code == 1
    assert (records.parent / "run" / "03_merge_gguf" / "model.gguf").read_bytes() == b"GGUF"


@pytest.mark.slow
def test_an_earlier_result_stays_until_the_new_one_is_here(run, records):
    run.statuses["my-saiga-02-train"] = "ERROR"
    assert call(records).exit_code == 1
    formatted = records.parent / "run" / "01_format" / "train.jsonl"
    assert formatted.is_file()
    records.write_text(json.dumps(RECORD) + "\n", encoding="utf-8")
    run.stub.answers[OUTPUT] = [(403, {"code": 403, "message": "denied"})]
    assert call(records).exit_code == 1
    assert len(run.pushed()) == 3
    assert formatted.is_file()


@pytest.mark.slow
def test_a_kill_between_download_and_rename_is_survived(run, records):
    run.statuses["my-saiga-02-train"] = "ERROR"
    assert call(records).exit_code == 1
    directory = records.parent / "run"
    arrived = directory / ".alice.my-saiga-01-format.1"
    arrived.mkdir()
    (directory / "01_format").rename(arrived / "01_format")
    state = json.loads((directory / whole_run.STATE).read_text(encoding="utf-8"))
    del state["home"]
    (directory / whole_run.STATE).write_text(json.dumps(state), encoding="utf-8")
    assert "02-train/2 failed" in call(records).output
    assert (directory / "01_format" / "train.jsonl").is_file() and not arrived.exists()


def test_a_notebook_that_runs_already_is_not_pushed_a_second_time(run, records):
    run.stub.answer(STATUS, {"status": "RUNNING"}, {"status": "ERROR"})  # else a second push would be followed for ever
    ended = call(records)
    assert ended.exit_code == 1
    assert "my-saiga-01-format runs on Kaggle already, with other inputs" in ended.output
    assert run.pushed() == []


@pytest.mark.slow
def test_a_push_that_was_made_before_a_kill_is_followed(run, records):
    run.statuses["my-saiga-01-format"] = "ERROR"
    assert call(records).exit_code == 1
    file = records.parent / "run" / whole_run.STATE
    state = json.loads(file.read_text("utf-8"))
    fingerprint = state["01_format"]["fingerprint"]
    state["01_format"] = {"fingerprint": fingerprint, "is": "pushing"}
    file.write_text(json.dumps(state), encoding="utf-8")
    answers = iter(["RUNNING", "ERROR"])
    run.stub.answer(STATUS, lambda _: {"status": next(answers)})
    assert "already running" in call(records).output
    assert run.pushed() == ["my-saiga-01-format"]


def test_records_never_become_a_version_of_a_public_data_set(run, records):
    run.stub.answer(DATASETS + "GetDatasetMetadata", {"info": {"title": "mine"}})  # false is left out
    ended = call(records)
    assert ended.exit_code == 1 and "exists and is public; nothing was uploaded" in ended.output
    assert run.stub.uploads == []


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--name", "saigakit"], "published notebooks"), (["-p", "max_hours", "20"], "kills a session at 12 hours")],
)
def test_what_kaggle_would_spoil_is_refused_before_anything_is_sent(run, records, options, message):
    ended = call(records, *options)
    assert ended.exit_code == 1 and message in ended.output, ended.output
    assert run.stub.calls == []


def test_another_setuptools_does_not_change_the_fingerprint_of_the_wheel(tmp_path):
    hashes = []
    for generator in ("setuptools (80.1)", "setuptools (81.0)"):
        made = tmp_path / "saigakit-0.1.0-py3-none-any.whl"
        with zipfile.ZipFile(made, "w") as archive:
            archive.writestr("saigakit/__init__.py", "")
            archive.writestr("saigakit-0.1.0.dist-info/WHEEL", f"Generator: {generator}")
        hashes.append(whole_run._hash_file(made))
    assert hashes[0] == hashes[1]
