"""A training log as a table and a picture."""

import json

import pytest

from saigakit import curve

LOG = [
    {"step": 0, "held_out_loss": 2.5},
    *({"step": step, "loss": 3.0 / step, "tokens": 100 * step, "seconds": 2.0 * step} for step in range(1, 21)),
    {"step": 20, "held_out_loss": 0.5},
]


@pytest.fixture
def trained(tmp_path):
    (tmp_path / curve.LOG_FILE).write_text("".join(json.dumps(entry) + "\n" for entry in LOG), encoding="utf-8")
    return tmp_path


def test_the_log_is_read_as_it_was_written(trained):
    assert curve.read(trained) == LOG


def test_the_table_has_steps_tokens_speed_and_both_losses(trained):
    cells = [value for _, value in curve.summary(trained).rows]
    assert cells[:3] == ["20", "2,000", "0.7 min, 50 tokens/s"]
    assert cells[3].startswith("3.000 → 0.2")  # the mean of the last ten steps
    assert cells[4] == "2.500 → 0.500"


def test_a_run_without_held_out_texts_has_one_line(tmp_path):
    (tmp_path / curve.LOG_FILE).write_text(json.dumps(LOG[1]) + "\n", encoding="utf-8")
    assert len(curve.summary(tmp_path).rows) == 4
    assert len(curve.plot(curve.read(tmp_path)).axes[0].lines) == 1


def test_the_picture_shows_every_step_of_both_losses(trained):
    training, held_out = curve.plot(curve.read(trained)).axes[0].lines
    assert list(training.get_xdata()) == list(range(1, 21))
    assert list(held_out.get_ydata()) == [2.5, 0.5]


@pytest.mark.parametrize(("losses", "labelled"), [((8.4, 7.9), True), ((3.0, 0.0002), False)])
def test_labels_between_powers_of_ten_are_there_only_where_they_have_room(losses, labelled):
    log = [{"step": step, "loss": loss, "tokens": 1, "seconds": 1} for step, loss in enumerate(losses, 1)]
    axes = curve.plot(log).axes[0]
    axes.figure.draw_without_rendering()
    assert any(label.get_text() for label in axes.get_yticklabels(minor=True)) == labelled
