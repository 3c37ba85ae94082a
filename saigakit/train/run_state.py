"""Hold the state of one run: its evaluation set, its log, its clock and how it ended."""

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from saigakit.config import TrainConfig
from saigakit.core import workspace
from saigakit.data.conversations import spread
from saigakit.data.rows import column
from saigakit.prompt.encoding import Example
from saigakit.train.checkpoints import Store
from saigakit.train.steps import Plan

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel

AT_LEAST = 24  # conversations: enough for a curve
_SHARE = 20  # of the tokens of training, all evaluations together cost about one in so many
EVALUATIONS = 4  # in a run, beside the one before the first step, unless eval_steps says otherwise


def steps_between(steps: int, eval_steps: int | None) -> int:
    """Optimizer steps between two evaluations."""
    return eval_steps or math.ceil(steps / EVALUATIONS)


class HeldOut(Sequence[Example]):
    """`count` of the rows, evenly over them; read when one is asked for."""

    def __init__(self, rows: "Dataset | None", count: int) -> None:
        self.rows = rows
        self.chosen = [] if rows is None else spread(range(len(rows)), count)
        lengths = [] if rows is None else column(rows, "length")
        self.lengths = [lengths[row] for row in self.chosen]

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # no slices
        assert self.rows is not None  # or nothing is chosen
        made: Example = self.rows[self.chosen[index]]
        return made


def count_evaluated(lengths: Sequence[int], *, steps: int, tokens: int, eval_steps: int | None) -> int:
    """How many held-out conversations of these lengths (in tokens) to evaluate in a run of `tokens` and `steps`."""
    evaluations = 1 + math.ceil(steps / steps_between(steps, eval_steps))
    affordable = tokens / _SHARE / evaluations
    return min(len(lengths), max(AT_LEAST, int(affordable * len(lengths) / max(1, sum(lengths)))))


REPORT_S = 15.0  # between two lines of progress, at least
LINES = 250  # of progress in a run, at most: Kaggle keeps every line


class Log:
    """log.jsonl in `file`; `quiet`: this process is not the first and neither writes nor prints."""

    def __init__(self, file: Path, *, quiet: bool, resumed_from: Path | None = None) -> None:
        self.file, self.quiet = file, quiet
        self.held_out: list[dict[str, Any]] = []  # entries of evaluations, in all processes
        self.seconds = 0.0  # of training, evaluations and checkpoints left out
        self._shown = time.monotonic()
        if resumed_from is None:
            return
        for line in resumed_from.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if "held_out_loss" in entry:
                self.held_out.append(entry)
            elif "seconds" in entry:
                self.seconds = entry["seconds"]
        if not quiet:
            shutil.copyfile(resumed_from, file)

    def say(self, text: str) -> None:
        if not self.quiet:
            with contextlib.suppress(BrokenPipeError):  # whoever listened has gone, and the run is still to be saved
                print(text, flush=True)

    def write(self, **entry: float) -> None:
        if "held_out_loss" in entry:
            self.held_out.append(entry)
        if not self.quiet:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(entry) + "\n")

    def copy(self, target: Path) -> None:
        """What was written so far, which may be nothing."""
        self.file.touch()
        shutil.copyfile(self.file, target)

    def tell(self, step: int, steps: int, loss: float, *, tokens: int, of: int, more_s: float) -> None:
        """Sometimes a line: `tokens` of `of` are learned from; `more_s` is what else the rest of the run will take."""
        speed = tokens / max(self.seconds, 1e-9)
        now = time.monotonic()
        if now - self._shown < max(REPORT_S, of / speed / LINES) and step < steps:
            return
        self._shown = now
        left = timedelta(seconds=math.ceil((of - tokens) / speed + more_s))
        ends = (datetime.now().astimezone() + left).strftime("%H:%M")
        self.say(f"step {step} of {steps}: loss {loss:.3f}, {speed:.0f} tokens/s, {left} left, ends at {ends}")


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
        return steps_between(len(self.plan), self.config.eval_steps)

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
