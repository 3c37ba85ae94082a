import json

import pytest

from saigakit.cli import summary
from saigakit.core import manifest
from saigakit.errors import SaigaError
from saigakit.evaluate import results

ROW = {"name": "before", "n": 1, "exact": 0.0, "json_valid": 0.0, "f1": 0.0, "tokens_per_s": 99.0, "bytes": 1_000_000}
LINE = {"prompt": "Кто <b>ты</b>?", "reference": "[]", "answers": {"before": "&"}, "exact": {"before": False}}


@pytest.fixture
def run_dir(tmp_path):
    parameters = {"model": "saiga_tiny"}
    with manifest.making(tmp_path / "04_infer", stage="04_infer", parameters=parameters, inputs={}) as directory:
        (directory / "results.json").write_text(json.dumps([ROW]), encoding="utf-8")
        (directory / "answers.jsonl").write_text(json.dumps(LINE) + "\n", encoding="utf-8")
        results.plot([ROW]).savefig(directory / "comparison.png")
    return tmp_path


def test_report_embeds_the_plot(run_dir):
    page = summary.write_report(run_dir).read_text(encoding="utf-8")
    assert "data:image/png;base64," in page
    assert "src=" in page
    assert "http" not in page


def test_report_names_the_model_and_escapes_text(run_dir):
    page = summary.write_report(run_dir).read_text(encoding="utf-8")
    assert "saigakit: saiga_tiny" in page
    assert "Кто &lt;b&gt;ты&lt;/b&gt;?" in page


def test_report_shows_links_and_times_of_stages(run_dir):
    (run_dir / "02_train.html").write_text("", encoding="utf-8")
    times_file = run_dir / summary.TIMES_FILE
    times_file.parent.mkdir()
    times_file.write_text('{"02_train": 61.4}', encoding="utf-8")
    page = summary.write_report(run_dir).read_text(encoding="utf-8")
    assert '<li><a href="02_train.html">02_train</a>: 61 s</li><li>03_merge_gguf</li>' in page


def test_report_of_an_unfinished_run_names_the_missing_stage(tmp_path):
    with pytest.raises(SaigaError, match="run 04_infer first"):
        summary.write_report(tmp_path)
