"""What the parts of one training share: its plan, its places, its clock, and how it ended."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from saigakit.config import TrainConfig
from saigakit.core import workspace
from saigakit.train import evaluation
from saigakit.train.checkpoints import Store
from saigakit.train.evaluation import HeldOut
from saigakit.train.steps import Plan
from saigakit.train.training_log import Log

if TYPE_CHECKING:
    from peft import PeftModel

RESULT_FILE = "result.json"  # how it ended, for the manifest of the stage
MARGIN_S = 60.0  # for the curve, the hashes and whatever else follows the last step
Ending = Literal["finished", "early_stopping", "max_hours", "asked"]
OnEvaluation = Callable[[int, float, "PeftModel"], None]


@dataclass
class Run:
    """Everything that the parts of a run share. Times in seconds."""

    config: TrainConfig
    plan: Plan
    held_out: HeldOut
    store: Store
    log: Log
    kept: Sequence[Path] = ()  # files beside the log that go into a checkpoint
    on_evaluation: OnEvaluation | None = None  # (step, held-out loss, model), in the first process alone
    ending: Ending = "finished"
    step_loss: float = math.nan  # this process's part of the last step's; Trainer's own is of 7 digits
    worst_step_s: float = 0.0
    save_s: float = 0.0  # of the slowest checkpoint
    evaluation_s: float = 0.0
    saved: float = field(default_factory=time.monotonic)
    saved_step: int = -1

    @property
    def eval_steps(self) -> int:
        return evaluation.steps_between(len(self.plan), self.config.eval_steps)

    @property
    def reserve_s(self) -> float:
        """What another step, a checkpoint, an evaluation and the outputs need."""
        return self.worst_step_s + 2 * self.save_s + self.evaluation_s + MARGIN_S

    def is_time_over(self) -> bool:
        """Whether they would not be done within max_hours of the session."""
        return time.time() + self.reserve_s > workspace.session_start() + self.config.max_hours * 3600

    def is_save_due(self, step: int) -> bool:
        if self.config.save_steps is not None:
            return step % self.config.save_steps == 0
        return time.monotonic() - self.saved > self.config.save_minutes * 60
