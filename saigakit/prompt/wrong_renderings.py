"""Compare the ids of a prompt with those that other public code produces for it."""

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
_IDS_SHOWN = 6
_NO_PROBLEM = "ничего · nothing"
_SECOND_BOS = "в обучении такого начала не было · no training prompt begins like this"
_NO_SPACE = "без пробела перед ролью другие токены · without the leading space the roles are other tokens"
_SEPARATE = "роль и текст токенизируются отдельно · roles and contents are tokenised separately"


@dataclass(frozen=True)
class Rendering:
    name: str
    ids: list[int]
    problem: str


@dataclass(frozen=True)
class _Piece:
    """A special token, a text of the template, or the content of a message with its role."""

    text: str
    special_id: int | None = None
    role: str | None = None


def _dialogue(tokenizer: Tokenizer) -> Sequence[Message]:
    """DIALOGUE, without its system prompt if the template refuses one."""
    try:
        template.render(DIALOGUE, tokenizer.chat_template, variables=tokenizer.variables)
    except SaigaError:
        return DIALOGUE[1:]
    return DIALOGUE


def list_renderings(tokenizer: Tokenizer) -> list[Rendering]:
    """A prompt that ends with the question: first as saigakit renders it, then as others do."""
    messages = _dialogue(tokenizer)[:-1]
    ours = encoding.encode(messages, tokenizer, add_generation_prompt=True)["input_ids"]
    pieces = _pieces(messages, tokenizer)
    pieces_kept = _drop_blanks(pieces)
    separate = [i for piece in pieces_kept for i in _ids(piece, tokenizer)]
    foreign = [i for piece in pieces_kept for i in _foreign_ids(piece, tokenizer) or _ids(piece, tokenizer)]
    words = ", ".join(_token_text(i, tokenizer, ours) for i, own in zip(foreign, separate, strict=True) if i != own)
    bos = tokenizer.special_tokens.get(tokenizer.variables.get("bos_token", ""))
    found = [Rendering("saigakit", ours, _NO_PROBLEM)]
    if bos is not None and bos == ours[0]:
        found.append(Rendering("второй BOS · second BOS", [bos, *ours], _SECOND_BOS))
    found.append(Rendering("transformers 5, legacy=False", _ids_without_prefix(pieces, tokenizer), _NO_SPACE))
    found.append(Rendering("rulm, interact_llamacpp", separate, _SEPARATE))
    if words:
        problem = f"вместо ролей: {words} · instead of the roles"
        found.append(Rendering("роли из другого словаря · roles of another vocabulary", foreign, problem))
    return found


def compare(tokenizer: Tokenizer) -> Table:
    """Show each rendering from its first difference to ours."""
    first, *others = list_renderings(tokenizer)
    rows = [(first.name, _format_ids(first.ids[:_IDS_SHOWN], tokenizer, first.ids), "0", first.problem)]
    for each in others:
        parts = SequenceMatcher(None, first.ids, each.ids, autojunk=False).get_opcodes()
        changed = [spans for kind, *spans in parts if kind != "equal"]
        if not changed:
            rows.append((each.name, "те же id · the same ids", "0", _NO_PROBLEM))
            continue
        count, start = sum(max(b - a, d - c) for a, b, c, d in changed), changed[0][2]
        shown = _format_ids(each.ids[max(0, start - 1) : start + _IDS_SHOWN - 1], tokenizer, first.ids)
        rows.append((each.name, shown, f"{count}, с позиции · from position {start + 1}", each.problem))
    header = ("рендеринг · rendering", "id у первого отличия · ids at the first difference", "отличий · differences")
    note = f"Токенов в промпте · tokens in the prompt: {len(first.ids)}"
    return Table((*header, "в чём ошибка · what is wrong"), rows, note)


def role_ids(tokenizer: Tokenizer) -> Table:
    """The ids that precede each role's content in training."""
    pieces = _pieces(_dialogue(tokenizer), tokenizer)
    rows, start = [], 0
    for index, piece in enumerate(pieces):
        if piece.role is not None:
            ids = [i for part in _header(pieces[start:index]) for i in _ids(part, tokenizer)]
            words = " ".join(_token_text(i, tokenizer, ids) for i in ids)
            rows.append((piece.role, " ".join(map(str, ids)), words))
            start = index + 1
    return Table(("роль · role", "id · ids", "токены · tokens"), rows)


