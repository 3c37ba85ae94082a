"""Check the estimated steps and hours against arithmetic by hand."""

import json

import pytest

from saigakit.config import TrainConfig
from saigakit.data import report


def test_two_epochs_of_100_conversations_in_batches_of_16_are_13_steps():
    assert report.estimate_training(rows=100, tokens=1, parameters_b=1).steps == 13


def test_the_last_step_of_an_epoch_may_be_partial():
    assert report.estimate_training(rows=33, tokens=1, parameters_b=1).steps_per_epoch == 3


def test_a_7b_model_needs_about_seven_hours_on_two_t4s_for_eight_million_tokens():
    assert TrainConfig.epochs == 2  # all of which an estimate covers
    low, high = report.estimate_training(rows=10, tokens=4 * 10**6, parameters_b=6.74).hours
    assert low == pytest.approx(3 * 2 * 6.74e9 * 4e6 / (0.7 * 20.4e12) / 3600)
    assert high == pytest.approx(7.34, abs=0.01)


def test_the_quota_is_30_hours_a_week():
    made = report.estimate_training(rows=10, tokens=10**6, parameters_b=8)
    assert made.quota == pytest.approx([hours / 30 for hours in made.hours])


def test_a_range_goes_from_the_fastest_to_the_slowest():
    low, high = report.estimate_training(rows=10, tokens=10**6, parameters_b=8).hours
    assert high / low == pytest.approx(7 / 3)


def test_an_estimate_in_json_is_labelled_as_one():
    made = json.loads(json.dumps(report.estimate_training(rows=10, tokens=10**6, parameters_b=8).to_json()))
    assert "an estimate, not measured" in made["note"]
    assert made["steps"] == 2
    assert len(made["hours"]) == len(made["quota"]) == 2


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (8 * 10**6, "6.5–15.3 ч · h, T4 ×2, 22%–51% недельной квоты · of the weekly quota"),
        (10, "<0.1 ч · h, T4 ×2, <1% недельной квоты · of the weekly quota"),
    ],
)
def test_an_estimate_is_printed_in_hours_and_quota(tokens, words):
    assert str(report.estimate_training(rows=10, tokens=tokens, parameters_b=7)) == words
