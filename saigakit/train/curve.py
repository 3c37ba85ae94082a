"""Summarise a training log: a table, a plot of both losses and a verdict in words."""

import json
import tomllib
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from saigakit.core import manifest
from saigakit.core.display import Table
from saigakit.core.lazy import mpl_figure
from saigakit.core.workspace import GB

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOG_FILE = "log.jsonl"
# {"step", "loss", "tokens", "seconds"} for a step, {"step", "held_out_loss"} for an evaluation. On a GPU also
# {"memory_predicted", "memory_peak"}, in bytes of one process.
LogEntry = dict[str, Any]
# A change of the loss counts when it is large in both measures: a demo run that did not overfit ended 7 % above its
# best loss, which was only 0.003 nats.
CHANGE = 0.02  # relative
CHANGE_NATS = 0.01  # per token: the likelihood of a token changes by 1 %
STILL_FALLING = 0.05  # share of the total fall that came with the last evaluation; a steady fall has a quarter there
_BLUE, _GREEN = "#1a73e8", "#188038"
NEIGHBOURS = 10  # training steps that are averaged: the loss of a single step is noisy
_ENDED = {
    "early_stopping": "раньше: loss на валидации перестал падать · early: evaluation loss stopped improving",
    "max_hours": "раньше: вышло время max_hours · early: max_hours reached",
}


def read_log(directory: Path) -> list[LogEntry]:
    """The log of a finished 02_train."""
    return [json.loads(line) for line in (directory / LOG_FILE).read_text(encoding="utf-8").splitlines()]


def evaluations(log: Iterable[LogEntry]) -> list[tuple[int, float]]:
    """(step, evaluation loss), in order."""
    return [(entry["step"], entry["held_out_loss"]) for entry in log if "held_out_loss" in entry]


class Best(NamedTuple):
    """The evaluation whose adapter is kept, and the number of evaluations after it."""

    step: int
    loss: float
    worse_since: int


def find_best(log: Iterable[LogEntry]) -> Best | None:
    """Find the lowest evaluation loss after step 0, the earliest of equals."""
    found = [(step, loss) for step, loss in evaluations(log) if step > 0]
    if not found:
        return None
    lowest = min(range(len(found)), key=lambda number: found[number][1])
    return Best(*found[lowest], worse_since=len(found) - 1 - lowest)


def summary(directory: Path) -> Table:
    """Tabulate losses, the best step, tokens, time and memory of a finished 02_train, or of its log alone."""
    log = read_log(directory)
    facts = manifest.read(directory).get("training", {}) if (directory / manifest.NAME).is_file() else {}
    steps = [entry for entry in log if "loss" in entry]
    tokens, seconds = steps[-1]["tokens"], steps[-1]["seconds"]
    last = _training_loss(log, steps[-1]["step"])
    rows = [
        ("шагов · steps", f"{steps[-1]['step']}"),
        ("токенов · tokens", f"{tokens:,}"),
        ("время · time", f"{seconds / 60:.1f} min, {tokens / seconds:.0f} tokens/s"),
        ("loss на обучении · training loss", f"{steps[0]['loss']:.3f} → {last:.3f}"),
    ]
    if held_out := evaluations(log):
        losses = f"{held_out[0][1]:.3f} → {held_out[-1][1]:.3f}"
        rows.append(("loss на валидации · evaluation loss", losses))
    if (found := find_best(log)) is not None:
        rows.append(("лучший шаг · best step", f"{found.step}, {found.loss:.3f}"))
    if facts.get("ended") in _ENDED:
        rows.append(("обучение закончилось · training ended", _ENDED[facts["ended"]]))
    memory = {name: value for entry in log for name, value in entry.items() if name.startswith("memory_")}
    if memory:
        predicted, peak = (f"{memory[f'memory_{name}'] / GB:.2f} GB" if f"memory_{name}" in memory else "?"
                           for name in ("predicted", "peak"))  # fmt: skip
        rows.append(("память: оценка, пик · memory: estimated, peak", f"{predicted}, {peak}"))
    return Table(("обучение · training", ""), rows, "Loss в натах на обучаемый токен. · Loss: nats per trained token.")


