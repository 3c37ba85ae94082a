"""Tokenised conversations into packs without padding: best fit into a token budget, positions restart per document."""

import bisect
import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from saigakit.tokenization import IGNORE_INDEX

if TYPE_CHECKING:
    import torch

_WINDOW = 512  # conversations: enough to fill packs to 99 %


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


def schedule(lengths: Sequence[int], *, budget: int, most: int, epochs: float, seed: int) -> list[list[int]]:
    """Packs of all epochs in the order of training; every whole epoch shows each conversation once.

    A pack has at most `budget` tokens and `most` conversations. Conversations are shuffled, packed window by window,
    so that their neighbours change, and the packs are shuffled.
    """
    rng = random.Random(seed)
    packs: list[list[int]] = []
    for epoch in range(math.ceil(epochs)):
        order = rng.sample(range(len(lengths)), len(lengths))
        windows = [order[start : start + _WINDOW] for start in range(0, len(order), _WINDOW)]
        fitted = [
            [window[i] for i in pack] for window in windows for pack in best_fit([lengths[i] for i in window], budget)
        ]
        made = [pack[start : start + most] for pack in fitted for start in range(0, len(pack), most)]
        rng.shuffle(made)
        share = min(1.0, epochs - epoch)
        packs += made[: math.ceil(share * len(made))]
    return packs
