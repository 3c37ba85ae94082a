"""General dialogues into a share of every epoch, so that a model that learns one thing does not forget the others."""

import math
import random
from array import array
from collections.abc import Sequence
from pathlib import Path

from saigakit import data
from saigakit.data import sources
from saigakit.data.rows import Rows
from saigakit.data.store import Conversations
from saigakit.errors import SaigaError
from saigakit.prompt.encoding import Example


def count(count_train: int, fraction: float) -> int:
    """Replay conversations in an epoch: with them `fraction` of it is replay, to the nearest conversation."""
    if not 0 <= fraction < 1:
        raise SaigaError(f"replay_fraction={fraction!r} must be a share of an epoch: from 0 to below 1.")
    return round(fraction * count_train / (1 - fraction))


def chosen(count_train: int, count_replay: int, fraction: float, epochs: float, seed: int) -> list[list[int]]:
    """Of each epoch the replay conversations, as indices into them; of the last, maybe partial one, all too.

    None is drawn again before all have been, over all epochs; so an epoch repeats one only where they are fewer than
    it needs. The same arguments give the same draws, and the draws of an epoch do not depend on the number of epochs.
    """
    needed = count(count_train, fraction)
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


def read(name: str, held_out: Conversations | None, run_dir: str | Path | None = None) -> Conversations:
    """The conversations that `sources.records_files` finds under `name`, without those that ask a held-out question.

    These are left out, not refused: a public collection is not the user's to mend, and a held-out loss of learned
    answers would mean nothing. How many is said. Raises SaigaError where none is left, DataError for bad records.
    """
    conversations = data.read_conversations(sources.records_files(name, run_dir))
    leaking = set() if held_out is None else set(data.asking_alike(held_out, conversations))
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
    return conversations.select(index for index in range(len(conversations)) if index not in leaking)


class Joined(Sequence[Example]):
    """The rows of training, and after them those of replay: as one they are planned and packed."""

    def __init__(self, training: Rows, replay: Rows) -> None:
        self._parts = training, replay
        self.lengths, self.learned = training.lengths + replay.lengths, training.learned + replay.learned
        self.numbers = training.numbers + array("i", [-number for number in replay.numbers])  # below 0: of replay

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # no slices
        training, replay = self._parts
        index = range(len(self))[index]
        return training[index] if index < len(training) else replay[index - len(training)]

    def epochs(self, fraction: float, epochs: float, seed: int) -> "list[array[int]]":
        """Indices into these rows of all conversations of each epoch, not yet shuffled; see `chosen`."""
        training, replay = map(len, self._parts)
        drawn = chosen(training, replay, fraction, epochs, seed)
        return [array("i", [*range(training), *(training + index for index in indices)]) for indices in drawn]

    def in_words(self, fraction: float) -> str:
        """What is mixed in, for the log of a run."""
        training, replay = map(len, self._parts)
        needed = count(training, fraction)
        again = "" if needed <= replay else f", some more than once: there are {replay:,}"
        return f"In each epoch {needed:,} general conversations beside {training:,} of training{again}."
