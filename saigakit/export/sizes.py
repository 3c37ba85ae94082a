"""Bytes of a model in each form it can have into a picture: what fits where."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GREY, _BLUE, _GREEN, _PALE = "#9aa0a6", "#1a73e8", "#188038", "#ceead6"


def plot(base: int, adapter: int | None, by_quant_type: Mapping[str, int], made: str) -> "Figure":
    """Bars in bytes: the base on disk, the adapter, the GGUF that was made, and what other quant types would take."""
    from matplotlib.figure import Figure

    bars = [("база\nbase model", base, _GREY)]
    if adapter is not None:
        bars.append(("адаптер\nadapter", adapter, _BLUE))
    bars += [
        (f"{name}  ← model.gguf" if name == made else name, size, _GREEN if name == made else _PALE)
        for name, size in by_quant_type.items()
    ]
    labels, values, colours = zip(*bars, strict=True)
    unit, divisor = ("ГБ / GB", 1e9) if max(values) >= 1e9 else ("МБ / MB", 1e6)
    figure = Figure(figsize=(9, 0.42 * len(bars) + 1.4), layout="constrained")
    axes = figure.subplots()
    drawn = axes.barh(labels, [value / divisor for value in values], color=colours)
    axes.bar_label(drawn, fmt="{:.2f}", padding=3, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"Размер модели: сделан {made}, остальные типы — для сравнения\n"
        f"size of the model: {made} was made, the other quant types are computed",
        fontsize=11,
    )
    return figure