def _header(between: Sequence[_Piece]) -> Sequence[_Piece]:
    """Drop the end of the previous message: its special token and the blanks after it."""
    special = [index for index, piece in enumerate(between) if piece.special_id is not None]
    if len(special) > 1 and not any(piece.text.strip() for piece in between[special[0] + 1 : special[1]]):
        return between[special[1] :]
    return between


def _pieces(messages: Sequence[Message], tokenizer: Tokenizer) -> list[_Piece]:
    """Split the rendered messages; the generation prompt is included unless an answer is last."""
    known = {token: _Piece(token, special_id=i) for token, i in tokenizer.special_tokens.items() if token}
    masked: list[Message] = []
    for index, message in enumerate(messages):
        masked.append({**message, "content": f"\U000f0010{index}\U000f0011"})
        known[masked[-1]["content"]] = _Piece(message["content"], role=message["role"])
    text = template.render(
        masked,
        tokenizer.chat_template,
        add_generation_prompt=messages[-1]["role"] != "assistant",
        variables=tokenizer.variables,
    )
    parts = re.split("(" + "|".join(map(re.escape, sorted(known, key=len, reverse=True))) + ")", text)
    return [known.get(part) or _Piece(part) for part in parts if part]


def _ids(piece: _Piece, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode_text(piece.text) if piece.special_id is None else [piece.special_id]


def _drop_blanks(pieces: Sequence[_Piece]) -> list[_Piece]:
    """Leave out blanks between two special tokens."""
    special = [False, *(piece.special_id is not None for piece in pieces), False]
    around = zip(special, pieces, special[2:], strict=False)
    return [piece for before, piece, after in around if piece.text.strip() or not (before and after)]


def _foreign_ids(piece: _Piece, tokenizer: Tokenizer) -> list[int]:
    """A role header with the role's id from another model of the registry; empty for other pieces."""
    if piece.role is not None or piece.special_id is not None:
        return []
    own = tokenizer.encode_text(piece.text)
    headers = [golden for spec in registry.MODELS.values() for golden in spec.golden_ids]
    ids = next((ids for text, ids in headers if text.startswith(piece.text) and ids[0] != own[0]), None)
    return [] if ids is None else [ids[0], *own[1:]]


def _ids_without_prefix(pieces: Sequence[_Piece], tokenizer: Tokenizer) -> list[int]:
    """Omit the space that SentencePiece puts before a run of text: it puts none after a line end."""
    head = tokenizer.encode_text("\n")
    before = "\n" if tokenizer.encode_text("\na") != [*head, *tokenizer.encode_text("a")] else ""
    prompt_ids: list[int] = []
    for special_id, run in groupby(pieces, key=lambda piece: piece.special_id):
        parts = list(run)
        text = before + "".join(piece.text for piece in parts)
        ids = [special_id] * len(parts) if special_id is not None else tokenizer.encode_text(text)
        prompt_ids += ids[len(head) :] if before and special_id is None else ids
    return prompt_ids


def _format_ids(ids: Sequence[int], tokenizer: Tokenizer, ours: Sequence[int]) -> str:
    return " ".join(str(i) if i > max(ours) else f"{i} {_token_text(i, tokenizer, ours)}" for i in ids)


def _token_text(token: int, tokenizer: Tokenizer, ours: Sequence[int]) -> str:
    """Decode it after a line end, because decoders strip a leading space."""
    if token > max(ours):  # it may be outside this vocabulary, where llama.cpp aborts
        return str(token)
    names = {number: name for name, number in tokenizer.special_tokens.items()}
    head = tokenizer.encode_text("\n")
    text = names.get(token) or tokenizer.decode([*head, token]).removeprefix(tokenizer.decode(head))
    return text.replace(" ", "▁").replace("\n", "\\n")
