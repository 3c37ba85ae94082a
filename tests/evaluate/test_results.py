"""Tables and the plot of results.json."""

import json

import pytest

from saigakit.errors import SaigaError
from saigakit.evaluate import results

ROWS = [
    {"name": "before", "n": 240, "exact": 0.0, "json_valid": 0.05, "f1": 0.01, "tokens_per_s": 301.2, "bytes": 538e6},
    {"name": "after", "n": 240, "exact": 0.954, "json_valid": 1.0, "f1": 0.967, "tokens_per_s": 299, "bytes": 558e6},
    {"name": "Q4_K_M", "n": 240, "exact": 0.95, "json_valid": 1.0, "f1": 0.963, "tokens_per_s": 158, "bytes": 105e6},
]


@pytest.fixture
def answers_file(tmp_path):
    lines = [
        {
            "prompt": f"Текст {index} <b>",
            "reference": "[]",
            "answers": {"before": "что?", "after": "[]", "Q4_K_M": "[]" if index else "["},
            "exact": {"before": False, "after": True, "Q4_K_M": bool(index)},
        }
        for index in (2, 1, 0)
    ]
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return file


def test_the_table_is_aligned_and_has_percent_and_megabytes():
    text = str(results.show_table(ROWS))
    lines = text.splitlines()
    assert len({len(line) for line in lines[:-1]}) == 1
    assert "95.4 %" in lines[3]
    assert lines[4].endswith("105 MB")
    assert "240" in lines[-1]


def test_the_notebooks_table_has_the_cells_of_the_terminals():
    page = results.show_table(ROWS)._repr_html_()
    assert all(cell in page for row in results.show_table(ROWS).rows for cell in row)


def test_the_plot_names_every_model_and_every_metric():
    figure = results.plot(ROWS)
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert [line.split(":")[0] for line in legend] == ["before", "after", "Q4_K_M"]
    assert len(figure.axes[0].get_xticklabels()) == 3


def test_a_task_of_calls_has_columns_of_its_own():
    rows = [{"name": "before", "n": 9, "exact": 0.1, "calls": 0.05, "restraint": 0.9, "tokens_per_s": 9, "bytes": 1}]
    table = results.show_table(rows)
    assert table.header[1:4] == ("exact", "exact calls", "no undue call")
    assert table.rows[0][1:4] == ("10.0 %", "5.0 %", "90.0 %")
    labels = [label.get_text() for label in results.plot(rows).axes[0].get_xticklabels()]
    assert labels == ["точный ответ\nexact", "точный вызов\nexact calls", "без лишних вызовов\nno undue call"]


def test_the_plot_can_be_saved_without_the_adapter(tmp_path):
    results.plot([ROWS[0], ROWS[2]]).savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_raw_answers_of_an_earlier_version_are_one_sentence(tmp_path):
    with pytest.raises(SaigaError, match=r"was made by an earlier saigakit\. Delete it and run 04_infer again"):
        results.raw_answers(tmp_path)


def test_examples_show_mistakes_first(answers_file):
    rows = results.examples_table(answers_file, 2).rows
    assert rows[0] == ("Текст 0 <b>", "[]", "✗ что?", "✓ []", "✗ [")
    assert len(rows) == 2


def test_examples_are_text_and_never_markup(answers_file):
    assert "&lt;b&gt;" in results.examples_table(answers_file)._repr_html_()
