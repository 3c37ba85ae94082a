"""A conversation's ids into what a reader can look at: pieces with their numbers, and in colour what is learned."""

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from saigakit.prompt import encoding
from saigakit.prompt.encoding import IGNORE_INDEX, Example, Tokenizer

_GREEN, _GREY, _WHITE = "#ceead6", "#dadce0", "#ffffff"
_LEGEND = {_GREEN: "учится · learned", _GREY: "служебный токен · special token", _WHITE: "только читает · only read"}
_BOX = "display:inline-block;margin:1px;padding:0 3px;border-radius:3px;text-align:center;white-space:pre;background:"
# Colours of its own: a notebook's theme may be dark.
_PAPER = "background:#f8f9fa;color:#202124;padding:8px;font:13px/1.3 monospace"
_VISIBLE = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"})
_ROWS_SHOWN = 3  # of one conversation
_SHOWN = 400  # characters of a long stretch that is only read


@dataclass(frozen=True)
class Piece:
    """One token, or the tokens of one character, as a reader sees them."""

    text: str
    ids: tuple[int, ...]
    is_special: bool
    is_learned: bool

    @property
    def visible(self) -> str:
        return self.text if self.is_special else self.text.translate(_VISIBLE)

    @property
    def numbers(self) -> str:
        return " ".join(map(str, self.ids))

    @property
    def ends_line(self) -> bool:
        return self.text.endswith("\n")


@dataclass(frozen=True, repr=False)
class Prompt:
    """A conversation as the model reads it: in a terminal with `*` at learned tokens, in a notebook in colour."""

    pieces: Sequence[Piece]

    def __str__(self) -> str:
        words = [f"{piece.visible}[{piece.numbers}]{'*' * piece.is_learned}" for piece in self.pieces]
        ends = ["\n" if piece.ends_line else " " for piece in self.pieces]
        return f"{''.join(map(''.join, zip(words, ends, strict=True))).rstrip()}\n* учится · learned: {self._counts()}"

    __repr__ = __str__  # what a notebook keeps beside the HTML

    def _repr_html_(self) -> str:
        legend = " ".join(f'<span style="{_BOX}{colour}">{name}</span>' for colour, name in _LEGEND.items())
        return f'<div style="{_PAPER}"><p>{legend} {self._counts()}</p>{"".join(map(_box, self.pieces))}</div>'

    def _counts(self) -> str:
        learned = sum(len(piece.ids) for piece in self.pieces if piece.is_learned)
        return f"{learned} из · of {sum(len(piece.ids) for piece in self.pieces)} токенов · tokens"


@dataclass(frozen=True, repr=False)
class Marked:
    """Conversations with what is learned of them: between ⟦ and ⟧ in a terminal, in green in a notebook."""

    prompts: Sequence[Prompt]

    def __str__(self) -> str:
        return "\n\n".join("".join(self._words(prompt, "⟦", "⟧")).rstrip() for prompt in self.prompts)

    __repr__ = __str__  # what a notebook keeps beside the HTML

    def _repr_html_(self) -> str:
        begin, end = f'<span style="background:{_GREEN}">', "</span>"
        texts = ["".join(self._words(prompt, begin, end, html.escape)) for prompt in self.prompts]
        style = f"{_PAPER};white-space:pre-wrap;margin-bottom:8px"
        return "".join(f'<div style="{style}">{text}</div>' for text in texts)

    @staticmethod
    def _words(prompt: Prompt, begin: str, end: str, escape: Callable[[str], str] = lambda text: text) -> Iterator[str]:
        for is_learned, group in groupby(prompt.pieces, lambda piece: piece.is_learned):
            text = "".join(piece.text for piece in group)
            if is_learned:
                yield f"{begin}{escape(text)}{end}"
            else:
                yield escape(text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} … {text[-_SHOWN // 2 :]}")


def show(conversation: Mapping[str, Any], tokenizer: Tokenizer) -> Prompt:
    """The exact ids of a conversation, as training gets them; where it is several rows, of the last and longest."""
    ((*_, row),) = encoding.encode_rows([conversation], tokenizer)
    return Prompt(list(_pieces(row, tokenizer)))


def mark(conversations: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> Marked:
    """The text of each, with what the model learns of it marked; where it is several rows, the last ones."""
    found = encoding.encode_rows(conversations, tokenizer)
    return Marked([Prompt(list(_pieces(row, tokenizer))) for rows in found for row in rows[-_ROWS_SHOWN:]])


def _pieces(example: Example, tokenizer: Tokenizer) -> Iterator[Piece]:
    names = {token_id: token for token, token_id in tokenizer.special_tokens.items()}
    before = tokenizer.encode_text("a")  # decoders drop the space that a text begins with, so none begins here
    start = tokenizer.decode(before)
    group: list[int] = []
    pairs = list(zip(example["input_ids"], example["labels"], strict=True))
    for index, (token_id, label) in enumerate(pairs):
        is_learned = label != IGNORE_INDEX
        if token_id in names:
            yield Piece(names[token_id], (token_id,), True, is_learned)
            continue
        group.append(token_id)
        text = tokenizer.decode([*before, *group]).removeprefix(start)
        following = pairs[index + 1] if index + 1 < len(pairs) else None
        goes_on = following and following[0] not in names and (following[1] != IGNORE_INDEX) == is_learned
        if "\ufffd" in text and goes_on and len(group) < 4:  # a part of a character: UTF-8 has at most 4 bytes
            continue
        yield Piece(text, tuple(group), False, is_learned)
        group = []


def _box(piece: Piece) -> str:
    colour = _GREEN if piece.is_learned else _GREY if piece.is_special else _WHITE
    weight = ";font-weight:bold;outline:1px solid #5f6368" if piece.is_special else ""
    ids = f'<small style="color:#5f6368;font-size:9px">{piece.numbers}</small>'
    return (
        f'<span style="{_BOX}{colour}{weight}">{html.escape(piece.visible)}<br>{ids}</span>{"<br>" * piece.ends_line}'
    )
