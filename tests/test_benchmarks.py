"""Benchmarks whose result is a property: the run for a GPU on tiny shapes, and the same answers as Hugging Face."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPT = BENCHMARKS / "on_gpu.py"


@pytest.mark.slow
def test_the_gpu_run_measures_everything_on_tiny_shapes(tmp_path):
    command = [
        sys.executable,
        str(SCRIPT),
        "--shape",
        "tiny",
        "--conversations",
        "8",
        "--json",
        str(tmp_path / "x.json"),
    ]
    done = subprocess.run([*command, "--scratch", str(tmp_path)], capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))["found"]
    assert found["resume"]["bit_identical"] and found["resume"]["kills"] == 2
    assert found.get("two GPUs", {}).get("largest_difference", 0) < 1e-3
    ours, theirs = (next(each for name, each in found.items() if name.startswith(what)) for what in ("saiga", "tutor"))
    assert ours["times_the_tutorial"] > 1 and ours["loss"] == pytest.approx(theirs["loss"], abs=0.01)
    assert found["offload"]["generated_tokens_per_s"] > 0
    assert "times the tutorial" in done.stdout and "bit identical True" in done.stdout


@pytest.mark.slow
def test_a_measurement_that_takes_too_long_is_a_row_and_the_exit_code_says_so(tmp_path):
    command = [sys.executable, str(SCRIPT), "--shape", "tiny", "--minutes", "0.01", "--scratch", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stdout.count("failed no time was left") == 5


@pytest.mark.slow
def test_greedy_answers_of_llama_cpp_are_those_of_hugging_face(tmp_path, callers_cache, monkeypatch):
    """The logits differ by 0.01 (rms), so one answer may turn where two tokens are as likely as each other."""
    monkeypatch.setenv("SAIGAKIT_CACHE", str(callers_cache))
    monkeypatch.syspath_prepend(BENCHMARKS)
    same_answers = importlib.import_module("same_answers")
    monkeypatch.setattr(same_answers, "VARIANTS", {"f16": (1, False)})
    monkeypatch.setattr(same_answers, "SAMPLE", 2)
    [row] = same_answers.compare(tmp_path, count=16, tokens=12, threads=1).rows
    assert int(row[1]) >= 15
    assert float(row[-1]) < 0.05
