"""Plan the optimizer steps: order conversations, mix in replay records and pack them."""

import bisect
import heapq
import math
import random
from array import array
from collections.abc import Sequence
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import torch
from datasets import Dataset, concatenate_datasets

from saigakit import data
from saigakit.config import TrainConfig
from saigakit.core.display import count
from saigakit.data import store
from saigakit.data.conversations import asking_alike
from saigakit.data.rows import read_column
from saigakit.errors import SaigaError
from saigakit.prompt.encoding import IGNORE_INDEX

_MAX_BAD_REPLAY = 0.5  # of the records: with more, the file is the wrong one


def best_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group the indices of `lengths` into bins of at most `budget`: longest first, into the fullest bin with room."""
    if lengths and max(lengths) > budget:
        raise ValueError(f"a document of {max(lengths)} tokens does not fit into a pack of {budget}")
    room: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    bins: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fullest = bisect.bisect_left(room, (lengths[index], 0))
        if fullest < len(room):
            free, target = room.pop(fullest)
        else:
            free, target = budget, len(bins)
            bins.append([])
        bins[target].append(index)
        bisect.insort(room, (free - lengths[index], target))
    return bins


def collate(rows: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
    """Make a batch of one row from a pack. Restarting positions, instead of a mask, separate its documents.

    With `logits_to_keep` and `shift_labels` the language-model head runs on trained positions only.
    """
    input_ids = torch.tensor([[token for row in rows for token in row["input_ids"]]])
    # The first token of a document must not be predicted from the document before it.
    labels = torch.tensor([[label for row in rows for label in (IGNORE_INDEX, *row["labels"][1:])]])
    following = torch.nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
    kept = (following[0] != IGNORE_INDEX).nonzero().flatten()
    return {
        "input_ids": input_ids,
        "position_ids": torch.cat([torch.arange(len(row["input_ids"])) for row in rows])[None],
        "labels": labels,
        "shift_labels": following[:, kept],
        "logits_to_keep": kept,
    }


def order_conversations(by_epoch: Sequence[Sequence[int]], epochs: float, seed: int) -> "array[int]":
    """Shuffle each epoch and concatenate them; of a fractional last epoch take the share, rounded up."""
    rng = random.Random(seed)
    order = array("i")
    for epoch, indices in zip(range(math.ceil(epochs)), by_epoch, strict=True):
        shuffled = array("i", indices)
        rng.shuffle(shuffled)
        share = min(1.0, epochs - epoch)
        order += shuffled[: math.ceil(round(share * len(shuffled), 6))]  # 0.1 + 0.2 of ten is three, not four
    return order


def assign_packs(lengths: Sequence[int], *, budget: int, processes: int) -> list[list[list[int]]]:
    """Pack the documents of one step, with about as many tokens for each process; some get none if there are few.

    Documents are assigned, longest first, to the process with the fewest tokens.
    """
    shares: list[list[int]] = [[] for _ in range(processes)]
    tokens = [(0, process) for process in range(processes)]
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fewest, process = tokens[0]
        shares[process].append(index)
        heapq.heapreplace(tokens, (fewest + lengths[index], process))
    return [
        [[share[i] for i in pack] for pack in best_fit([lengths[index] for index in share], budget)] for share in shares
    ]


def replay_count(count_train: int, fraction: float) -> int:
    """The number of replay conversations that make up `fraction` of an epoch, to the nearest conversation."""
    return round(fraction * count_train / (1 - fraction))


def choose_replay(count_train: int, count_replay: int, fraction: float, epochs: float, seed: int) -> list[list[int]]:
    """Draw the indices of each epoch's replay conversations, a fractional last epoch included as a full one.

    No conversation is drawn again before all have been drawn, across epochs. More epochs do not change the first ones.
    """
    needed = replay_count(count_train, fraction)
    rng = random.Random(f"replay {seed}")  # independent of the shuffling of training conversations
    shuffled = chain.from_iterable(rng.sample(range(count_replay), count_replay) for _ in repeat(None))  # endless
    return [list(islice(shuffled, needed)) for _ in range(math.ceil(epochs))]


def read_replay(name: str, files: Sequence[Path], held_out: Dataset | None) -> Dataset:
    """Read replay conversations, leaving out and reporting bad ones and those with a question of the evaluation set.

    Raises DataError if more than half of the records are bad.
    """
    conversations = data.read_conversations(files, max_bad=_MAX_BAD_REPLAY)
    leaking = set() if held_out is None else set(asking_alike(held_out, conversations))
    if not leaking:
        return conversations
    if len(leaking) == len(conversations):
        raise SaigaError(
            f"replay_file={name!r}: all conversations ({len(conversations)}) ask questions of the evaluation set. Use "
            "general dialogues instead."
        )
    print(
        f"{name}: leaving out {len(leaking):,} of {len(conversations):,} conversations, for asking questions of the "
        "evaluation set.",
        flush=True,
    )
    return store.select_rows(conversations, [index for index in range(len(conversations)) if index not in leaking])


def mix_rows(training: Dataset, replay: Dataset) -> Dataset:
    """The rows of training followed by those of replay, whose conversations get negative numbers."""
    table = replay.data.table
    at = table.column_names.index("conversation")
    table = table.set_column(at, "conversation", pyarrow.compute.negate(table.column(at)))
    return concatenate_datasets([training, store.make_dataset(table)])


def epochs_with_replay(numbers: Sequence[int], fraction: float, epochs: float, seed: int) -> "list[array[int]]":
    """The rows of each epoch, not yet shuffled; see `choose_replay`. `numbers`: those of `mix_rows`."""
    training = sum(number > 0 for number in numbers)
    drawn = choose_replay(training, len(numbers) - training, fraction, epochs, seed)
    return [array("i", [*range(training), *(training + index for index in indices)]) for indices in drawn]


def describe_mix(training: int, replay: int, fraction: float) -> str:
    needed = replay_count(training, fraction)
    repeated = "" if needed <= replay else f"; there are only {replay:,}, so some are repeated"
    return f"Each epoch mixes {count(needed, 'replay conversation')} into {training:,} of training{repeated}."


class Step(NamedTuple):
    """The part of one optimizer step that one process computes."""

    packs: list[dict[str, Any]]  # collated
    learned: int  # trained tokens in the packs of all processes
    counted: int  # the number of packs that count; the rest are repetitions with a weight of zero


class Plan(Sequence[Step]):
    """The steps for one process, read from disk on access; the number of processes does not change their content."""

    def __init__(self, config: TrainConfig, rows: Dataset, *, processes: int = 1, process: int = 0) -> None:
        self.rows, self.processes, self.process = rows, processes, process
        self.lengths, self.learned = read_column(rows, "length"), read_column(rows, "learned")
        self._numbers = read_column(rows, "conversation")
        self.budget, self.batch_size, self.is_sharded = config.sequence_budget, config.batch_size, config.is_sharded
        epochs: Sequence[Sequence[int]] = [range(len(rows))] * math.ceil(config.epochs)
        if config.replay_file is not None:
            epochs = epochs_with_replay(self._numbers, config.replay_fraction, config.epochs, config.seed)
        self.order = order_conversations(epochs, config.epochs, config.seed)
        self.tokens_until, self.learned_until = array("q", [0]), array("q", [0])  # after each number of steps
        for step in range(math.ceil(len(self.order) / self.batch_size)):
            taken = self._rows_of(step)
            self.tokens_until.append(self.tokens_until[-1] + sum(self.lengths[row] for row in taken))
            self.learned_until.append(self.learned_until[-1] + sum(self.learned[row] for row in taken))

    def __len__(self) -> int:
        return len(self.tokens_until) - 1

    @property
    def tokens(self) -> int:
        """Tokens of all epochs."""
        return self.tokens_until[-1]

    def _rows_of(self, step: int) -> "array[int]":
        return self.order[step * self.batch_size : (step + 1) * self.batch_size]

    def numbers(self, step: int) -> list[int]:
        """The numbers of a step's conversations in their files; steps count from 0 here."""
        return sorted(self._numbers[row] for row in self._rows_of(step))

    def layout(self, step: int) -> list[list[list[int]]]:
        """The rows of a step, by process and pack."""
        taken = self._rows_of(step)
        lengths = [self.lengths[row] for row in taken]
        assigned = assign_packs(lengths, budget=self.budget, processes=self.processes)
        return [[[taken[index] for index in pack] for pack in packs] for packs in assigned]

    def __getitem__(self, step: int) -> Step:  # type: ignore[override]  # no slices
        step = range(len(self))[step]
        layout = self.layout(step)
        packs = layout[self.process]
        # A process without a conversation takes part too, and with sharding all need the same number of packs.
        count = max(map(len, layout)) if self.is_sharded else max(1, len(packs))
        idle = [(packs or layout[0])[0]] * (count - len(packs))
        collated = [collate([self.rows[row] for row in pack]) for pack in (*packs, *idle)]
        return Step(collated, self.learned_until[step + 1] - self.learned_until[step], counted=len(packs))
