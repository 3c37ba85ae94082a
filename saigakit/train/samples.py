"""The model in training into its answers to a few held-out questions: samples.md, written at every evaluation."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from saigakit.core.display import Table
from saigakit.core.files import write_text
from saigakit.data import questions
from saigakit.data.conversations import spread
from saigakit.data.questions import Example
from saigakit.errors import SaigaError
from saigakit.prompt import encoding
from saigakit.prompt.encoding import Tokenizer
from saigakit.weights import generate, load

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel

FILE = "samples.md"
COUNT = 4  # questions
MOST_TOKENS = 256  # of an answer; what a T4 gives in about half a minute
PROMPT_TOKENS = 1024  # longer questions are not asked: their keys and values would need the memory of training
_LOOKED_AT = 64  # conversations among which questions that are short enough are found
_TITLE = """# Ответы во время обучения · answers during training

Одни и те же отложенные вопросы; каждый раз самый вероятный ответ. Ошибка — на токен отложенных текстов.

*The same held-out questions each time, greedy answers. The loss is per token of the held-out texts.*
"""
_QUESTION, _RIGHT = "**Вопрос · question**", "**Верный ответ · right answer**"
_INDENT = "    "  # Markdown shows such lines as they are; no line of the frame begins so
_STEP = re.compile(r"\*\*Шаг (\d+), ошибка ([\d.]+|nan|inf)(?:, обрезан на (\d+) токенах)? · .*\*\*")


class Answer(NamedTuple):
    """`cut_at`: the limit of tokens where it had not ended by then, else 0."""

    text: str
    cut_at: int = 0


@dataclass(frozen=True)
class Entry:
    """One evaluation: the held-out loss as it is written, and an answer for each question."""

    step: int
    loss: str
    answers: tuple[Answer, ...]


class Samples:
    """At most four questions, evenly over the held-out conversations, and the answers so far.

    Where no question has at most PROMPT_TOKENS, or there is none, nothing is written, which is said.
    """

    def __init__(self, tokenizer: Tokenizer, conversations: "Dataset", file: Path) -> None:
        self.file = file
        self._tokenizer = tokenizer
        found = map(questions.of_conversation, spread(conversations, _LOOKED_AT))
        asked = [(each, each.prompt(tokenizer)) for each in found if each is not None]
        chosen = spread([pair for pair in asked if len(pair[1]) <= PROMPT_TOKENS], COUNT)
        self._examples: list[Example] = [example for example, _ in chosen]
        self._prompts = [prompt for _, prompt in chosen]
        self._references = [example.reference(tokenizer) for example in self._examples]
        self._stop_ids = encoding.end_of_turn_ids(tokenizer)
        longest = max((len(tokenizer.encode_text(reference)) for reference in self._references), default=0)
        self.max_new_tokens = min(MOST_TOKENS, longest + questions.MARGIN)
        self._entries: list[Entry] = []
        if not chosen:
            print(f"No held-out question of at most {PROMPT_TOKENS} tokens: {FILE} is not written.", flush=True)

    def write(self, step: int, loss: float, model: "PeftModel") -> None:
        """Asks the model, which is left as it was, and adds the answers to the file; those of `step` are replaced.

        `model` is not wrapped for several processes, and this is called on the first one alone.
        """
        if not self._prompts:
            return
        made = Entry(step, f"{loss:.4f}", tuple(map(self._answer, self._rows(model))))
        self._entries = [entry for entry in self._entries if entry.step != step] + [made]
        write_text(self.file, self._text())

    def restart_at(self, step: int) -> None:
        """Takes up the file of an earlier session, entries after `step` cut off.

        Raises SaigaError where it is of other questions or damaged.
        """
        if not self._prompts or not self.file.is_file():
            return
        sections, self._entries = _parsed(self.file)
        if sections != self._sections():
            raise SaigaError(
                f"{self.file} is of other held-out questions than this run's. Resume with the records that the earlier "
                "session had, or train afresh without resume_from."
            )
        self._entries = [entry for entry in self._entries if entry.step <= step]
        write_text(self.file, self._text())

    def _rows(self, model: "PeftModel") -> list[list[int]]:
        with generating(model) as base:
            return generate.greedy_in_batches(base, self._prompts, self._stop_ids, self.max_new_tokens)

    def _answer(self, row: Sequence[int]) -> Answer:
        ids, length = generate.cut_at_stop(row, self._stop_ids)
        return Answer(self._tokenizer.decode(ids), self.max_new_tokens if len(ids) == length else 0)

    def _sections(self) -> list[tuple[str, str]]:
        asked = [str(example.messages[-1]["content"]) for example in self._examples]
        return list(zip(asked, self._references, strict=True))

    def _text(self) -> str:
        parts = [_TITLE]
        for number, (question, reference) in enumerate(self._sections()):
            parts += [f"## {number + 1}\n", _QUESTION, _indented(question), _RIGHT, _indented(reference)]
            for entry in self._entries:
                parts += [_heading(entry, number), _indented(entry.answers[number].text)]
        return "\n".join(parts)


@contextmanager
def generating(model: "PeftModel") -> Iterator[Any]:
    """The transformers model inside `model`, ready to generate; left as it was found, whatever happens.

    Attention goes from packs to sdpa, every module to eval mode, where neither dropout nor activation checkpointing
    is active; numbers are of the type that training computes in.
    """
    import torch
    from transformers import GenerationConfig

    base: Any = model.get_base_model()
    modes = [(module, module.training) for module in model.modules()]
    attention, settings = base.config._attn_implementation, base.generation_config
    device, dtype = base.device.type, base.dtype
    try:
        base.set_attn_implementation("sdpa")
        base.generation_config = GenerationConfig()  # the model's own may hold a repetition penalty
        model.eval()
        _give_back_memory(device)
        with torch.autocast(device, dtype=dtype) if dtype != torch.float32 else load.fast_matmul():
            yield base
    finally:
        base.generation_config = settings
        base.set_attn_implementation(attention)
        for module, training in modes:
            module.training = training
        _give_back_memory(device)


def _give_back_memory(device: str) -> None:
    """What torch keeps of freed tensors: it is counted as used, and lies in pieces where packs need a whole."""
    import torch

    if device == "cuda":
        torch.cuda.empty_cache()


def _indented(text: str) -> str:
    return "\n" + "\n".join(_INDENT + line for line in text.split("\n")) + "\n"


def _heading(entry: Entry, number: int) -> str:
    limit = entry.answers[number].cut_at
    russian = f"Шаг {entry.step}, ошибка {entry.loss}" + (f", обрезан на {limit} токенах" if limit else "")
    english = f"step {entry.step}, loss {entry.loss}" + (f", cut at {limit} tokens" if limit else "")
    return f"**{russian} · {english}**"


def _parsed(file: Path) -> tuple[list[tuple[str, str]], list[Entry]]:
    """(question, right answer) of each section, and the entries. Raises SaigaError where the file is damaged."""
    sections: list[tuple[str, str]] = []
    steps: dict[tuple[int, str], list[Answer]] = {}
    try:
        for section in file.read_bytes().decode("utf-8").split("\n## ")[1:]:
            (_, question), (_, reference), *answers = _blocks(section)
            sections.append((question, reference))
            for heading, text in answers:
                if (found := _STEP.fullmatch(heading)) is None:
                    raise ValueError(f"{heading!r} is no heading of an answer")
                steps.setdefault((int(found[1]), found[2]), []).append(Answer(text, int(found[3] or 0)))
        if not sections or any(len(answers) != len(sections) for answers in steps.values()):
            raise ValueError("answers are missing")
    except ValueError as error:
        raise SaigaError(f"{file} is damaged ({error}). Delete it, and the samples begin anew.") from None
    return sections, [Entry(step, loss, tuple(answers)) for (step, loss), answers in sorted(steps.items())]


def _blocks(section: str) -> Iterator[tuple[str, str]]:
    """Headings in bold, each with the indented text below it."""
    heading, lines = "", list[str]()
    for line in [*section.split("\n"), "**"]:
        if line.startswith(_INDENT):
            lines.append(line.removeprefix(_INDENT))
        elif line.startswith("**"):
            if heading:
                yield heading, "\n".join(lines)
            heading, lines = line, []


def table(stage_dir: str | Path) -> Table:
    """The answers before training and at the end of it, beside the right ones."""
    file = Path(stage_dir) / FILE
    if not file.is_file():
        return Table(("ответы · answers",), [], "Нет отложенных вопросов · There were no held-out questions.")
    sections, entries = _parsed(file)
    shown = [entries[0], entries[-1]] if len(entries) > 1 else entries
    steps = (f"шаг {entry.step} · step {entry.step}" for entry in shown)
    header = ("вопрос · question", "верный ответ · right answer", *steps)
    rows = [
        (question, reference, *(_cell(entry.answers[number]) for entry in shown))
        for number, (question, reference) in enumerate(sections)
    ]
    losses = " → ".join(entry.loss for entry in shown)
    return Table(header, rows, f"Ошибка на отложенных · held-out loss: {losses}. {FILE} has all {len(entries)} steps.")


def _cell(answer: Answer) -> str:
    return f"{answer.text} …" if answer.cut_at else answer.text
