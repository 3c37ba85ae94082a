"""A training log into a table, a picture and a verdict: the loss on training and held-out texts, step by step."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from saigakit.core import manifest
from saigakit.core.display import Table
from saigakit.core.workspace import GB

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOG_FILE = "log.jsonl"
# {"step", "loss", "tokens", "seconds"} of a step, {"step", "held_out_loss"} of an evaluation. Where they are known:
# {"memory_predicted"} and {"memory_peak"}, in bytes of one process.
Entry = dict[str, Any]
# The same texts are evaluated each time, so what varies is the optimizer alone. A run of the demo that did not memorise
# ended 7 % above its best loss, which were 0.003 nats: a change counts when it is large in both measures.
CHANGE = 0.02  # of the loss
CHANGE_NATS = 0.01  # per token: the likelihood of a token changes by 1 %
STILL_FALLING = 0.05  # of the whole fall, since the last evaluation but one; an even fall has a quarter there
_BLUE, _GREEN = "#1a73e8", "#188038"
NEIGHBOURS = 10  # training steps that are averaged: one step is of a few texts, and easy and hard ones alternate
_VERDICTS = {
    "few": (
        "Оценок на отложенных текстах меньше трёх: судить не по чему. · "
        "Fewer than three evaluations on held-out texts: nothing to judge by."
    ),
    "memorises": (
        "Заучивает: лучшая ошибка на отложенных была на шаге {best_step} из {last_step} и с тех пор выросла на {rise} "
        "({lowest} → {last}), а на обучении падает. Меньше epochs или больше данных. · "
        "It memorises: held-out loss was best at step {best_step} of {last_step} and has risen by {rise} since "
        "({lowest} → {last}), while training loss falls. Fewer epochs or more data."
    ),
    "never_better": (
        "Лучше не стало: ошибка на отложенных до обучения была {first}, а лучшая — {lowest}, на шаге {best_step} из "
        "{last_step}. Уменьшите learning_rate или добавьте данных. · "
        "It did not improve: held-out loss was {first} before training and {lowest} at best, at step {best_step} of "
        "{last_step}. Use a smaller learning_rate or more records."
    ),
    "worse": (
        "Портится: с шага {best_step} из {last_step} ошибка на отложенных выросла на {rise} ({lowest} → {last}), и на "
        "обучении она не падает. Уменьшите learning_rate вдвое. · "
        "It gets worse: since step {best_step} of {last_step} held-out loss has risen by {rise} ({lowest} → {last}), "
        "and training loss does not fall. Halve learning_rate."
    ),
    "flat": (
        "Не учится: ошибка на отложенных почти не изменилась ({first} → {last}). Или модель это знает, или мал "
        "learning_rate, или отложенные тексты непохожи на обучающие. · "
        "It does not learn: held-out loss has hardly changed ({first} → {last}). Either the model knows this, or "
        "learning_rate is too small, or the held-out texts are of another kind."
    ),
    "falling": (
        "Ещё учится: с шага {before_step} по {last_step} ошибка на отложенных упала на {fall} ({before} → {last}). "
        "Больше epochs может помочь. · "
        "Still learning: from step {before_step} to {last_step} held-out loss fell by {fall} ({before} → {last}). "
        "More epochs may help."
    ),
    "learned": (
        "Выучила: ошибка на отложенных упала с {first} до {last} и больше не меняется. Больше epochs не нужно, помогут "
        "новые данные. · "
        "Learned: held-out loss fell from {first} to {last} and has levelled off. More epochs are not needed; more "
        "data may help."
    ),
}
_ENDED = {
    "early_stopping": "раньше: на отложенных не становилось лучше · early: no better held-out loss",
    "max_hours": "раньше: кончилось max_hours · early: max_hours were over",
}


def read(directory: Path) -> list[Entry]:
    """The log of a finished 02_train."""
    lines = (directory / LOG_FILE).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def evaluations(log: Iterable[Entry]) -> list[tuple[int, float]]:
    """(step, held-out loss), in order."""
    return [(entry["step"], entry["held_out_loss"]) for entry in log if "held_out_loss" in entry]


class Best(NamedTuple):
    """The evaluation whose adapter is kept; `worse_since`: how many evaluations followed it."""

    step: int
    loss: float
    worse_since: int


def best(log: Iterable[Entry]) -> Best | None:
    """Find the lowest held-out loss after training began, the earliest of equals; None where there is none."""
    found = [(step, loss) for step, loss in evaluations(log) if step > 0]
    if not found:
        return None
    lowest = min(range(len(found)), key=lambda number: found[number][1])
    return Best(*found[lowest], worse_since=len(found) - 1 - lowest)


def summary(directory: Path) -> Table:
    """Losses, the best step, tokens, time and memory: what a reader of 02_train looks for.

    The manifest's "training" tells how it "ended" and the "best_step", whose adapter was kept; both may be missing.
    """
    log = read(directory)
    facts = manifest.read(directory).get("training", {}) if (directory / manifest.NAME).is_file() else {}
    steps = [entry for entry in log if "loss" in entry]
    tokens, seconds = steps[-1]["tokens"], steps[-1]["seconds"]
    last = _training_loss(log, steps[-1]["step"])
    rows = [
        ("шагов · steps", f"{steps[-1]['step']}"),
        ("токенов · tokens", f"{tokens:,}"),
        ("время · time", f"{seconds / 60:.1f} min, {tokens / seconds:.0f} tokens/s"),
        ("ошибка на обучении · training loss", f"{steps[0]['loss']:.3f} → {last:.3f}"),
    ]
    if held_out := evaluations(log):
        losses = f"{held_out[0][1]:.3f} → {held_out[-1][1]:.3f}"
        rows.append(("ошибка на отложенных · held-out loss", losses))
    if (found := best(log)) is not None:
        rows.append(("лучший шаг · best step", f"{found.step}, {found.loss:.3f}"))
    if facts.get("best_step") is not None:
        rows.append(("сохранён адаптер шага · adapter kept of step", f"{facts['best_step']}"))
    if facts.get("ended") in _ENDED:
        rows.append(("обучение закончилось · training ended", _ENDED[facts["ended"]]))
    memory = {name: value for entry in log for name, value in entry.items() if name.startswith("memory_")}
    if memory:
        predicted, peak = (f"{memory[f'memory_{name}'] / GB:.2f} GB" if f"memory_{name}" in memory else "?"
                           for name in ("predicted", "peak"))  # fmt: skip
        rows.append(("память: предсказано, измерено · memory: predicted, measured", f"{predicted}, {peak}"))
    return Table(("обучение · training", ""), rows, "Loss: mean over the learned tokens, in nats per token.")


def verdict(log: Sequence[Entry]) -> str:
    """What the curve says of the run and what to change, in Russian and English."""
    held_out, found = evaluations(log), best(log)
    if found is None or len(held_out) < 3:
        return _VERDICTS["few"]
    best_step, lowest, _ = found
    (_, first), (before_step, before), (last_step, last) = held_out[0], held_out[-2], held_out[-1]
    if _is_change(lowest, first):
        kind = "never_better"
    elif _is_change(last, lowest):
        is_falling = _is_change(_training_loss(log, best_step), _training_loss(log, last_step))
        kind = "memorises" if is_falling else "worse"
    elif not _is_change(first, lowest):
        kind = "flat"
    else:
        is_falling = before - last > max(STILL_FALLING * (first - last), CHANGE_NATS)
        kind = "falling" if is_falling else "learned"
    losses = {"first": first, "lowest": lowest, "before": before, "last": last}
    return _VERDICTS[kind].format(
        best_step=best_step,
        before_step=before_step,
        last_step=last_step,
        rise=f"{100 * (last / lowest - 1):.0f} %",
        fall=f"{100 * (1 - last / before):.0f} %",
        **{name: f"{loss:.3f}" for name, loss in losses.items()},
    )


def _is_change(high: float, low: float) -> bool:
    return high - low > max(CHANGE * low, CHANGE_NATS)


def _training_loss(log: Sequence[Entry], step: int) -> float:
    """The mean of the NEIGHBOURS steps that end with `step`, fewer in a short run; of the first ones at its start."""
    losses = [entry["loss"] for entry in log if "loss" in entry]
    until = sum("loss" in entry and entry["step"] <= step for entry in log)
    width = max(1, min(NEIGHBOURS, len(losses) // 4))
    window = losses[max(0, until - width) : max(until, width)]
    return float(sum(window) / len(window))


def plot(log: Sequence[Entry]) -> "Figure":
    """Both losses over the steps, logarithmic: from 3 to 0.03 all of it can be read."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    steps, held_out = [entry for entry in log if "loss" in entry], evaluations(log)
    axes.plot(
        [entry["step"] for entry in steps],
        [entry["loss"] for entry in steps],
        color="#9aa0a6",
        linewidth=1,
        label="обучение (training texts)",
    )
    _plot_held_out(axes, held_out, best(log))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")  # 0.05, not 5 × 10⁻²
    lowest, highest = axes.get_ylim()
    # Between the powers of ten only where few of them are in the picture: else the labels lie on each other.
    axes.yaxis.set_minor_formatter("{x:g}" if highest < 10 * lowest else "")
    axes.set_xlabel("шаг оптимизатора / optimizer step")
    axes.set_ylabel("ошибка на токен / loss per token")
    axes.set_title("Как училась модель / how the model learned", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False)
    return figure


def _plot_held_out(axes: "Axes", held_out: Sequence[tuple[int, float]], lowest: Best | None) -> None:
    """With the last loss as a number, and the best one where it is another."""
    if not held_out:
        return
    last = held_out[-1]
    axes.plot(*zip(*held_out, strict=True), "o-", color=_BLUE, label="отложенные тексты (held-out texts)")
    _name_loss(axes, last, _BLUE)
    if lowest is not None and lowest.worse_since:
        axes.plot(
            lowest.step, lowest.loss, "o", color=_GREEN, markersize=10, label=f"лучший шаг: {lowest.step} (best step)"
        )
        _name_loss(axes, (lowest.step, lowest.loss), _GREEN)


def _name_loss(axes: "Axes", place: tuple[int, float], colour: str) -> None:
    """Above the point, where the losses of training seldom are; readable also where they are."""
    behind = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
    axes.annotate(
        f"{place[1]:.3f}", place, xytext=(0, 9), textcoords="offset points", ha="center", color=colour, bbox=behind
    )
