"""Keep the state of one run: its evaluation set, its log, its time budget and how it ended."""

import contextlib
import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset

from saigakit.config import TrainConfig
from saigakit.core import workspace
from saigakit.train import curve
from saigakit.train.checkpoints import Store
from saigakit.train.samples import Samples
from saigakit.train.steps import Plan

MIN_EVALUATED = 24  # conversations: enough for a curve
_TRAINING_PER_EVALUATION = 20  # tokens of training per token of all evaluations together
EVALUATIONS = 4  # in a run without eval_steps, besides the one before the first step
MIN_PROGRESS_S = 15.0  # between two progress lines
MAX_PROGRESS_LINES = 250  # in a run: Kaggle keeps every line
MARGIN_S = 60.0  # for the curve, the hashes and everything else after the last step
Ending = Literal["finished", "early_stopping", "max_hours", "interrupted"]


def evaluation_interval(steps: int, eval_steps: int | None) -> int:
    """The number of optimizer steps between two evaluations."""
    return eval_steps or math.ceil(steps / EVALUATIONS)


def count_evaluated(lengths: Sequence[int], *, steps: int, tokens: int, eval_steps: int | None) -> int:
    """Choose how many conversations to evaluate, so that evaluations cost about a twentieth of training."""
    evaluations = 1 + math.ceil(steps / evaluation_interval(steps, eval_steps))
    affordable = tokens / _TRAINING_PER_EVALUATION / evaluations
    return min(len(lengths), max(MIN_EVALUATED, int(affordable * len(lengths) / max(1, sum(lengths)))))


class Log:
    """log.jsonl and the printed output; a `quiet` process, which is not the first, neither writes nor prints."""

    def __init__(self, file: Path, *, quiet: bool, resumed_from: Path | None = None) -> None:
        self.file, self.quiet = file, quiet
        self.held_out: list[dict[str, Any]] = []  # entries of evaluations, also in quiet processes
        self.seconds = 0.0  # of training, without evaluations and checkpoints
        self._last_progress = time.monotonic()
        if resumed_from is None:
            return
        for entry in curve.read_log(resumed_from):
            if "held_out_loss" in entry:
                self.held_out.append(entry)
            elif "seconds" in entry:
                self.seconds = entry["seconds"]
        if not quiet:
            shutil.copyfile(resumed_from / curve.LOG_FILE, file)

    def print(self, text: str) -> None:
        if not self.quiet:
            with contextlib.suppress(BrokenPipeError):  # the parent has gone, but the run must still be saved
                print(text, flush=True)

    def write(self, **entry: float) -> None:
        if "held_out_loss" in entry:
            self.held_out.append(entry)
        if not self.quiet:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(entry) + "\n")

    def report_progress(self, step: int, steps: int, loss: float, *, tokens: int, of: int, more_s: float) -> None:
        """Print a line now and then. `tokens` of `of` are done; `more_s`: what evaluations will add to the rest."""
        speed = tokens / max(self.seconds, 1e-9)
        now = time.monotonic()
        if now - self._last_progress < max(MIN_PROGRESS_S, of / speed / MAX_PROGRESS_LINES) and step < steps:
            return
        self._last_progress = now
        left = timedelta(seconds=math.ceil((of - tokens) / speed + more_s))
        ends = (datetime.now().astimezone() + left).strftime("%H:%M")
        self.print(f"step {step} of {steps}: loss {loss:.3f}, {speed:,.0f} tokens/s, {left} left, ends at {ends}")


@dataclass
class Run:
    """What worker, trainer and callback share. Times are in seconds."""

    config: TrainConfig
    plan: Plan
    held_out: Dataset | None  # the rows of the evaluation set that are evaluated
    store: Store
    log: Log
    started: float = field(default_factory=workspace.session_start)  # max_hours count from here
    samples: Samples | None = None  # in the first process only
    ending: Ending = "finished"
    step_loss: float = math.nan  # this process's share of the last loss, in full precision, which Trainer's lacks
    slowest_step_s: float = 0.0
    save_s: float = 0.0  # of the slowest checkpoint
    evaluation_s: float = 0.0
    saved_at: float = field(default_factory=time.monotonic)
    saved_step: int = -1

    @property
    def eval_steps(self) -> int:
        return evaluation_interval(len(self.plan), self.config.eval_steps)

    @property
    def reserve_s(self) -> float:
        """Time for one more step, checkpoints, an evaluation and the outputs."""
        return self.slowest_step_s + 2 * self.save_s + self.evaluation_s + MARGIN_S

    @property
    def ending_s(self) -> float:
        """Time for the end of this step and its checkpoint; infinity until everything in it has been measured."""
        return self.reserve_s - MARGIN_S if self.save_s and (self.evaluation_s or not self.held_out) else math.inf

    def is_out_of_time(self) -> bool:
        """Whether one more step could exceed max_hours."""
        return workspace.uptime() + self.reserve_s > self.started + self.config.max_hours * 3600

    def is_save_due(self, step: int) -> bool:
        if self.config.save_steps is not None:
            return step % self.config.save_steps == 0
        return time.monotonic() - self.saved_at > self.config.save_minutes * 60
