"""A training log into a table and a picture: the loss on training and held-out texts, step by step."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saigakit.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOG_FILE = "log.jsonl"
Entry = dict[str, Any]  # {"step", "loss", "tokens", "seconds"} of a step, {"step", "held_out_loss"} of an evaluation


def read(directory: Path) -> list[Entry]:
    """The log of a finished 02_train."""
    lines = (directory / LOG_FILE).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def summary(directory: Path) -> Table:
    """First and last losses, tokens and time: what a reader of 02_train looks for."""
    log = read(directory)
    steps = [entry for entry in log if "loss" in entry]
    held_out = [entry for entry in log if "held_out_loss" in entry]
    last = sum(entry["loss"] for entry in steps[-10:]) / len(steps[-10:])
    tokens, seconds = steps[-1]["tokens"], steps[-1]["seconds"]
    rows = [
        ("шагов · steps", f"{steps[-1]['step']}"),
        ("токенов · tokens", f"{tokens:,}"),
        ("время · time", f"{seconds / 60:.1f} min, {tokens / seconds:.0f} tokens/s"),
        ("ошибка на обучении · training loss", f"{steps[0]['loss']:.3f} → {last:.3f}"),
    ]
    if held_out:
        first, final = held_out[0]["held_out_loss"], held_out[-1]["held_out_loss"]
        rows.append(("ошибка на отложенных · held-out loss", f"{first:.3f} → {final:.3f}"))
    return Table(("обучение · training", ""), rows, "Loss: mean over the learned tokens, in nats per token.")


def plot(log: Sequence[Entry]) -> "Figure":
    """Both losses over the steps, logarithmic: from 3 to 0.03 all of it can be read."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    steps = [entry for entry in log if "loss" in entry]
    held_out = [entry for entry in log if "held_out_loss" in entry]
    axes.plot(
        [entry["step"] for entry in steps],
        [entry["loss"] for entry in steps],
        color="#9aa0a6",
        linewidth=1,
        label="обучение (training texts)",
    )
    if held_out:
        axes.plot(
            [entry["step"] for entry in held_out],
            [entry["held_out_loss"] for entry in held_out],
            "o-",
            color="#1a73e8",
            label="отложенные тексты (held-out texts)",
        )
        final = held_out[-1]
        text, place = f"{final['held_out_loss']:.3f}", (final["step"], final["held_out_loss"])
        axes.annotate(text, place, xytext=(0, 8), textcoords="offset points", ha="center", color="#1a73e8")
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
