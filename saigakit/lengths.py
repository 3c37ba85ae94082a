"""How many tokens conversations have, into a picture with the limit."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLUE, _RED = "#1a73e8", "#d93025"


def plot(lengths: Sequence[int], limit: int) -> "Figure":
    """How many conversations have how many tokens, those beyond the limit in red; logarithmic, so that both show."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, NullLocator

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    shortest, longest, border = min(*lengths, limit), max(*lengths, limit) + 1, limit + 0.5
    steps = range(math.floor(8 * math.log2(shortest / border)), math.ceil(8 * math.log2(longest / border)) + 1)
    edges = [border * 2 ** (step / 8) for step in steps]  # the limit is an edge: no bar is of both kinds
    fits = [tokens for tokens in lengths if tokens <= limit]
    axes.hist(fits, edges, color=_BLUE, rwidth=0.92, label=f"{len(fits):,} помещаются (fit)")
    if too_long := [tokens for tokens in lengths if tokens > limit]:
        label = f"{len(too_long):,} длиннее (over the limit)"
        axes.hist(too_long, edges, color=_RED, rwidth=0.92, label=label)
    axes.axvline(border, color=_RED, linestyle="--", label=f"предел {limit:,} (max_seq_length)")
    axes.set_xscale("log", base=2)
    ticks = [2**power for power in range(math.floor(math.log2(shortest)), math.ceil(math.log2(longest)) + 1)]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(shortest / 1.1, longest * 1.1)
    axes.set_xlabel("токенов в диалоге\ntokens of a conversation")
    axes.set_ylabel("диалогов\nconversations")
    axes.set_title("Длина диалогов / how long the conversations are", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure
