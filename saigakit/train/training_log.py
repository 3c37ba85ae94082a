"""What happens in a training run into log.jsonl, and into sparse lines for whoever watches."""

import contextlib
import json
import math
import shutil
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

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
