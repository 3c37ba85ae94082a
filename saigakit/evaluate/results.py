"""Show the results of a comparison as tables and a plot."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saigakit.core.display import Table
from saigakit.core.lazy import mpl_figure
from saigakit.errors import SaigaError
from saigakit.prompt import token_view

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FILE = "results.json"
RAW_FILE = "raw.json"
Result = dict[str, Any]
_COLOURS = ("#9aa0a6", "#1a73e8", "#188038")
_MEANING = {
    "before": ("до обучения", "base model, transformers"),
    "after": ("после обучения", "with the adapter, transformers"),
}
_GGUF_MEANING = ("GGUF для ноутбука", "GGUF, llama.cpp")
_SHARES = {
    "json_valid": ("верный JSON", "valid JSON"),
    "exact": ("точный ответ", "exact"),
    "f1": ("F1 элементов", "F1 of items"),
    "calls": ("точный вызов", "exact calls"),
    "restraint": ("без лишних вызовов", "no undue call"),
}  # in the order of the table; a task has some of them


def read(directory: Path) -> list[Result]:
    """The rows of results.json in a finished 04_infer."""
    rows: list[Result] = json.loads((directory / FILE).read_text(encoding="utf-8"))
    return rows


def show_table(results: Sequence[Result]) -> Table:
    shares = _shares_of(results)
    rows = [
        (
            f"{row['name']} ({_MEANING.get(row['name'], _GGUF_MEANING)[1]})",
            *(f"{100 * row[share]:.1f} %" for share in shares),
            f"{row['tokens_per_s']:.0f}",
            f"{row['bytes'] / 1e6:,.0f} MB",
        )
        for row in results
    ]
    header = ("model", *(english for _, english in shares.values()), "tokens/s", "size")
    note = f"Evaluation records: {results[0]['n']}, greedy answers without a grammar, in large batches."
    return Table(header, rows, note)


def _shares_of(results: Sequence[Result]) -> dict[str, tuple[str, str]]:
    return {share: names for share, names in _SHARES.items() if share in results[0]}


def plot(results: Sequence[Result]) -> "mpl_figure.Figure":
    """The metrics on the left, size and speed on the right."""
    figure = mpl_figure.Figure(figsize=(11, 4.6), layout="constrained")
    shares, sizes, speeds = figure.subplots(1, 3, width_ratios=(3, 1, 1))
    _plot_shares(shares, results)
    names = [row["name"] for row in results]
    for axes, title, values in (
        (sizes, "размер, МБ\nsize, MB", [row["bytes"] / 1e6 for row in results]),
        (speeds, "токенов в секунду\ntokens/s, in large batches", [row["tokens_per_s"] for row in results]),
    ):
        bars = axes.bar(names, values, color=_COLOURS[: len(names)])
        axes.bar_label(bars, fmt="{:,.0f}", padding=2)
        axes.set_title(title, fontsize=10)
        axes.margins(y=0.12)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.set_yticks([])
    figure.suptitle(
        f"Ответы на {results[0]['n']} записей валидационной выборки, которых модель не видела\n"
        "greedy answers to the evaluation set, without a grammar",
        fontsize=12,
    )
    return figure


def _plot_shares(axes: "Axes", results: Sequence[Result]) -> None:
    names, width = _shares_of(results), 0.8 / len(results)
    for index, (row, colour) in enumerate(zip(results, _COLOURS, strict=False)):
        russian, english = _MEANING.get(row["name"], _GGUF_MEANING)
        bars = axes.bar(
            [place + index * width for place in range(len(names))],
            [100 * row[share] for share in names],
            width * 0.95,
            color=colour,
            label=f"{row['name']}: {russian} ({english})",
        )
        axes.bar_label(bars, fmt="{:.1f}", padding=2, fontsize=9)
    middle = width * (len(results) - 1) / 2
    labels = [f"{russian}\n{english}" for russian, english in names.values()]
    axes.set_xticks([place + middle for place in range(len(names))], labels)
    axes.set_ylim(0, 112)
    axes.set_ylabel("% записей / of records")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False, fontsize=9)


def raw_answers(directory: Path) -> token_view.Marked:
    """The first question as every model got it and its answers, with all special tokens; the answers are marked."""
    if not (directory / RAW_FILE).is_file():
        raise SaigaError(f"{directory} was made by an earlier saigakit. Delete it and run 04_infer again.")
    raw: dict[str, str] = json.loads((directory / RAW_FILE).read_text(encoding="utf-8"))
    prompt = raw.pop("")
    parts = ([(f"{name}:\n{prompt}", False), (answer, True)] for name, answer in raw.items())
    return token_view.Marked(list(map(token_view.mark_parts, parts)))


def examples_table(answers_file: Path, count: int = 6) -> Table:
    """Records with the answer of each model; those that the trained models answer wrong come first."""
    rows = [json.loads(line) for line in answers_file.read_text(encoding="utf-8").split("\n") if line]
    names = list(rows[0]["answers"])
    trained = [name for name in names if name != "before"]
    rows.sort(key=lambda row: sum(row["exact"][name] for name in trained))
    shown = [
        (
            row["prompt"],
            row["reference"],
            *(f"{'✓' if row['exact'][name] else '✗'} {row['answers'][name]}" for name in names),
        )
        for row in rows[:count]
    ]
    wrong = sum(not all(row["exact"][name] for name in trained) for row in rows)
    note = f"Wrong answers after training: {wrong} of {len(rows)}; they come first."
    return Table(("text", "reference", *names), shown, note)
