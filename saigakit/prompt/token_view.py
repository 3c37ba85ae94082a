"""Show the tokens of a conversation and which of them are trained."""

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from saigakit.prompt import encoding
from saigakit.prompt.encoding import IGNORE_INDEX, Example, Tokenizer

_GREEN, _GREY, _WHITE = "#ceead6", "#dadce0", "#ffffff"
_LEGEND = {_GREEN: "обучается · trained", _GREY: "спецтокен · special token", _WHITE: "только контекст · context only"}
_BOX = "display:inline-block;margin:1px;padding:0 3px;border-radius:3px;text-align:center;white-space:pre;background:"
# Its own colours: a notebook's theme may be dark.
_PAPER = "background:#f8f9fa;color:#202124;padding:8px;font:13px/1.3 monospace"
_VISIBLE = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"})
_ROWS_SHOWN = 3  # per conversation
_CONTEXT_SHOWN = 400  # characters of an untrained stretch


@dataclass(frozen=True)
class Piece:
    """One token, or several that form one character."""

    text: str
    ids: tuple[int, ...]
    is_special: bool
    is_trained: bool

    @property
    def visible(self) -> str:
        return self.text if self.is_special else self.text.translate(_VISIBLE)

    @property
    def numbers(self) -> str:
        return " ".join(map(str, self.ids))


@dataclass(frozen=True, repr=False)
class Prompt:
    """A tokenised conversation: in a terminal with `*` after trained tokens, in a notebook in colour."""

    pieces: Sequence[Piece]

    def __str__(self) -> str:
        words = [
            f"{piece.visible}[{piece.numbers}]{'*' * piece.is_trained}" + ("\n" if piece.text.endswith("\n") else " ")
            for piece in self.pieces
        ]
        return f"{''.join(words).rstrip()}\n* обучается · trained: {self._counts()}"

    __repr__ = __str__  # a notebook stores it next to the HTML

    def _repr_html_(self) -> str:
        legend = " ".join(f'<span style="{_BOX}{colour}">{name}</span>' for colour, name in _LEGEND.items())
        return f'<div style="{_PAPER}"><p>{legend} {self._counts()}</p>{"".join(map(_box, self.pieces))}</div>'

    def _counts(self) -> str:
        trained = sum(len(piece.ids) for piece in self.pieces if piece.is_trained)
        return f"{trained} из · of {sum(len(piece.ids) for piece in self.pieces)} токенов · tokens"


@dataclass(frozen=True, repr=False)
class Marked:
    """Conversations with their trained text marked: by ⟦ and ⟧ in a terminal, in green in a notebook."""

    prompts: Sequence[Prompt]

    def __str__(self) -> str:
        return "\n\n".join(_mark_trained(prompt, "⟦", "⟧").rstrip() for prompt in self.prompts)

    __repr__ = __str__  # a notebook stores it next to the HTML

    def _repr_html_(self) -> str:
        begin = f'<span style="background:{_GREEN}">'
        style = f"{_PAPER};white-space:pre-wrap;margin-bottom:8px"
        texts = (_mark_trained(prompt, begin, "</span>", html.escape) for prompt in self.prompts)
        return "".join(f'<div style="{style}">{text}</div>' for text in texts)


def _mark_trained(prompt: Prompt, begin: str, end: str, escape: Callable[[str], str] = str) -> str:
    words = []
    for is_trained, group in groupby(prompt.pieces, lambda piece: piece.is_trained):
        text = "".join(piece.text for piece in group)
        if not is_trained and len(text) > _CONTEXT_SHOWN:
            text = f"{text[: _CONTEXT_SHOWN // 2]} … {text[-_CONTEXT_SHOWN // 2 :]}"
        words.append(f"{begin}{escape(text)}{end}" if is_trained else escape(text))
    return "".join(words)


def show(conversation: Mapping[str, Any], tokenizer: Tokenizer) -> Prompt:
    """Show the exact ids that training gets; of a conversation with several rows, the last and longest row."""
    ((*_, row),) = encoding.encode_rows([conversation], tokenizer)
    return Prompt(list(_pieces(row, tokenizer)))


def mark(conversations: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> Marked:
    """Mark the trained text of each conversation; of one with several rows, in the last few."""
    encoded = encoding.encode_rows(conversations, tokenizer)
    return Marked([Prompt(list(_pieces(row, tokenizer))) for rows in encoded for row in rows[-_ROWS_SHOWN:]])


def write(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text of ids, special tokens included."""
    return "".join(piece.text for piece in _pieces({"input_ids": [*ids], "labels": [*ids]}, tokenizer))


def mark_parts(parts: Sequence[tuple[str, bool]]) -> Prompt:
    """A text in parts, each marked or not."""
    return Prompt([Piece(text, (), is_special=False, is_trained=is_marked) for text, is_marked in parts])


def _pieces(example: Example, tokenizer: Tokenizer) -> Iterator[Piece]:
    names = {token_id: token for token, token_id in tokenizer.special_tokens.items()}
    before = tokenizer.encode_text("a")  # decoders drop the first space of a text, so none is first here
    start = tokenizer.decode(before)
    group: list[int] = []
    pairs = list(zip(example["input_ids"], example["labels"], strict=True))
    for index, (token_id, label) in enumerate(pairs):
        is_trained = label != IGNORE_INDEX
        if token_id in names:
            yield Piece(names[token_id], (token_id,), True, is_trained)
            continue
        group.append(token_id)
        text = tokenizer.decode([*before, *group]).removeprefix(start)
        following = pairs[index + 1] if index + 1 < len(pairs) else None
        continues = following and following[0] not in names and (following[1] != IGNORE_INDEX) == is_trained
        if "\ufffd" in text and continues and len(group) < 4:  # part of a character: UTF-8 has at most 4 bytes
            continue
        yield Piece(text, tuple(group), False, is_trained)
        group = []


def _box(piece: Piece) -> str:
    colour = _GREEN if piece.is_trained else _GREY if piece.is_special else _WHITE
    weight = ";font-weight:bold;outline:1px solid #5f6368" if piece.is_special else ""
    ids = f'<small style="color:#5f6368;font-size:9px">{piece.numbers}</small>'
    line_end = "<br>" if piece.text.endswith("\n") else ""
    return f'<span style="{_BOX}{colour}{weight}">{html.escape(piece.visible)}<br>{ids}</span>{line_end}'
