"""Read and write samples.md: the answers to a few evaluation questions at each evaluation."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from saigakit.core.display import Table
from saigakit.errors import SaigaError

FILE = "samples.md"
_TITLE = """# Ответы во время обучения · answers during training

Одни и те же вопросы из валидационной выборки, декодирование жадное. Loss — средний на токен этой выборки.

*The same questions of the evaluation set each time, greedy answers. The loss is per token of the evaluation set.*
"""
_QUESTION, _REFERENCE = "**Вопрос · question**", "**Верный ответ · right answer**"
_INDENT = "    "  # Markdown shows such lines verbatim; no other line of the file begins with it
_BLOCK = re.compile(rf"^(\*\*.*\*\*)\n\n({_INDENT}.*(?:\n{_INDENT}.*)*)", re.MULTILINE)  # heading and text
_HEADING = re.compile(r"\*\*Шаг (\d+), (?:loss|ошибка) ([\d.]+|nan|inf)(?:, обрезан на (\d+) токенах)? · .*\*\*")


class Section(NamedTuple):
    question: str
    reference: str


class Answer(NamedTuple):
    text: str
    cut_at: int = 0  # the limit of tokens, if the answer had not ended by then


class Entry(NamedTuple):
    """One evaluation: the loss as printed, and an answer for each section."""

    step: int
    loss: str
    answers: tuple[Answer, ...]


def format_answers(sections: Sequence[Section], entries: Sequence[Entry]) -> str:
    parts = [_TITLE]
    for number, (question, reference) in enumerate(sections):
        parts += [f"## {number + 1}\n", _QUESTION, _indented(question), _REFERENCE, _indented(reference)]
        for step, loss, answers in entries:
            text, limit = answers[number]
            russian = f"Шаг {step}, loss {loss}" + (f", обрезан на {limit} токенах" if limit else "")
            english = f"step {step}, loss {loss}" + (f", cut at {limit} tokens" if limit else "")
            parts += [f"**{russian} · {english}**", _indented(text)]
    return "\n".join(parts)


def _indented(text: str) -> str:
    return "\n" + "\n".join(_INDENT + line for line in text.split("\n")) + "\n"


def read_answers(file: Path) -> tuple[list[Section], list[Entry]]:
    """Raises SaigaError if the file is damaged."""
    sections: list[Section] = []
    steps: dict[tuple[int, str], list[Answer]] = {}
    try:
        for text in file.read_bytes().decode("utf-8").split("\n## ")[1:]:
            blocks = [(heading, re.sub(rf"(?m)^{_INDENT}", "", lines)) for heading, lines in _BLOCK.findall(text)]
            (_, question), (_, reference), *answers = blocks
            sections.append(Section(question, reference))
            for heading, answer in answers:
                if (found := _HEADING.fullmatch(heading)) is None:
                    raise ValueError(f"{heading!r} is not the heading of an answer")
                steps.setdefault((int(found[1]), found[2]), []).append(Answer(answer, int(found[3] or 0)))
        if not sections or any(len(answers) != len(sections) for answers in steps.values()):
            raise ValueError("answers are missing")
    except ValueError as error:
        raise SaigaError(f"{file} is damaged ({error}). Delete it to start a new one.") from None
    return sections, [Entry(step, loss, tuple(answers)) for (step, loss), answers in sorted(steps.items())]


def answers_table(stage_dir: str | Path) -> Table:
    """Show the first and the last answers of a finished 02_train next to the right ones."""
    file = Path(stage_dir) / FILE
    if not file.is_file():
        return Table(("ответы · answers",), [], "Нет вопросов для валидации · There were no evaluation questions.")
    sections, entries = read_answers(file)
    shown = [entries[0], entries[-1]] if len(entries) > 1 else entries
    steps = (f"шаг {entry.step} · step {entry.step}" for entry in shown)
    header = ("вопрос · question", "верный ответ · right answer", *steps)
    rows = [
        (*section, *(f"{answer.text} …" if answer.cut_at else answer.text for answer in answers))
        for section, *answers in zip(sections, *(entry.answers for entry in shown), strict=True)
    ]
    losses = " → ".join(entry.loss for entry in shown)
    return Table(header, rows, f"Loss на валидации · evaluation loss: {losses}. {FILE} has all {len(entries)} steps.")
