"""A conversation into the parts of its prompt: special tokens that the template spells, and runs of text between them.

The parts depend on the shape of a conversation alone, so they are found once for all conversations of one shape.
"""

import re
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple, Self
from weakref import WeakKeyDictionary

from saigakit.errors import SaigaError
from saigakit.prompt import placeholders, template
from saigakit.prompt.backends import Tokenizer
from saigakit.prompt.placeholders import Filler, Masked
from saigakit.prompt.template import Message

ROLES = ("system", "user", "assistant", "tool")
_KEYS = {"role", "content", "tool_calls", "tool_call_id", "name", "weight"}
_NEEDED = re.compile(r"messages\[\d+\]\.(content|tool_calls\[\d+\]\.function\..*)|tools\[\d+\](\.function)?\.name")
_SHAPES_KEPT = 2048
_Span = tuple[int, int]


class NotTurnByTurnError(SaigaError):
    """An answer is rendered otherwise when others follow it; a conversation that ends with it can be trained on."""


class Part(NamedTuple):
    """A special token, or a run of text. `prompt`: what of a run stands before the answer; None: it has no answer."""

    special_id: int | None
    text: str
    prompt: str | None
    is_learned: bool  # what follows the prompt, or this special token


class _Slot(NamedTuple):
    """A part of all conversations of one shape: as it is, or to be filled with their texts."""

    part: Part
    before: Filler
    after: Filler

    @classmethod
    def of(cls, part: Part) -> Self:
        before = part.prompt or ""
        return cls(part, placeholders.filler(before), placeholders.filler(part.text[len(before) :]))

    def filled(self, texts: Sequence[str]) -> Part:
        part = self.part
        if part.special_id is not None:
            return part
        before = self.before(texts)
        return Part(None, before + self.after(texts), None if part.prompt is None else before, part.is_learned)


Layout = list[Part]
_Key = tuple[object, bool, frozenset[int]]
_Shape = list[_Slot] | NotTurnByTurnError  # one that is refused is so each time
_shapes: WeakKeyDictionary[Tokenizer, dict[_Key, _Shape]] = WeakKeyDictionary()


def of(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | str | None,
    tokenizer: Tokenizer,
    add_generation_prompt: bool,
) -> Layout:
    """An answer of weight 0 is not learned.

    Raises NotTurnByTurnError where one that is learned has other ids than in a prompt, SaigaError for messages of
    another shape and where the filled parts are not what the template renders.
    """
    messages, tools = template.decoded(messages, tools)
    _require_messages(messages, tools)
    messages, only_read = _without_weights(messages)
    masked = None if _is_plain(messages, tools) else placeholders.mask(messages, tools)
    if masked is None:  # as a million conversations are: the same as masking them, in a fifth of the time
        texts = [message["content"] for message in messages if message["content"]]
        roles = tuple([(message["role"], not message["content"]) for message in messages])
        key: _Key = (roles, add_generation_prompt, only_read)
    else:
        texts, key = masked.texts, (masked.key, add_generation_prompt, only_read)
    shapes = _shapes.setdefault(tokenizer, {})
    if (shape := shapes.get(key)) is None:
        if len(shapes) >= _SHAPES_KEPT:  # each record has functions of its own
            shapes.clear()
        try:
            parts = _shape(masked or placeholders.mask(messages, None), tokenizer, add_generation_prompt, only_read)
            shape = [_Slot.of(part) for part in parts]
        except NotTurnByTurnError as error:
            shape = NotTurnByTurnError(*error.args)  # not itself: its frames hold the conversations of a whole batch
        shapes[key] = shape
    if isinstance(shape, NotTurnByTurnError):
        raise NotTurnByTurnError(*shape.args)
    layout = [slot.filled(texts) for slot in shape]
    _require_same(layout, messages, tools, tokenizer, add_generation_prompt)
    return layout


def _without_weights(messages: Sequence[Message]) -> tuple[Sequence[Message], frozenset[int]]:
    """What a template may see, and the numbers of the answers that are not learned."""
    only_read = frozenset([index for index, message in enumerate(messages) if message.get("weight") == 0])
    if not any("weight" in message for message in messages):
        return messages, only_read
    kept = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    return kept, only_read


