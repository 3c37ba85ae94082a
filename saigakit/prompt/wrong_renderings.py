"""One dialogue in the ids that other public code makes of it, beside ours: what a wrong rendering costs."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby

from saigakit import registry
from saigakit.core.display import Table
from saigakit.errors import SaigaError
from saigakit.prompt import encoding, template
from saigakit.prompt.backends import Tokenizer
from saigakit.prompt.template import Message

DIALOGUE = (
    {"role": "system", "content": "Ты — Сайга."},
    {"role": "user", "content": "Привет"},
    {"role": "assistant", "content": "Здравствуй!"},
)
_SHOWN = 6  # ids
_NOTHING = "ничего · nothing"
_TWICE = "такого начала в обучении не было · nothing in training began like this"
_NO_SPACE = "без пробела впереди роли — другие токены · without the space in front the roles are other tokens"
_APART = "содержание отдельно от роли, между репликами ничего · contents apart from roles, nothing between messages"


@dataclass(frozen=True)
class Rendering:
    name: str
    ids: list[int]
    cost: str  # what is wrong with it


@dataclass(frozen=True)
class _Piece:
    """Of a prompt: a special token, the template's own words, or a message's content with its role."""

    text: str
    special_id: int | None = None
    role: str | None = None


def _dialogue(tokenizer: Tokenizer) -> Sequence[Message]:
    """Without the system prompt, where the template refuses one."""
    try:
        template.render(DIALOGUE, tokenizer.chat_template, variables=tokenizer.variables)
    except SaigaError:
        return DIALOGUE[1:]
    return DIALOGUE


def of(tokenizer: Tokenizer) -> list[Rendering]:
    """A prompt that ends with the question: first as training and inference here write it, then as others do."""
    messages = _dialogue(tokenizer)[:-1]
    ours = encoding.encode(messages, tokenizer, add_generation_prompt=True)["input_ids"]
    pieces = _pieces(messages, tokenizer)
    kept = _without_blanks(pieces)
    apart = [i for piece in kept for i in _ids(piece, tokenizer)]
    foreign = [i for piece in kept for i in _foreign(piece, tokenizer) or _ids(piece, tokenizer)]
    words = ", ".join(_word(i, tokenizer, ours) for i, own in zip(foreign, apart, strict=True) if i != own)
    bos = tokenizer.special_tokens.get(tokenizer.variables.get("bos_token", ""))
    made = [Rendering("как здесь · as here", ours, _NOTHING)]
    if bos is not None and bos == ours[0]:
        made.append(Rendering("BOS ещё раз · BOS once more", [bos, *ours], _TWICE))
    made.append(Rendering("transformers 5, legacy=False", _without_prefix(pieces, tokenizer), _NO_SPACE))
    made.append(Rendering("rulm, interact_llamacpp", apart, _APART))
    if words:
        cost = f"на месте ролей: {words} · this stands where the roles should be"
        made.append(Rendering("роли из другого словаря · roles of another vocabulary", foreign, cost))
    return made


def compare(tokenizer: Tokenizer) -> Table:
    """The renderings of a prompt, each from where it leaves ours."""
    first, *others = of(tokenizer)
    rows = [(first.name, _shown(first.ids[:_SHOWN], tokenizer, first.ids), str(len(first.ids)), first.cost)]
    for each in others:
        parts = SequenceMatcher(None, first.ids, each.ids, autojunk=False).get_opcodes()
        changed = [spans for kind, *spans in parts if kind != "equal"]
        if not changed:
            rows.append((each.name, "те же номера · the same ids", "0", _NOTHING))
            continue
        count, start = sum(max(b - a, d - c) for a, b, c, d in changed), changed[0][2]
        shown = _shown(each.ids[max(0, start - 1) : start + _SHOWN - 1], tokenizer, first.ids)
        rows.append((each.name, shown, f"{count}, с номера · from number {start + 1}", each.cost))
    header = ("способ · way", "номера у первого отличия · ids at the first difference", "отличий · differences")
    note = f"Всего номеров в подсказке · ids in the prompt: {len(first.ids)}"
    return Table((*header, "чем плохо · what is wrong with it"), rows, note)


def role_ids(tokenizer: Tokenizer) -> Table:
    """What stands before the words of each role, in the ids of training."""
    pieces = _pieces(_dialogue(tokenizer), tokenizer)
    rows, start = [], 0
    for index, piece in enumerate(pieces):
        if piece.role is not None:
            ids = [i for part in _header(pieces[start:index]) for i in _ids(part, tokenizer)]
            words = " ".join(_word(i, tokenizer, ids) for i in ids)
            rows.append((piece.role, " ".join(map(str, ids)), words))
            start = index + 1
    return Table(("роль · role", "номера · ids", "из чего · pieces"), rows)


def _header(between: Sequence[_Piece]) -> Sequence[_Piece]:
    """Without what ends the message before: its special token and the blanks after it."""
    special = [index for index, piece in enumerate(between) if piece.special_id is not None]
    follows = len(special) > 1 and not any(piece.text.strip() for piece in between[special[0] + 1 : special[1]])
    return between[special[1] :] if follows else between


def _pieces(messages: Sequence[Message], tokenizer: Tokenizer) -> list[_Piece]:
    """Of the prompt; with the answer, where the conversation ends with one."""
    known = {token: _Piece(token, special_id=i) for token, i in tokenizer.special_tokens.items() if token}
    held: list[Message] = []
    for index, message in enumerate(messages):
        held.append({**message, "content": f"\U000f0010{index}\U000f0011"})
        known[held[-1]["content"]] = _Piece(message["content"], role=message["role"])
    text = template.render(
        held,
        tokenizer.chat_template,
        add_generation_prompt=messages[-1]["role"] != "assistant",
        variables=tokenizer.variables,
    )
    parts = re.split("(" + "|".join(map(re.escape, sorted(known, key=len, reverse=True))) + ")", text)
    return [known.get(part) or _Piece(part) for part in parts if part]


def _ids(piece: _Piece, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode_text(piece.text) if piece.special_id is None else [piece.special_id]


def _without_blanks(pieces: Sequence[_Piece]) -> list[_Piece]:
    """Blanks between two special tokens left out."""
    special = [False, *(piece.special_id is not None for piece in pieces), False]
    around = zip(special, pieces, special[2:], strict=False)
    return [piece for before, piece, after in around if piece.text.strip() or not (before and after)]


def _foreign(piece: _Piece, tokenizer: Tokenizer) -> list[int]:
    """Of a role header, with the role's id in another model of the registry; nothing for other pieces."""
    if piece.role is not None or piece.special_id is not None:
        return []
    own = tokenizer.encode_text(piece.text)
    headers = [golden for spec in registry.MODELS.values() for golden in spec.golden_ids]
    ids = next((ids for text, ids in headers if text.startswith(piece.text) and ids[0] != own[0]), None)
    return [] if ids is None else [ids[0], *own[1:]]


