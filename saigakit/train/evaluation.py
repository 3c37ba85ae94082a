"""Held-out conversations into the evaluations of a run: how many are worth their time, and which was the best."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from saigakit import data
from saigakit.data.rows import Rows
from saigakit.prompt.encoding import Example

AT_LEAST = 24  # conversations: enough for a curve
_SHARE = 20  # of the tokens of training, all evaluations together cost about one in so many
EVALUATIONS = 4  # in a run, beside the one before the first step, unless eval_steps says otherwise


def steps_between(steps: int, eval_steps: int | None) -> int:
    """Optimizer steps between two evaluations."""
    return eval_steps or math.ceil(steps / EVALUATIONS)


class HeldOut(Sequence[Example]):
    """`count` of the rows, evenly over them; read when one is asked for."""

    def __init__(self, rows: Rows, count: int) -> None:
        self.rows, self.chosen = rows, data.spread(range(len(rows)), count) if count else []
        self.lengths = [rows.lengths[row] for row in self.chosen]

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # no slices
        return self.rows[self.chosen[index]]


def evaluated(lengths: Sequence[int], *, steps: int, tokens: int, eval_steps: int | None) -> int:
    """How many held-out conversations of these lengths (in tokens) to evaluate in a run of `tokens` and `steps`."""
    evaluations = 1 + math.ceil(steps / steps_between(steps, eval_steps))
    affordable = tokens / _SHARE / evaluations
    return min(len(lengths), max(AT_LEAST, int(affordable * len(lengths) / max(1, sum(lengths)))))


class Best(NamedTuple):
    """The evaluation with the lowest loss, the earlier of equal ones; that before the first step does not count."""

    step: int
    loss: float
    worse_since: int  # evaluations after it


def best(log: Iterable[dict[str, Any]]) -> Best | None:
    found: Best | None = None
    for entry in log:
        if "held_out_loss" not in entry or entry["step"] == 0:
            continue
        if found is None or entry["held_out_loss"] < found.loss:
            found = Best(entry["step"], entry["held_out_loss"], 0)
        else:
            found = found._replace(worse_since=found.worse_since + 1)
    return found
