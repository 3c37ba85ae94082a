"""Counts of conversations and tokens into optimizer steps and into hours on Kaggle's T4s: estimates, not measured."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from saigakit.config import TrainConfig

NOTE = "оценка, не измерение · an estimate, not measured"
T4_FLOPS = 20.4e12  # float16, measured for 4096³ on Kaggle's T4 by unsloth_zoo
T4S = 2  # what Kaggle's T4 ×2 has; an hour of both costs one hour of the quota
QUOTA_HOURS = 30  # of GPU a week on Kaggle
_PASSES = 3  # in units of a forward pass: forward, its recomputation, the gradient of the inputs
_FLOP_PER_PARAMETER = 2  # of a forward pass, per token: one multiplication and one addition
_SLOWEST, _FASTEST = 0.3, 0.7  # the part of T4_FLOPS that real runs reach


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A training run before it begins; hours and shares of the weekly quota are (low, high) on T4 ×2."""

    steps_per_epoch: int
    steps: int
    hours: tuple[float, float]
    quota: tuple[float, float]

    def __str__(self) -> str:
        spent = _range(self.hours, least=0.1, form=".1f")
        return (
            f"{spent} ч · h, T4 ×{T4S}, {_range(self.quota, least=0.01, form='.0%')} квоты недели · of a week's quota"
        )

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "note": NOTE}


def estimate(*, rows: int, tokens: int, parameters_b: float) -> Estimate:
    """Of a run over `rows` (conversations, as a rule) that have `tokens` together, each shown once an epoch.

    Epochs and batch size are those of a TrainConfig that does not name them.
    """
    low, high = hours(tokens=tokens * TrainConfig.epochs, parameters_b=parameters_b)
    return Estimate(
        steps_per_epoch=math.ceil(rows / TrainConfig.batch_size),
        steps=math.ceil(rows * TrainConfig.epochs / TrainConfig.batch_size),
        hours=(low, high),
        quota=(low / QUOTA_HOURS, high / QUOTA_HOURS),
    )


def hours(*, tokens: float, parameters_b: float) -> tuple[float, float]:
    """(low, high) to train on `tokens`, those of all epochs together, with QLoRA on Kaggle's T4s.

    QLoRA with activation checkpointing costs 3 forward passes of 2 · parameters FLOP per token: forward,
    recomputation, gradient of the inputs; the frozen weights get none. A T4 reaches 20.4 TFLOP/s in float16
    (measured for 4096³ on Kaggle's T4 by unsloth_zoo), and real runs reach 30 to 70 % of that. GPUs share the tokens.
    """
    at_peak = _PASSES * _FLOP_PER_PARAMETER * parameters_b * 1e9 * tokens / (T4S * T4_FLOPS) / 3600
    return at_peak / _FASTEST, at_peak / _SLOWEST


def _range(values: tuple[float, float], *, least: float, form: str) -> str:
    low, high = (format(value, form) if value >= least else f"<{least:{form}}" for value in values)
    return low if low == high else f"{low}–{high}"
