"""Tokenised conversations into packs without padding: best fit into a token budget, positions restart per document."""

import bisect
import heapq
import math
import random
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from saigakit.prompt.encoding import IGNORE_INDEX

if TYPE_CHECKING:
    import torch


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


def order(shown: Sequence[Sequence[int]], epochs: float, seed: int) -> "array[int]":
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


def lay(lengths: Sequence[int], *, budget: int, processes: int) -> list[list[list[int]]]:
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
