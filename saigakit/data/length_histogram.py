"""Plot the lengths of conversations with the limit."""

import bisect
import math
from collections import Counter
from collections.abc import Sequence

from saigakit.core.display import Table
from saigakit.core.lazy import mpl_figure

_WIDTH = 40  # characters of the longest bar
_BLUE, _RED = "#1a73e8", "#d93025"


def _edges(lengths: Sequence[int], limit: int) -> list[float]:
    """Logarithmic, with the limit as an edge, so that no bar crosses it."""
    border = limit + 0.5
    shortest, longest = min(*lengths, limit), max(*lengths, limit) + 1
    steps = range(math.floor(8 * math.log2(shortest / border)), math.ceil(8 * math.log2(longest / border)) + 1)
    return [border * 2 ** (step / 8) for step in steps]


def count_bars(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """[from, to, conversations] of each bar that is not empty; tokens, both ends included."""
    edges = _edges(lengths, limit)
    counts = Counter(bisect.bisect_right(edges, tokens) - 1 for tokens in lengths)
    return [[math.ceil(edges[bar]), math.ceil(edges[bar + 1]) - 1, counts[bar]] for bar in sorted(counts)]


def make_table(bars: Sequence[Sequence[int]], limit: int) -> Table:
    most = max(count for *_, count in bars)
    rows = []
    for first, last, count in bars:
        bar = ("█" if last <= limit else "░") * math.ceil(_WIDTH * count / most)
        rows.append((f"{first:,}–{last:,}", f"{count:,}", bar.ljust(_WIDTH)))
    note = f"░ длиннее {limit:,} токенов · over the limit"
    return Table(("токенов · tokens", "диалогов · conversations", ""), rows, note)


def plot(lengths: Sequence[int], limit: int) -> "mpl_figure.Figure":
    """Conversations over the limit are red; the axis is logarithmic, so that both kinds are visible."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    figure = mpl_figure.Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    edges = _edges(lengths, limit)
    fitting = [tokens for tokens in lengths if tokens <= limit]
    axes.hist(fitting, edges, color=_BLUE, rwidth=0.92, label=f"{len(fitting):,} помещаются (fit)")
    if too_long := [tokens for tokens in lengths if tokens > limit]:
        axes.hist(too_long, edges, color=_RED, rwidth=0.92, label=f"{len(too_long):,} длиннее (over the limit)")
    axes.axvline(limit + 0.5, color=_RED, linestyle="--", label=f"лимит {limit:,} (max_seq_length)")
    axes.set_xscale("log", base=2)
    ticks = [2**power for power in range(math.floor(math.log2(edges[0])), math.ceil(math.log2(edges[-1])) + 1)]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(edges[0] / 1.1, edges[-1] * 1.1)
    axes.set_xlabel("токенов в диалоге\ntokens per conversation")
    axes.set_ylabel("диалогов\nconversations")
    axes.set_title("Длина диалогов / lengths of conversations", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure
