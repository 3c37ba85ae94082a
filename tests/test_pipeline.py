"""The complete pipeline on the tiny Saiga as a user runs it (`saigakit run`, papermill, chat), and its failures."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from saigakit.cli import summary
from saigakit.core import manifest

ROOT = Path(__file__).parent.parent


TOKEN = "hf_onlyForTheTests1234567890"


def saigakit(*arguments, text=None, **settings):
    command = [sys.executable, "-m", "saigakit.cli", *map(str, arguments)]
    return subprocess.run(command, input=text, capture_output=True, text=True, encoding="utf-8", **settings)


def params(directory, **values):
    file = directory / "params.yaml"
    file.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    return file


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A complete run with the records of the tutorial and the released adapter in nf4."""
    directory = tmp_path_factory.mktemp("pipeline")
    file = params(directory, model="saiga_tiny", records=str(tiny / "records.jsonl"), epochs=2)
    secrets = os.environ | {"HF_TOKEN": f"{TOKEN}\n", "KAGGLE_KEY": TOKEN.upper()}
    ended = saigakit("run", "-f", file, "--run-dir", directory / "run", cwd=directory, env=secrets)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return directory, ended.stdout


def test_a_run_ends_with_the_table_the_report_and_the_chat_command(finished):
    directory, said = finished
    end = said[said.rindex("model  ") :]
    assert [line.split()[0] for line in end.splitlines()[2:5]] == ["before", "after", "Q4_K_M"]
    assert str(directory / "run" / "report.html") in end
    assert f"saigakit chat {directory / 'run' / '03_merge_gguf' / 'model.gguf'}" in end


def test_no_file_and_no_line_of_a_run_holds_a_secret(finished):
    directory, said = finished
    files = [file for file in directory.rglob("*") if file.is_file()]
    assert len(files) > 20
    leaking = [file for file in files if TOKEN.lower().encode() in file.read_bytes().lower()]
    assert not leaking
    assert TOKEN.lower() not in said.lower()


