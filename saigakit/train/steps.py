"""Conversations into optimizer steps of exactly batch_size conversations, whatever the packs and processes."""

import math
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

from saigakit.config import TrainConfig
from saigakit.data.rows import Rows
from saigakit.train import packing
from saigakit.train.replay import Joined


class Step(NamedTuple):
    """What one process computes of one optimizer step."""

    packs: list[dict[str, Any]]  # collated
    learned: int  # tokens, of all packs of all processes
    counted: int  # of the packs, from the first; the others are repeated ones, for gradients of zero


class Plan(Sequence[Step]):
    """The steps of a whole run as the process numbered `process` of `processes` sees them; read when asked for.

    The conversations of a step and their order do not depend on the number of processes.
    """

    def __init__(self, config: TrainConfig, rows: Rows | Joined, *, processes: int = 1, process: int = 0) -> None:
        self.rows, self.processes, self.process = rows, processes, process
        self.budget, self.batch_size, self.is_sharded = config.sequence_budget, config.batch_size, config.is_sharded
        epochs = (
            rows.epochs(config.replay_fraction, config.epochs, config.seed)
            if isinstance(rows, Joined)
            else [range(len(rows))] * math.ceil(config.epochs)
        )
        self.order = packing.order(epochs, config.epochs, config.seed)
        self.tokens_until, self.learned_until = array("q", [0]), array("q", [0])  # after each number of steps
        for step in range(math.ceil(len(self.order) / self.batch_size)):
            taken = self._rows_of(step)
            self.tokens_until.append(self.tokens_until[-1] + sum(rows.lengths[row] for row in taken))
            self.learned_until.append(self.learned_until[-1] + sum(rows.learned[row] for row in taken))

    def __len__(self) -> int:
        return len(self.tokens_until) - 1

    @property
    def tokens(self) -> int:
        """Of all epochs."""
        return self.tokens_until[-1]

    def _rows_of(self, step: int) -> "array[int]":
        return self.order[step * self.batch_size : (step + 1) * self.batch_size]

    def numbers(self, step: int) -> list[int]:
        """The numbers, in their file, of the conversations of a step; steps count from 0 here."""
        return sorted(self.rows.numbers[row] for row in self._rows_of(step))

    def layout(self, step: int) -> list[list[list[int]]]:
        """Rows by pack by process."""
        taken = self._rows_of(step)
        lengths = [self.rows.lengths[row] for row in taken]
        laid = packing.lay(lengths, budget=self.budget, processes=self.processes)
        return [[[taken[index] for index in pack] for pack in packs] for packs in laid]

    def __getitem__(self, step: int) -> Step:  # type: ignore[override]  # no slices
        step = range(len(self))[step]
        layout = self.layout(step)
        packs = layout[self.process]
        # A process without a conversation takes part all the same; sharded ones need as many packs as each other.
        count = max(map(len, layout)) if self.is_sharded else max(1, len(packs))
        idle = [(packs or layout[0])[0]] * (count - len(packs))
        collated = [packing.collate([self.rows[row] for row in pack]) for pack in (*packs, *idle)]
        return Step(collated, self.learned_until[step + 1] - self.learned_until[step], counted=len(packs))
