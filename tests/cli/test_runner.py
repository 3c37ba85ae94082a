"""Runs of four small notebooks with the real papermill and real kernels."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import small_notebooks
from small_notebooks import RUN, WAIT, has_ended

from saigakit.cli import execution, runner, summary
from saigakit.core import manifest
from saigakit.demo import packages
from saigakit.errors import SaigaError


def everything(directory):
    return {str(file): file.read_bytes() for file in sorted(directory.rglob("*")) if file.is_file()}


def test_run_writes_stages_notebooks_pages_and_report(made):
    for stage in small_notebooks.STAGES:
        assert manifest.require_stage(made / "run" / stage, stage)
        assert f"cell of {stage}" in (made / "run" / f"{stage}.ipynb").read_text(encoding="utf-8")
        assert (made / "run" / f"{stage}.html").is_file()
    assert set(json.loads((made / "run" / summary.TIMES_FILE).read_text(encoding="utf-8"))) == {*small_notebooks.STAGES}
    assert (made / "run" / "report.html").is_file()
    assert [path.name for path in (made / "run").iterdir() if "partial" in path.name] == []


def test_run_echoes_the_output_of_cells(made):
    lines = (made / "printed").read_text(encoding="utf-8").splitlines()
    start = lines.index("[2/4] 02_train …")
    assert lines[start + 1] == "cell of 02_train"
    assert lines[start + 2].startswith("[2/4] 02_train: done in ")


def test_run_ends_with_table_report_and_chat_command(made):
    printed = (made / "printed").read_text(encoding="utf-8")
    assert "before (base model, transformers)" in printed
    assert printed.rstrip().endswith(f"talk:   saigakit chat {made / 'run' / '03_merge_gguf' / 'model.gguf'}")


def test_run_prints_no_warnings(made):
    assert "WARNING" not in (made / "printed").read_text(encoding="utf-8")


def test_page_shows_the_code_and_loads_nothing_from_the_network(made):
    page = (made / "run" / "01_format.html").read_text(encoding="utf-8")
    assert ">making</span>" in page and "<title>01_format</title>" in page
    assert "src=" not in page and "<script" not in page


def test_unchanged_run_reuses_every_stage(again):
    assert again() == []


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b'{"fingerprint": 1}', b"null"])
def test_damaged_state_is_written_again(again, place, content):
    for name in ("times.json", "02_train.json"):
        (place / "run" / ".runner" / name).write_bytes(content)
    assert again() == ["02_train"]
    assert again() == []


def test_changed_parameter_reruns_its_stage_and_the_following(again, place):
    assert again({"learning_rate": 0.5}) == ["02_train", "03_merge_gguf", "04_infer"]
    assert "0.5" in (place / "run" / "02_train" / "out.txt").read_text(encoding="utf-8")


def test_identical_output_of_a_stage_keeps_the_following_ones(again, place):
    small_notebooks.insert(place / "notebooks" / "02_train.ipynb", "pass")
    assert again() == ["02_train"]


def test_changed_output_reruns_its_stage(again, place):
    file = place / "run" / "04_infer" / "out.txt"
    before = file.read_bytes()
    file.write_bytes(b"damaged")
    assert again() == ["04_infer"]
    assert file.read_bytes() == before


def test_changed_input_file_reruns_its_stage(again, place):
    records = place / "records.jsonl"
    records.write_text("a", encoding="utf-8")
    assert again({"records": str(records)})[0] == "01_format"
    assert again({"records": str(records)}) == []
    records.write_text("b", encoding="utf-8")
    assert again({"records": str(records)}) == ["01_format"]


@pytest.mark.slow
def test_changed_file_of_a_list_reruns_its_stage(again, place):
    files = [place / "a.jsonl", place / "b.jsonl"]
    for file in files:
        file.write_text("a", encoding="utf-8")
    assert again({"records": list(map(str, files))})[0] == "01_format"
    assert again({"records": list(map(str, files))}) == []
    files[1].write_text("b", encoding="utf-8")
    assert again({"records": list(map(str, files))}) == ["01_format"]


@pytest.mark.slow
def test_another_version_of_saigakit_reruns_everything(again, monkeypatch):
    monkeypatch.setattr("saigakit.__version__", "9.9.9")
    assert again() == [*small_notebooks.STAGES]


def test_other_records_of_the_demo_rerun_their_stage(again, monkeypatch):
    values = {"records": "package:saiga_tiny/records.jsonl"}
    again(values)
    assert again(values) == []
    monkeypatch.setattr(packages, "fingerprint", lambda: "another")
    assert again(values) == ["01_format"]


def test_failed_replacement_leaves_the_stage_intact(again, place):
    before = everything(place / "run" / "02_train")
    notebook = place / "notebooks" / "02_train.ipynb"
    fail = "(made / 'out.txt').write_text('half')\n        raise OSError('no space')"
    small_notebooks.save(
        notebook, [cell.replace("        pass", f"        {fail}") for cell in small_notebooks.sources(notebook)]
    )
    with pytest.raises(SaigaError, match="02_train failed:"):
        again({"learning_rate": 0.5})
    assert everything(place / "run" / "02_train") == before


def failing(place, source):
    small_notebooks.insert(place / "notebooks" / "03_merge_gguf.ipynb", source)
    with pytest.raises(SaigaError) as caught:
        runner.run({}, place / "run", notebooks_dir=place / "notebooks")
    return str(caught.value)


def test_saiga_error_of_a_notebook_is_the_complete_message(place):
    said = (
        "from saigakit import DataError\nraise DataError('2 bad records', ['a.jsonl:1: no role', 'a.jsonl:7: empty'])"
    )
    assert failing(place, said) == "2 bad records\n  a.jsonl:1: no role\n  a.jsonl:7: empty"


def test_other_failure_shows_its_last_lines_and_the_notebook(place):
    message = failing(place, "1 / 0")
    failed = place / "run" / "03_merge_gguf.failed.ipynb"
    assert "ZeroDivisionError: division by zero" in message and "\x1b" not in message
    assert message.endswith(str(failed)) and "ZeroDivisionError" in failed.read_text(encoding="utf-8")


def test_an_error_of_a_library_that_quotes_a_token_is_masked(place, monkeypatch, capsys):
    monkeypatch.setenv("SOME_API_KEY", "of-the-tests-1234\n")
    message = failing(place, "import os\nraise ValueError('Illegal header ' + repr(os.environ['SOME_API_KEY']))")
    failed = (place / "run" / "03_merge_gguf.failed.ipynb").read_text(encoding="utf-8")
    shown = capsys.readouterr()
    assert "ValueError: Illegal header '…" in message and "Illegal header" in failed
    assert "of-the-tests-1234" not in message + failed + shown.out + shown.err


def test_success_removes_the_failed_notebook(place, again):
    failing(place, "1 / 0")
    small_notebooks.save(
        place / "notebooks" / "03_merge_gguf.ipynb",
        [cell for cell in small_notebooks.sources(place / "notebooks" / "03_merge_gguf.ipynb") if cell != "1 / 0"],
    )
    again()
    assert not (place / "run" / "03_merge_gguf.failed.ipynb").exists()


def test_killed_kernel_is_one_message(place):
    message = failing(place, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    assert "03_merge_gguf: the notebook's kernel was lost (Kernel died)" in message


def test_notebook_that_ends_early_is_a_failure(place):
    shutil.rmtree(place / "run" / "03_merge_gguf")
    assert "finished without a complete result" in failing(place, "import sys\nsys.exit(0)")


def test_refuses_an_unknown_parameter_before_running(made, tmp_path):
    with pytest.raises(
        SaigaError, match=r"'learn_rate'\. Did you mean 'learning_rate'\? They have: learning_rate, mod"
    ):
        runner.run({"learn_rate": 1}, tmp_path / "run", notebooks_dir=made / "notebooks")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "said"), [({"model": "saiga_tyni"}, "Did you mean 'saiga_tiny'"), ({"quant_type": "Q4KM"}, "Q4_K_M")]
)
def test_refuses_before_the_first_stage_what_would_fail_later(made, tmp_path, given, said):
    with pytest.raises(SaigaError, match=said):
        runner.run(given, tmp_path / "run", notebooks_dir=made / "notebooks")
    assert not (tmp_path / "run").exists()


def test_refuses_a_value_that_notebooks_cannot_hold(made, tmp_path):
    with pytest.raises(SaigaError, match="is not text"):
        runner.run({"model": {"a"}}, tmp_path / "run", notebooks_dir=made / "notebooks")


def test_parameter_can_be_for_one_notebook(made):
    stages = runner.read_stages(made / "notebooks", {"model": "a", "02_train.model": "b"})
    assert [stage.values["model"] for stage in stages] == ["a", "b", "a", "a"]


def test_refuses_an_ambiguous_parameter(place):
    notebook = place / "notebooks" / "03_merge_gguf.ipynb"
    first, *rest = small_notebooks.sources(notebook)
    small_notebooks.save(notebook, [f"{first}\nlearning_rate = 'fast'", *rest])
    with pytest.raises(
        SaigaError, match=r"02_train\.learning_rate \(0\.001\), 03_merge_gguf\.learning_rate \('fast'\)"
    ):
        runner.read_stages(place / "notebooks", {"learning_rate": 1})


@pytest.mark.slow
def test_path_may_contain_braces(made, tmp_path):
    report = runner.run({}, tmp_path / "{a} b", notebooks_dir=made / "notebooks")
    assert report == tmp_path / "{a} b" / "report.html" and report.is_file()


def test_kernel_uses_this_interpreter(place, monkeypatch):
    foreign = place / "jupyter" / "kernels" / "python3"
    foreign.mkdir(parents=True)
    spec = {"argv": ["/bin/false", "{connection_file}"], "display_name": "x", "language": "python"}
    (foreign / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")
    monkeypatch.setenv("JUPYTER_PATH", str(place / "jupyter"))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(place / "jupyter"))
    failed = failing(place, "import sys\nfrom saigakit import SaigaError\nraise SaigaError(sys.executable)")
    assert Path(failed).samefile(sys.executable)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_names_finished_stages_and_can_resume(place, start, again, number):
    command = ["-m", "saigakit.cli", "run", "--run-dir", place / "run", "--notebooks", place / "notebooks"]
    process, kernel = start(*command)
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines() == ["interrupted in 02_train; finished stages: 01_format. Run the same command to resume."]
    assert has_ended(kernel)
    assert not (place / "run" / ".02_train.partial.ipynb").exists()
    (place / "run" / "go").touch()
    assert again() == ["02_train"]


def test_interrupted_run_kills_the_children_of_the_notebook(place, start, run_command):
    child = """\
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
(Path(run_dir) / "child").write_text(str(child.pid))"""
    small_notebooks.insert(place / "notebooks" / "02_train.ipynb", f"from pathlib import Path\n{child}")
    small_notebooks.insert(place / "notebooks" / "02_train.ipynb", WAIT, place=2)
    process, _ = start(*run_command)
    started = psutil.Process(int((place / "run" / "child").read_text()))
    os.killpg(process.pid, signal.SIGINT)
    try:
        assert has_ended(started)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            started.kill()


@pytest.mark.slow
def test_killed_run_leaves_stages_intact_and_the_next_one_works(place, start, run_command, again):
    before = everything(place / "run" / "02_train")
    process, kernel = start(*run_command)
    process.kill()
    process.communicate()
    assert everything(place / "run" / "02_train") == before
    (place / "run" / "go").touch()
    assert again() == ["02_train"]
    assert has_ended(kernel)


def test_next_run_waits_for_the_kernel_of_a_killed_one(place, start, run_command, monkeypatch):
    process, kernel = start(*run_command)
    kernel.suspend()  # so that it does not notice
    process.kill()
    process.communicate()
    (place / "run" / "go").touch()
    monkeypatch.setattr(runner, "_LOCK_PATIENCE_S", 0.0)
    try:
        with pytest.raises(SaigaError, match="Another run is using"):
            runner.run({}, place / "run", notebooks_dir=place / "notebooks")
    finally:
        kernel.kill()


@pytest.mark.slow
def test_refuses_two_runs_in_one_directory(place, start, run_command):
    start(*run_command)
    impatient = f"from saigakit.cli import runner; runner._LOCK_PATIENCE_S = 0.2; {RUN}"
    command = [sys.executable, "-c", impatient, place / "run", place / "notebooks"]
    second = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "Another run is using" in second.stderr.splitlines()[-1]


def test_silent_notebook_gets_a_heartbeat(place, start):
    impatient = f"from saigakit.cli import execution; execution.SILENT_S = 0.2; {RUN}"
    process, _ = start("-c", impatient, place / "run", place / "notebooks")
    for line in process.stdout:
        if line.startswith("02_train: still running after ") and line.endswith(" s\n"):
            break
    (place / "run" / "go").touch()
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "02_train: done in" in output


def test_formats_durations_from_one_minute_in_minutes():
    assert execution.format_duration(59.4) == "59 s"
    assert execution.format_duration(130) == "2 min 10 s"


def test_missing_notebooks_error_says_where_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setattr("saigakit.__file__", str(tmp_path / "saigakit" / "__init__.py"))
    with pytest.raises(SaigaError, match="--notebooks"):
        runner.run({}, tmp_path / "run")
