"""The size and frequency of evaluations."""

import pytest

from saigakit.train import run_state


@pytest.mark.parametrize(
    ("held_out", "tokens", "count"),
    [
        (500, 1_000, 24),  # a short run
        (10, 1_000, 10),
        (500, 1_000_000, 100),  # a twentieth is 50,000 tokens: five evaluations of 10,000
        (500, 100_000_000, 500),
    ],
)
def test_evaluations_cost_about_a_twentieth_of_training(held_out, tokens, count):
    assert run_state.count_evaluated([100] * held_out, steps=100, tokens=tokens, eval_steps=None) == count


def test_more_evaluations_use_fewer_conversations():
    counts = [run_state.count_evaluated([100] * 500, steps=100, tokens=10**6, eval_steps=steps) for steps in (5, 50)]
    assert counts == [24, 166]


def test_a_run_has_four_evaluations_by_default():
    assert [run_state.evaluation_interval(steps, None) for steps in (1, 4, 10, 100)] == [1, 1, 3, 25]
    assert run_state.evaluation_interval(100, 7) == 7
