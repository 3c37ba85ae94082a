"""Pack conversations into steps of a fixed number of conversations, with replay records mixed in."""

import bisect
import heapq
import math
import random
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from saigakit import data
from saigakit.config import TrainConfig
from saigakit.data import sources, store
from saigakit.data.conversations import asking_alike
from saigakit.data.rows import column
from saigakit.errors import SaigaError
from saigakit.prompt.encoding import IGNORE_INDEX

if TYPE_CHECKING:
    import torch
    from datasets import Dataset


def best_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of `lengths` in bins of at most `budget`, longest first into the fullest bin that still has room."""
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
    """One pack as a batch of one row. No attention mask: restarting positions make attention causal per document.

    `logits_to_keep` and `shift_labels` make the language-model head run on learned positions only.
    """
    import torch

    input_ids = torch.tensor([[token for row in rows for token in row["input_ids"]]])
    # The first token of a document must not be predicted from the document before it.
    labels = torch.tensor([[label for row in rows for label in (IGNORE_INDEX, *row["labels"][1:])]])
    following = torch.nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
    kept = (following[0] != IGNORE_INDEX).nonzero().flatten()
    return {
        "input_ids": input_ids,
        "position_ids": _positions(rows),
        "labels": labels,
        "shift_labels": following[:, kept],
        "logits_to_keep": kept,
    }


def _positions(rows: Sequence[dict[str, list[int]]]) -> "torch.Tensor":
    import torch

    return torch.cat([torch.arange(len(row["input_ids"])) for row in rows])[None]


def order_conversations(shown: Sequence[Sequence[int]], epochs: float, seed: int) -> "array[int]":
    """The conversations that each epoch shows in the order of training: every epoch is shuffled anew.

    Of a fractional last epoch it is the share, rounded up.
    """
    rng = random.Random(seed)
    made = array("i")
    for epoch, indices in zip(range(math.ceil(epochs)), shown, strict=True):
        shuffled = array("i", indices)
        rng.shuffle(shuffled)
        share = min(1.0, epochs - epoch)
        made += shuffled[: math.ceil(round(share * len(shuffled), 6))]  # 0.1 + 0.2 of ten is three, not four
    return made


def lay_out(lengths: Sequence[int], *, budget: int, processes: int) -> list[list[list[int]]]:
    """The packs of each process for the documents of one step, which are first shared out so that none waits.

    A process has at least one document where there are that many; its packs have at most `budget` tokens.
    """
    shares = _balanced(lengths, processes)
    return [
        [[share[i] for i in pack] for pack in best_fit([lengths[index] for index in share], budget)] for share in shares
    ]


def _balanced(lengths: Sequence[int], processes: int) -> list[list[int]]:
    """Longest first to whoever has the fewest tokens."""
    shares: list[list[int]] = [[] for _ in range(processes)]
    tokens = [(0, process) for process in range(processes)]
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fewest, process = tokens[0]
        shares[process].append(index)
        heapq.heapreplace(tokens, (fewest + lengths[index], process))
    return shares


def replay_count(count_train: int, fraction: float) -> int:
    """Replay conversations in an epoch: with them `fraction` of it is replay, to the nearest conversation."""
    if not 0 <= fraction < 1:
        raise SaigaError(f"replay_fraction={fraction!r} must be a share of an epoch: from 0 to below 1.")
    return round(fraction * count_train / (1 - fraction))


def choose_replay(count_train: int, count_replay: int, fraction: float, epochs: float, seed: int) -> list[list[int]]:
    """Of each epoch the replay conversations, as indices into them; of the last, maybe partial one, all too.

    None is drawn again before all have been, over all epochs; so an epoch repeats one only where they are fewer than
    it needs. The same arguments give the same draws, and the draws of an epoch do not depend on the number of epochs.
    """
    needed = replay_count(count_train, fraction)
    if needed and not count_replay:
        raise SaigaError("replay_file has no conversation to mix in: name another one, or leave it out.")
    rng = random.Random(f"replay {seed}")  # not the numbers that shuffle the training conversations
    left: list[int] = []
    made = []
    for _ in range(math.ceil(epochs)):
        while len(left) < needed:
            left += rng.sample(range(count_replay), count_replay)
        made.append(left[:needed])
        left = left[needed:]
    return made


def read_replay(name: str, held_out: "Dataset | None", run_dir: str | Path | None = None) -> "Dataset":
    """The conversations that `sources.records_files` finds under `name`, without those that ask a held-out question.

    These are left out, not refused: a public collection is not the user's to mend, and a held-out loss of learned
    answers would mean nothing. How many is said. Raises SaigaError where none is left, DataError for bad records.
    """
    conversations = data.read_conversations(sources.records_files(name, run_dir))
    leaking = set() if held_out is None else set(asking_alike(held_out, conversations))
    if not leaking:
        return conversations
    if len(leaking) == len(conversations):
        raise SaigaError(
            f"replay_file={name!r}: all {len(conversations)} conversations ask held-out questions. Name general "
            "dialogues, not the records that are held out."
        )
    print(
        f"{name}: {len(leaking):,} of {len(conversations):,} conversations ask held-out questions and are left out.",
        flush=True,
    )
    return store.select(conversations, [index for index in range(len(conversations)) if index not in leaking])


def join(training: "Dataset", replay: "Dataset") -> "Dataset":
    """The rows of training, and after them those of replay, whose conversations have numbers below 0."""
    import pyarrow
    from datasets import concatenate_datasets

    table = replay.data.table
    at = table.column_names.index("conversation")
    table = table.set_column(at, "conversation", pyarrow.compute.negate(table.column(at)))
    return concatenate_datasets([training, store.dataset_of(table)])


def epochs_with_replay(numbers: Sequence[int], fraction: float, epochs: float, seed: int) -> "list[array[int]]":
    """Indices of the rows of each epoch, not yet shuffled; see `choose_replay`. `numbers`: of the conversations."""
    training = sum(number > 0 for number in numbers)
    drawn = choose_replay(training, len(numbers) - training, fraction, epochs, seed)
    return [array("i", [*range(training), *(training + index for index in indices)]) for indices in drawn]


def replay_in_words(training: int, replay: int, fraction: float) -> str:
    """What is mixed in, for the log of a run."""
    needed = replay_count(training, fraction)
    again = "" if needed <= replay else f", some more than once: there are {replay:,}"
    return f"In each epoch {needed:,} general conversations beside {training:,} of training{again}."


class Step(NamedTuple):
    """What one process computes of one optimizer step."""

    packs: list[dict[str, Any]]  # collated
    learned: int  # tokens, of all packs of all processes
    counted: int  # of the packs, from the first; the others are repeated ones, for gradients of zero


class Plan(Sequence[Step]):
    """The steps of a whole run as the process numbered `process` of `processes` sees them; read when asked for.

    The conversations of a step and their order do not depend on the number of processes.
    """

    def __init__(self, config: TrainConfig, rows: "Dataset", *, processes: int = 1, process: int = 0) -> None:
        self.rows, self.processes, self.process = rows, processes, process
        self.lengths, self.learned = column(rows, "length"), column(rows, "learned")
        self._numbers = column(rows, "conversation")
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
        """Of all epochs."""
        return self.tokens_until[-1]

    def _rows_of(self, step: int) -> "array[int]":
        return self.order[step * self.batch_size : (step + 1) * self.batch_size]

    def numbers(self, step: int) -> list[int]:
        """The numbers, in their file, of the conversations of a step; steps count from 0 here."""
        return sorted(self._numbers[row] for row in self._rows_of(step))

    def layout(self, step: int) -> list[list[list[int]]]:
        """Rows by pack by process."""
        taken = self._rows_of(step)
        lengths = [self.lengths[row] for row in taken]
        laid = lay_out(lengths, budget=self.budget, processes=self.processes)
        return [[[taken[index] for index in pack] for pack in packs] for packs in laid]

    def __getitem__(self, step: int) -> Step:  # type: ignore[override]  # no slices
        step = range(len(self))[step]
        layout = self.layout(step)
        packs = layout[self.process]
        # A process without a conversation takes part all the same; sharded ones need as many packs as each other.
        count = max(map(len, layout)) if self.is_sharded else max(1, len(packs))
        idle = [(packs or layout[0])[0]] * (count - len(packs))
        collated = [collate([self.rows[row] for row in pack]) for pack in (*packs, *idle)]
        return Step(collated, self.learned_until[step + 1] - self.learned_until[step], counted=len(packs))