def test_results_have_the_documented_rows(finished):
    directory, _ = finished
    rows = json.loads((directory / "run" / "results.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in rows] == ["before", "after", "Q4_K_M"]
    assert all(set(row) == {"name", "n", "exact", "json_valid", "f1", "tokens_per_s", "bytes"} for row in rows)
    assert all(0 <= row[share] <= 1 for row in rows for share in ("exact", "json_valid", "f1"))


def test_every_stage_has_a_manifest_an_executed_notebook_and_an_html_page(finished):
    run = finished[0] / "run"
    for stage in summary.STAGES:
        assert manifest.require_stage(run / stage, stage, model="saiga_tiny")["outputs"]
        assert (run / f"{stage}.html").is_file()
        cells = json.loads((run / f"{stage}.ipynb").read_text(encoding="utf-8"))["cells"]
        kinds = {kind for cell in cells for output in cell.get("outputs", []) for kind in output.get("data", {})}
        assert "image/png" in kinds
        assert not [output for cell in cells for output in cell.get("outputs", []) if output.get("name") == "stderr"]
    assert [path.name for path in run.iterdir() if "partial" in path.name] == []


def test_the_merge_notebook_shows_plan_file_sizes_quality_and_memory(finished):
    cells = json.loads((finished[0] / "run" / "03_merge_gguf.ipynb").read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    shown = [output.get("data", {}) for output in outputs]
    said = "".join("".join(output.get("text", "")) for output in outputs)
    said += "".join("".join(data.get("text/plain", "")) for data in shown)
    for part in ("чтение · read", "всего · total", "Read back:", "perplexity", "KL", "6 GiB"):
        assert part in said, part
    assert sum("image/png" in data for data in shown) == 2


def test_a_second_run_reuses_and_reports_every_stage(finished):
    directory, _ = finished
    before = {stage: (directory / "run" / stage).stat().st_mtime_ns for stage in summary.STAGES}
    ended = saigakit("run", "-f", directory / "params.yaml", "--run-dir", directory / "run", cwd=directory)
    assert ended.returncode == 0
    reused = [line.split()[1] for line in ended.stdout.splitlines() if line.endswith(": up to date, reusing it")]
    assert reused == [f"{stage}:" for stage in before]
    assert before == {stage: (directory / "run" / stage).stat().st_mtime_ns for stage in summary.STAGES}


def test_chat_answers_on_the_terminal(finished):
    ended = saigakit("chat", finished[0] / "run" / "03_merge_gguf" / "model.gguf", text="Атом — это частица.\n")
    assert ended.returncode == 0, ended.stderr
    assert len(ended.stdout) > 5
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_a_single_notebook_runs_with_papermill_on_the_earlier_stages(finished, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for stage in ("01_format", "02_train"):
        shutil.copytree(finished[0] / "run" / stage, run / stage)
    file = params(tmp_path, model="saiga_tiny", quant_type="Q8_0", quality_tokens=50, run_dir=str(run))
    command = ["papermill", ROOT / "notebooks" / "03_merge_gguf.ipynb", tmp_path / "out.ipynb", "-f", file]
    subprocess.run([sys.executable, "-m", *map(str, command)], check=True, capture_output=True, cwd=tmp_path)
    made = manifest.require_stage(run / "03_merge_gguf", "03_merge_gguf", model="saiga_tiny")
    assert made["parameters"]["quant_type"] == "Q8_0"


def test_the_last_cell_of_02_can_merge_right_there(finished, tmp_path):
    run = tmp_path / "run"
    for stage in ("01_format", "02_train"):
        shutil.copytree(finished[0] / "run" / stage, run / stage)
    cells = json.loads((ROOT / "notebooks" / "02_train.ipynb").read_text(encoding="utf-8"))["cells"]
    setup, done = ("".join(cell["source"]) for cell in cells if cell["id"] in ("setup", "done"))
    uncommented = [line.removeprefix("# ") for line in done.splitlines() if line.startswith("# ")]
    assert len(uncommented) == 2
    values = {"model": "saiga_tiny", "base_source": None, "run_dir": str(run)}
    exec("\n".join([*setup.splitlines()[:-1], *uncommented]), values)
    assert manifest.require_stage(run / "03_merge_gguf", "03_merge_gguf", model="saiga_tiny")["outputs"]


def failing(tmp_path, *arguments, **settings):
    ended = saigakit(*arguments, **({"cwd": tmp_path} | settings))
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr + ended.stdout
    [sentence] = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    return sentence + ended.stderr


def test_missing_records_are_reported(tmp_path):
    said = failing(tmp_path, "run", "-f", params(tmp_path, model="saiga_tiny", records="none.jsonl"), "--run-dir", "r")
    assert "'none.jsonl' is not there" in said


def test_every_bad_line_of_the_records_is_reported(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"user": "a"}\nне JSON\n', encoding="utf-8")
    said = failing(tmp_path, "run", "-f", params(tmp_path, model="saiga_tiny", records="bad.jsonl"), "--run-dir", "r")
    assert "bad.jsonl:1" in said and "bad.jsonl:2" in said
    assert not (tmp_path / "r" / "01_format").exists()


def test_an_unknown_model_is_answered_with_the_nearest_name(tmp_path, tiny):
    file = params(tmp_path, model="saiga_tyni", records=str(tiny / "records.jsonl"))
    assert "Did you mean 'saiga_tiny'?" in failing(tmp_path, "run", "-f", file, "--run-dir", "r")


@pytest.mark.slow
def test_a_base_that_cannot_be_downloaded_is_reported_with_what_to_attach(tmp_path, tiny):
    file = params(tmp_path, model="saiga2_7b", records=str(tiny / "records.jsonl"))
    nowhere = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "SAIGAKIT_CACHE": str(tmp_path / "cache")}
    said = failing(tmp_path, "run", "-f", file, "--run-dir", "r", env=nowhere)
    assert "base_source" in said and "attach" in said.lower()


@pytest.mark.slow
def test_a_failure_leaves_earlier_results_intact(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished[0] / "run", run)
    before = manifest.hashes(run / "01_format")
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    said = failing(tmp_path, "run", "-f", params(tmp_path, model="saiga_tiny", records="empty.jsonl"), "--run-dir", run)
    assert "empty.jsonl" in said
    assert manifest.hashes(run / "01_format") == before


@pytest.mark.parametrize(
    ("notebook", "needed"), [("02_train", "01_format"), ("03_merge_gguf", "02_train"), ("04_infer", "01_format")]
)
def test_a_notebook_without_its_earlier_stage_names_it(notebook, needed, tmp_path):
    file = params(tmp_path, model="saiga_tiny", run_dir=str(tmp_path / "run"))
    command = ["papermill", ROOT / "notebooks" / f"{notebook}.ipynb", tmp_path / "out.ipynb", "-f", file]
    ended = subprocess.run(
        [sys.executable, "-m", *map(str, command)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert ended.returncode == 1
    assert f"run {needed} first" in ended.stderr.lower()
