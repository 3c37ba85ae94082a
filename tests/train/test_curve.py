"""Summary, plot and verdict of a training log."""

import json

import pytest

from saigakit.core import manifest
from saigakit.train import curve
from saigakit.train.curve import Best

LOG = [
    {"step": 0, "held_out_loss": 2.5},
    *({"step": step, "loss": 3.0 / step, "tokens": 100 * step, "seconds": 2.0 * step} for step in range(1, 21)),
    {"step": 20, "held_out_loss": 0.5},
]


def log_of(held_out, training):
    """Evaluations every 20 steps, and training losses interpolated between `training` at the evaluations."""
    log = [{"step": 0, "held_out_loss": held_out[0]}]
    for number, loss in enumerate(held_out[1:]):
        begin, end = training[number : number + 2]
        for step in range(1, 21):
            at = {"step": 20 * number + step, "loss": begin + (end - begin) * step / 20}
            log.append({**at, "tokens": 100 * at["step"], "seconds": 2.0 * at["step"]})
        log.append({"step": 20 * (number + 1), "held_out_loss": loss})
    return log


def write(directory, log):
    (directory / curve.LOG_FILE).write_text("".join(json.dumps(entry) + "\n" for entry in log), encoding="utf-8")
    return directory


@pytest.fixture
def trained(tmp_path):
    return write(tmp_path, LOG)


def test_log_round_trip(trained):
    assert curve.read_log(trained) == LOG


def test_summary_shows_steps_tokens_speed_losses_and_best_step(trained):
    cells = [value for _, value in curve.summary(trained).rows]
    assert cells[:3] == ["20", "2,000", "0.7 min, 50 tokens/s"]
    assert cells[3].startswith("3.000 → 0.1")  # the mean of the last steps
    assert cells[4:] == ["2.500 → 0.500", "20, 0.500"]


def test_best_step_has_the_lowest_evaluation_loss_and_is_the_first_of_equals(tmp_path):
    log = log_of([3.0, 1.0, 0.5, 0.5, 0.9], [3, 2, 1, 0.5, 0.1])
    assert curve.find_best(log) == Best(40, 0.5, worse_since=2)
    assert dict(curve.summary(write(tmp_path, log)).rows)["лучший шаг · best step"] == "40, 0.500"


def test_step_0_is_never_the_best(tmp_path):
    """There is no trained adapter yet."""
    log = log_of([1.0, 1.2, 1.5], [1, 0.5, 0.1])
    assert curve.find_best(log) == Best(20, 1.2, worse_since=1)
    assert dict(curve.summary(write(tmp_path, log)).rows)["лучший шаг · best step"] == "20, 1.200"
    assert any("20 (best step)" in line.get_label() for line in curve.plot(log).axes[0].lines)
    assert "1.000 before training and 1.200 at best, at step 20 of 40" in curve.verdict(log)


def test_no_best_step_before_the_second_evaluation(tmp_path):
    assert curve.find_best(LOG[:-1]) is None
    assert "лучший шаг · best step" not in dict(curve.summary(write(tmp_path, LOG[:-1])).rows)
    assert len(curve.plot(LOG[:-1]).axes[0].lines) == 2


def test_summary_shows_memory_if_the_log_has_it(tmp_path):
    rows = dict(curve.summary(write(tmp_path, [{"memory_predicted": 7.5e9}, *LOG, {"memory_peak": 7.25e9}])).rows)
    assert rows["память: оценка, пик · memory: estimated, peak"] == "7.50 GB, 7.25 GB"
    rows = dict(curve.summary(write(tmp_path, [{"memory_predicted": 7.5e9}, *LOG])).rows)
    assert rows["память: оценка, пик · memory: estimated, peak"] == "7.50 GB, ?"


@pytest.mark.parametrize(("ended", "said"), [("early_stopping", "stopped improving"), ("max_hours", "max_hours")])
def test_summary_shows_an_early_end(tmp_path, ended, said):
    identity = {"stage": "02_train", "parameters": {}, "inputs": {}}
    with manifest.making(tmp_path / "made", facts={"training": {"ended": ended}}, **identity) as made:
        write(made, LOG)
    rows = dict(curve.summary(tmp_path / "made").rows)
    assert said in rows["обучение закончилось · training ended"]


def test_plots_one_line_without_evaluations(tmp_path):
    assert len(curve.summary(write(tmp_path, LOG[1:-1])).rows) == 4
    assert len(curve.plot(LOG[1:-1]).axes[0].lines) == 1
    assert "not enough to judge" in curve.verdict(LOG[1:-1])


def test_plots_every_step_of_both_losses(trained):
    training, held_out = curve.plot(curve.read_log(trained)).axes[0].lines
    assert list(training.get_xdata()) == list(range(1, 21))
    assert list(held_out.get_ydata()) == [2.5, 0.5]