def _is_plain(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> bool:
    return not tools and all(len(message) == 2 for message in messages)


def _require_messages(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> None:
    """Raises SaigaError for a message that holds anything else: it would enter the prompt unmasked."""
    for number, message in enumerate(messages, start=1):
        is_message = (
            message.get("role") in ROLES and isinstance(message.get("content"), str) and message.keys() <= _KEYS
        )
        if not is_message:
            raise SaigaError(
                f"Message {number} is {str(dict(message))[:80]}: it must have a role ({', '.join(ROLES)}) and a "
                "content, which is text; besides, only tool_calls, tool_call_id, name and weight."
            )
        if not tools and (message["role"] == "tool" or "tool_calls" in message):
            raise SaigaError(f"Message {number} is of a call of a function, and there are no tools.")


def _require_same(
    layout: Layout,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    tokenizer: Tokenizer,
    prompt: bool,
) -> None:
    whole = template.render(
        messages, tokenizer.chat_template, tools=tools, add_generation_prompt=prompt, variables=tokenizer.variables
    )
    if "".join([part.text for part in layout]) != whole:
        begin = ", ".join(repr(message["content"][:30]) for message in messages)
        raise SaigaError(
            "The chat template does more to the contents than trim their ends, so they cannot be tokenised exactly. "
            f"Take out what it reacts to; the contents begin {begin}."
        )


def _shape(masked: Masked, tokenizer: Tokenizer, add_generation_prompt: bool, only_read: frozenset[int]) -> Layout:
    """The parts with placeholders in their texts."""

    def rendered(count: int, prompt: bool) -> str:
        text = template.render(
            masked.messages[:count],
            tokenizer.chat_template,
            tools=masked.tools,
            add_generation_prompt=prompt,
            masked=True,
            variables=tokenizer.variables,
        )
        return text if count == len(masked.messages) and not prompt else _MARK.sub("", text)

    special = _splitter(tokenizer.special_tokens)
    marked = rendered(len(masked.messages), add_generation_prompt)
    text = _MARK.sub("", marked)
    _require_whole(text, masked, is_prompt=add_generation_prompt)
    spans: list[_Span] = []
    learned: list[_Span] = []
    for index in [index for index, message in enumerate(masked.messages) if message["role"] == "assistant"]:
        prompt, whole = rendered(index, True), _MARK.sub("", rendered(index + 1, False))
        is_learned = index not in only_read and not add_generation_prompt
        if whole.startswith(prompt) and text.startswith(whole):
            # One that is only read, too: a run is split at its border in a prompt, so it is in training.
            spans.append(_answer(prompt, whole, special))
            learned += spans[-1:] if is_learned else []
        elif is_learned:  # a prompt needs earlier answers to have the ids of training, if it can
            raise NotTurnByTurnError(
                "The chat template does not render turn by turn: what it makes of "
                f"messages[{index}] is not what a model is asked and answers, so it cannot be trained on."
            )
    if not add_generation_prompt:
        _require_marks(marked, learned, unlearned=len(only_read))
    return list(_parts(text, spans, set(learned), special, tokenizer))


_MARK = re.compile("[" + "".join(template.MARKS) + "]")


def _require_whole(text: str, masked: Masked, *, is_prompt: bool) -> None:
    """Raises SaigaError for a text that the template leaves out; a prompt may go without earlier turns."""
    there = placeholders.held(text)
    for number, path in enumerate(masked.paths):
        needed = path.startswith("tools") if is_prompt else True
        if number not in there and needed and _NEEDED.fullmatch(path):
            raise SaigaError(f"The chat template leaves out {path}, so it cannot be trained on or asked with it.")


def _answer(prompt: str, whole: str, special: re.Pattern[str]) -> _Span:
    """(start, end) in the text of one turn: after its generation prompt, up to the token that ends it."""
    ends = [match.end() for match in special.finditer(whole, len(prompt))]
    if not ends:
        raise SaigaError("The chat template ends the assistant's turn without a special token.")
    return len(prompt), ends[-1]


def _require_marks(marked: str, learned: Sequence[_Span], *, unlearned: int) -> None:
    """Where a template says by `{% generation %}` what the assistant says, it must begin where learning begins.

    The `unlearned` answers that are only read may be marked or not.
    """
    begin, end = template.MARKS
    starts = [match.start() - 2 * index for index, match in enumerate(re.finditer(begin, marked))]
    looked_at = [start for start in starts if any(first <= start < last for first, last in learned)]
    is_agreed = (
        looked_at == [first for first, _ in learned]
        and len(starts) - len(learned) <= unlearned
        and marked.count(begin) == marked.count(end)
    )
    if starts and not is_agreed:
        raise SaigaError(
            f"The chat template marks as the assistant's what begins at the characters {starts} of a prompt, and its "
            f"generation prompt ends at {[first for first, _ in learned]}: mend its generation tags."
        )


def _splitter(special_tokens: Mapping[str, int]) -> re.Pattern[str]:
    longest_first = sorted(filter(None, special_tokens), key=len, reverse=True)
    return re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")


def _parts(
    text: str, spans: Sequence[_Span], learned: Set[_Span], special: re.Pattern[str], tokenizer: Tokenizer
) -> Iterator[Part]:
    start = 0
    for part in special.split(text):
        end = start + len(part)
        span = next(((a, b) for a, b in spans if start < b and a < end), None)
        if part in tokenizer.special_tokens:
            yield Part(tokenizer.special_tokens[part], part, None, span in learned)
        elif part and span is None:
            yield Part(None, part, None, False)
        elif part and span is not None:
            yield Part(None, part, part[: max(0, span[0] - start)], span in learned)
        start = end