def verdict(log: Sequence[LogEntry]) -> str:
    """Judge the run by its curve and advise what to change, in Russian and English."""
    held_out, found = evaluations(log), find_best(log)
    if found is None or len(held_out) < 3:
        return _text("few")
    best_step, lowest, _ = found
    (_, first), (before_step, before), (last_step, last) = held_out[0], held_out[-2], held_out[-1]
    if _is_change(lowest, first):
        kind = "never_better"
    elif _is_change(last, lowest):
        is_falling = _is_change(_training_loss(log, best_step), _training_loss(log, last_step))
        kind = "overfits" if is_falling else "worse"
    elif not _is_change(first, lowest):
        kind = "flat"
    else:
        is_falling = before - last > max(STILL_FALLING * (first - last), CHANGE_NATS)
        kind = "falling" if is_falling else "learned"
    fall = 100 * (1 - last / before)
    losses = {"first": first, "lowest": lowest, "before": before, "last": last}
    return _text(kind).format(
        best_step=best_step,
        before_step=before_step,
        last_step=last_step,
        rise=f"{100 * (last / lowest - 1):.0f} %",
        fall=f"{round(fall, 1 if fall < 1 else None)} %",
        **{name: f"{loss:.3f}" for name, loss in losses.items()},
    )


def _text(kind: str) -> str:
    texts = tomllib.loads(resources.files("saigakit.train").joinpath("verdicts.toml").read_text(encoding="utf-8"))
    return " · ".join(texts[kind].values())


def _is_change(high: float, low: float) -> bool:
    return high - low > max(CHANGE * low, CHANGE_NATS)


def _training_loss(log: Sequence[LogEntry], step: int) -> float:
    """Average up to NEIGHBOURS steps that end with `step`."""
    losses = [entry["loss"] for entry in log if "loss" in entry]
    until = sum("loss" in entry and entry["step"] <= step for entry in log)
    width = max(1, min(NEIGHBOURS, len(losses) // 4))
    window = losses[max(0, until - width) : max(until, width)]
    return float(sum(window) / len(window))


def plot(log: Sequence[LogEntry]) -> "mpl_figure.Figure":
    """Plot both losses by step, on a logarithmic axis: 3 and 0.03 are both readable."""
    figure = mpl_figure.Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    steps = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    axes.plot(*zip(*steps, strict=True), color="#9aa0a6", linewidth=1, label="обучение (training)")
    _plot_held_out(axes, evaluations(log), find_best(log))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")  # 0.05, not 5 × 10⁻²
    lowest, highest = axes.get_ylim()
    # Label values between powers of ten only on a short axis, where the labels do not overlap.
    axes.yaxis.set_minor_formatter("{x:g}" if highest < 10 * lowest else "")
    axes.set_xlabel("шаг оптимизатора / optimizer step")
    axes.set_ylabel("loss на токен / loss per token")
    axes.set_title("Как училась модель / how the model learned", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False)
    return figure


def _plot_held_out(axes: "Axes", held_out: Sequence[tuple[int, float]], lowest: Best | None) -> None:
    """Write the last loss next to its point, and the best one if it differs."""
    if not held_out:
        return
    axes.plot(*zip(*held_out, strict=True), "o-", color=_BLUE, label="валидация (evaluation)")
    marked = [(held_out[-1], _BLUE)]
    if lowest is not None and lowest.worse_since:
        label = f"лучший шаг: {lowest.step} (best step)"
        axes.plot(lowest.step, lowest.loss, "o", color=_GREEN, markersize=10, label=label)
        marked.append(((lowest.step, lowest.loss), _GREEN))
    behind = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
    for place, colour in marked:  # above the points, where the training curve rarely is
        text, above = f"{place[1]:.3f}", (0, 9)
        axes.annotate(text, place, above, textcoords="offset points", ha="center", color=colour, bbox=behind)