def test_plot_marks_the_best_step_if_it_is_not_the_last():
    axes = curve.plot(log_of([3.0, 1.0, 0.5, 0.9], [3, 2, 1, 0.5])).axes[0]
    [best] = [line for line in axes.lines if "40 (best step)" in line.get_label()]
    assert (list(best.get_xdata()), list(best.get_ydata())) == ([40], [0.5])
    assert sorted(text.get_text() for text in axes.texts) == ["0.500", "0.900"]


@pytest.mark.parametrize(
    ("held_out", "training", "said"),
    [
        (
            [2.0, 1.0, 0.8, 0.9, 1.0],
            [2, 1, 0.6, 0.3, 0.1],
            "was best at step 40 of 80 and has risen by 25 % since (0.800",
        ),
        ([1.0, 1.2, 1.5], [1, 0.5, 0.1], "No improvement: evaluation loss was 1.000 before training and 1.200 at"),
        ([1.0, 1.2, 1.2], [1, 0.5, 0.1], "No improvement"),
        ([2.0, 2.01, 2.0, 2.2], [2, 1, 0.5, 0.1], "Overfitting: evaluation loss was best at step 40 of 60"),
        (
            [2.0, 1.0, 1.5, 2.5],
            [2, 1, 1.6, 2.6],
            "Getting worse: since step 20 of 60 evaluation loss has risen by 150 %",
        ),
        ([2.0, 1.9, 2.0, 1.995], [2, 1, 0.5, 0.1], "Overfitting: evaluation loss was best at step 20 of 60"),
        ([2.0, 1.995, 2.0], [2, 1, 0.5], "Not learning: evaluation loss has hardly changed (2.000 → 2.000)"),
        ([2.0, 1.5, 1.2, 1.0], [2, 1.5, 1.2, 1], "from step 40 to 60 evaluation loss fell by 17 % (1.200 → 1.000)"),
        ([2.0, 1.0, 0.9, 0.895], [2, 1, 0.9, 0.9], "Converged: evaluation loss fell from 2.000 to 0.895"),
        ([2.0, 0.9, 0.815, 0.8], [2, 1, 0.9, 0.9], "Converged: evaluation loss fell from 2.000 to 0.800"),
        ([8.383, 8.229, 8.126, 8.064, 8.038], [8.5, 8.3, 8.1, 8, 7.9], "Still learning: from step 60 to 80"),
        ([8.339, 7.89, 7.857], [8.3, 8.1, 8], "evaluation loss fell by 0.4 % (7.890 → 7.857)"),
        # A run of the demo: 7 % above the best, and 0.003 nats.
        ([0.765, 0.085, 0.087, 0.047, 0.0434, 0.0465], [0.7, 0.1, 0.05, 0.04, 0.03, 0.01], "Converged"),
        ([0.745, 0.05, 0.02, 0.0025, 0.0015], [0.7, 0.1, 0.05, 0.02, 0.01], "Converged"),
        ([2.0, 1.0], [2, 1], "Fewer than three evaluations"),
    ],
)
def test_verdict_describes_the_curve_with_numbers(held_out, training, said):
    verdict = curve.verdict(log_of(held_out, training))
    assert said in verdict
    russian, english = verdict.split(" · ")
    assert any("а" <= letter <= "я" for letter in russian) and not any("а" <= letter <= "я" for letter in english)


def test_verdict_distinguishes_overfitting_from_divergence_in_a_short_run():
    def short(losses):
        steps = [{"step": step, "loss": loss, "tokens": step, "seconds": step} for step, loss in enumerate(losses, 1)]
        return [{"step": 0, "held_out_loss": 2.0}, *steps[:3], {"step": 3, "held_out_loss": 1.0}, *steps[3:],
                {"step": 6, "held_out_loss": 1.5}]  # fmt: skip

    assert "Overfitting" in curve.verdict(short([2.0, 1.5, 1.0, 0.7, 0.4, 0.2]))
    assert "Getting worse" in curve.verdict(short([2.0, 1.5, 1.0, 1.2, 1.4, 1.8]))


@pytest.mark.parametrize(("losses", "labelled"), [((8.4, 7.9), True), ((3.0, 0.0002), False)])
def test_axis_labels_between_powers_of_ten_only_if_they_fit(losses, labelled):
    log = [{"step": step, "loss": loss, "tokens": 1, "seconds": 1} for step, loss in enumerate(losses, 1)]
    axes = curve.plot(log).axes[0]
    axes.figure.draw_without_rendering()
    assert any(label.get_text() for label in axes.get_yticklabels(minor=True)) == labelled