def _without_prefix(pieces: Sequence[_Piece], tokenizer: Tokenizer) -> list[int]:
    """Without the space that SentencePiece puts before a run of text: none comes after a line end."""
    head = tokenizer.encode_text("\n")
    before = "\n" if tokenizer.encode_text("\na") != [*head, *tokenizer.encode_text("a")] else ""
    made: list[int] = []
    for special_id, run in groupby(pieces, key=lambda piece: piece.special_id):
        parts = list(run)
        text = before + "".join(piece.text for piece in parts)
        ids = [special_id] * len(parts) if special_id is not None else tokenizer.encode_text(text)
        made += ids[len(head) :] if before and special_id is None else ids
    return made


def _shown(ids: Sequence[int], tokenizer: Tokenizer, ours: Sequence[int]) -> str:
    return " ".join(str(i) if i > max(ours) else f"{i} {_word(i, tokenizer, ours)}" for i in ids)


def _word(token: int, tokenizer: Tokenizer, ours: Sequence[int]) -> str:
    """Its text, decoded after a line end, because a decoder takes a space off the beginning."""
    if token > max(ours):  # perhaps none of this vocabulary, and then llama.cpp aborts
        return str(token)
    names = {number: name for name, number in tokenizer.special_tokens.items()}
    head = tokenizer.encode_text("\n")
    text = names.get(token) or tokenizer.decode([*head, token]).removeprefix(tokenizer.decode(head))
    return text.replace(" ", "▁").replace("\n", "\\n")
