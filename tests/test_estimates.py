"""Steps and hours before a run: arithmetic that can be done by hand."""

import json

import pytest

from saigakit import estimates
from saigakit.config import TrainConfig


def test_two_epochs_of_100_conversations_in_batches_of_16_are_13_steps():
    assert estimates.steps(rows=100, epochs=2, batch_size=16) == 13


def test_an_epoch_ends_with_the_step_that_holds_its_last_conversation():
    made = estimates.estimate(rows=33, tokens=1, parameters_b=1, epochs=1, batch_size=16)
    assert (made.steps_per_epoch, made.steps) == (3, 3)


def test_epochs_and_batch_size_are_those_of_training():
    config = TrainConfig(model="saiga_tiny", train_file="train.jsonl", output_dir="run")
    named = estimates.estimate(
        rows=1000, tokens=10**6, parameters_b=7, epochs=config.epochs, batch_size=config.batch_size
    )
    assert estimates.estimate(rows=1000, tokens=10**6, parameters_b=7) == named


def test_a_7b_model_needs_about_seven_hours_of_one_t4_for_four_million_tokens():
    low, high = estimates.hours(tokens=4e6, parameters_b=6.74, gpus=1)
    assert low == pytest.approx(3 * 2 * 6.74e9 * 4e6 / (0.7 * 20.4e12) / 3600)
    assert high == pytest.approx(7.34, abs=0.01)


def test_two_gpus_take_half_the_hours_of_one():
    one, two = (estimates.hours(tokens=10**7, parameters_b=8, gpus=gpus) for gpus in (1, 2))
    assert two == pytest.approx([hours / 2 for hours in one])


def test_an_estimate_is_for_both_t4s_and_for_all_epochs():
    made = estimates.estimate(rows=10, tokens=10**6, parameters_b=8, epochs=3)
    assert made.hours == estimates.hours(tokens=3 * 10**6, parameters_b=8, gpus=2)


def test_the_share_of_the_quota_is_of_30_hours_a_week():
    made = estimates.estimate(rows=10, tokens=10**6, parameters_b=8)
    assert made.quota == pytest.approx([hours / 30 for hours in made.hours])


def test_a_range_runs_from_the_faster_to_the_slower():
    low, high = estimates.estimate(rows=10, tokens=10**6, parameters_b=8).hours
    assert high / low == pytest.approx(7 / 3)


def test_a_written_estimate_says_that_it_is_one():
    made = json.loads(json.dumps(estimates.estimate(rows=10, tokens=10**6, parameters_b=8).to_json()))
    assert "an estimate, not measured" in made["note"]
    assert made["steps"] == 2
    assert len(made["hours"]) == len(made["quota"]) == 2


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (8 * 10**6, "6.5–15.3 ч · h, T4 ×2, 22%–51% квоты недели · of a week's quota"),
        (10, "<0.1 ч · h, T4 ×2, <1% квоты недели · of a week's quota"),
    ],
)
def test_an_estimate_is_printed_in_hours_and_shares(tokens, words):
    assert str(estimates.estimate(rows=10, tokens=tokens, parameters_b=7)) == words
