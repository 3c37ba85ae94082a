"""Split a rendered conversation into the template's special tokens and the runs of text between them.

The split depends only on the shape of a conversation, so it is made once per shape.
"""

import re
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import replace
from typing import NamedTuple, Self
from weakref import WeakKeyDictionary

from saigakit.errors import SaigaError
from saigakit.prompt import call_ids, placeholders, template, thoughts
from saigakit.prompt.backends import Tokenizer
from saigakit.prompt.placeholders import Filler, Masked
from saigakit.prompt.template import Message, Tools

_ROLES = ("system", "user", "assistant", "tool")
_KEYS = {"role", "content", thoughts.KEY, "tool_calls", "tool_call_id", "name", "weight"}
_NEEDED = re.compile(r"messages\[\d+\]\.(content|tool_calls\[\d+\]\.function\..*)|tools\[\d+\](\.function)?\.name")
_MARK = re.compile("[" + "".join(template.MARKS) + "]")
_LEFT_OUT = "The chat template leaves out {}, so the model would never see it: remove it or choose another template."
_SHAPES_KEPT = 2048
_Span = tuple[int, int]


class NotTurnByTurnError(SaigaError):
    """An answer is rendered differently when other turns follow it."""


class Part(NamedTuple):
    """A special token, or a run of text. `prompt`: the beginning of a run, before the answer; None: no answer in it."""

    special_id: int | None
    text: str
    prompt: str | None
    is_trained: bool  # the special token, or what follows the prompt


class _Slot(NamedTuple):
    """A part as it occurs in all conversations of one shape, to be filled with their texts."""

    part: Part
    fill_prompt: Filler
    fill_rest: Filler

    @classmethod
    def of(cls, part: Part) -> Self:
        prompt = part.prompt or ""
        return cls(part, placeholders.make_filler(prompt), placeholders.make_filler(part.text[len(prompt) :]))

    def fill(self, texts: Sequence[str]) -> Part:
        part = self.part
        if part.special_id is not None:
            return part
        prompt = self.fill_prompt(texts)
        return Part(None, prompt + self.fill_rest(texts), None if part.prompt is None else prompt, part.is_trained)


Layout = list[Part]
_Key = tuple[object, bool, frozenset[int]]
_Shape = list[_Slot] | NotTurnByTurnError
_shapes: WeakKeyDictionary[Tokenizer, dict[_Key, _Shape]] = WeakKeyDictionary()


def build_layout(
    messages: Sequence[Message], tools: Tools | str | None, tokenizer: Tokenizer, add_generation_prompt: bool
) -> Layout:
    """Raises NotTurnByTurnError if a trained answer would get other ids than in a prompt.

    Raises SaigaError for malformed messages, and if the filled parts differ from the rendered template.
    """
    messages, tools = template.decode_row(messages, tools)
    _require_messages(messages, tools)
    untrained = frozenset([index for index, message in enumerate(messages) if message.get("weight") == 0])
    if any("weight" in message for message in messages):  # templates must not see it
        messages = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    if tools:
        messages = call_ids.fit(messages, tokenizer.chat_template)
    folded = messages if _is_plain(messages, tools) else thoughts.fold(messages, tokenizer.chat_template)
    render = _renderer(folded, tools, tokenizer)
    rendered = render(len(folded), add_generation_prompt)
    is_row = not add_generation_prompt and _trained_answers(folded, untrained) == [len(folded) - 1]

    def is_exact(text: str) -> bool:
        if text == rendered or not is_row:
            return text == rendered
        prompt = render(len(folded) - 1, True)  # of Mistral-Nemo, only prompts have the system prompt
        return text.startswith(prompt) and rendered.endswith(text.removeprefix(prompt))

    # The template may take a thought out of a content itself.
    for each in (messages, thoughts.split(messages, tokenizer.chat_template)):
        layout = _fill_shape(each, tools, tokenizer, add_generation_prompt, untrained)
        if is_exact("".join([part.text for part in layout])):
            return layout
    raise SaigaError(_describe_change(messages, tokenizer))


def _describe_change(messages: Sequence[Message], tokenizer: Tokenizer) -> str:
    contents = [text for message in messages for text in (message["content"], message.get(thoughts.KEY, ""))]
    in_template = [text for text in (*tokenizer.special_tokens, thoughts.END) if text in tokenizer.chat_template]
    found = [repr(text) for text in dict.fromkeys(in_template) if any(text in content for content in contents)]
    beginnings = ", ".join(repr(message["content"][:30]) for message in messages)
    return (
        "The chat template changes contents beyond trimming their ends, so they cannot be tokenised exactly. "
        f"Remove {' or '.join(found) or 'what it reacts to'}; the contents begin with {beginnings}."
    )


def _fill_shape(
    messages: Sequence[Message],
    tools: Tools | None,
    tokenizer: Tokenizer,
    add_generation_prompt: bool,
    untrained: frozenset[int],
) -> Layout:
    masked = None if _is_plain(messages, tools) else placeholders.mask(messages, tools)
    if masked is None:  # most conversations are plain: the same as masking them, in a fifth of the time
        texts = [message["content"] for message in messages if message["content"]]
        roles = tuple([(message["role"], not message["content"]) for message in messages])
        key: _Key = (roles, add_generation_prompt, untrained)
    else:
        # After masking, so that the tags may be special tokens, which they never are in a text.
        masked = replace(masked, messages=thoughts.fold(masked.messages, tokenizer.chat_template))
        texts, key = masked.texts, (masked.key, add_generation_prompt, untrained)
    shapes = _shapes.setdefault(tokenizer, {})
    if (shape := shapes.get(key)) is None:
        if len(shapes) >= _SHAPES_KEPT:  # every record may have functions of its own
            shapes.clear()
        try:
            masked = masked or placeholders.mask(messages, None)
            shape = [_Slot.of(part) for part in _split_shape(masked, tokenizer, add_generation_prompt, untrained)]
        except NotTurnByTurnError as error:
            shape = NotTurnByTurnError(*error.args)  # a copy: the frames of `error` hold a whole batch
        shapes[key] = shape
    if isinstance(shape, NotTurnByTurnError):
        raise NotTurnByTurnError(*shape.args)
    return [slot.fill(texts) for slot in shape]


def _is_plain(messages: Sequence[Message], tools: Tools | None) -> bool:
    return not tools and all(len(message) == 2 for message in messages)


def _require_messages(messages: Sequence[Message], tools: Tools | None) -> None:
    """Reject messages with anything else in them: it would enter the prompt unmasked."""
    for number, message in enumerate(messages, start=1):
        is_known = message.get("role") in _ROLES and message.keys() <= _KEYS
        is_text = isinstance(message.get("content"), str) and isinstance(message.get(thoughts.KEY, ""), str)
        if not (is_known and is_text) or (thoughts.KEY in message and message["role"] != "assistant"):
            raise SaigaError(
                f"Message {number} is {str(dict(message))[:80]}: it must have a role ({', '.join(_ROLES)}) and a text "
                "as content, and may have tool_calls, tool_call_id, name and weight; an answer may have a text as "
                f"{thoughts.KEY}."
            )
        if not tools and (message["role"] == "tool" or "tool_calls" in message):
            raise SaigaError(f"Message {number} is part of a function call, but the conversation has no tools.")


def _trained_answers(messages: Sequence[Message], untrained: Set[int]) -> list[int]:
    return [i for i, message in enumerate(messages) if message["role"] == "assistant" and i not in untrained]


def _renderer(
    messages: Sequence[Message], tools: Tools | None, tokenizer: Tokenizer, *, masked: bool = False
) -> Callable[[int, bool], str]:
    """Return a function of the number of messages, and whether the text ends with a generation prompt."""
    text, variables = tokenizer.chat_template, tokenizer.variables
    return lambda count, is_prompt: template.render(
        messages[:count], text, tools=tools, add_generation_prompt=is_prompt, variables=variables, masked=masked
    )


def _split_shape(
    masked: Masked, tokenizer: Tokenizer, add_generation_prompt: bool, untrained: frozenset[int]
) -> Iterator[Part]:
    """The parts, with placeholders as their texts."""
    render = _renderer(masked.messages, masked.tools, tokenizer, masked=True)
    longest_first = sorted(filter(None, tokenizer.special_tokens), key=len, reverse=True)
    special = re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")
    count = len(masked.messages)
    to_train = [] if add_generation_prompt else _trained_answers(masked.messages, untrained)
    marked = render(count, add_generation_prompt)
    if to_train == [count - 1]:
        marked = _answer_after(render(count - 1, True), marked)
    text = _MARK.sub("", marked)
    _require_all_texts(text, masked, is_prompt=add_generation_prompt, is_row=to_train in ([], [count - 1]))
    spans: list[_Span] = []
    trained: list[_Span] = []
    for index in _trained_answers(masked.messages, frozenset()):
        prompt = _MARK.sub("", render(index, True))
        complete = text if to_train == [index] == [count - 1] else _MARK.sub("", render(index + 1, False))
        if complete.startswith(prompt) and text.startswith(complete):
            # Untrained ones too: their runs are split in a prompt, so they must be in training.
            spans.append(_answer_span(prompt, complete, special))
            if index in to_train:
                trained.append(spans[-1])
                _require_thought(complete, masked, index)
        elif index in to_train:  # in a prompt, earlier answers get the ids of training only where that is possible
            raise NotTurnByTurnError(
                "The chat template does not render turn by turn, so it cannot be trained on: "
                f"the prompt for messages[{index}] and that answer are not a prefix of the rendered conversation."
            )
    if not add_generation_prompt:
        _require_marks(marked, trained, untrained=len(untrained))
    return _split_parts(text, spans, set(trained), special, tokenizer)


def _answer_after(prompt: str, marked: str) -> str:
    """The last answer after its prompt, even where the template renders a system prompt only in a prompt (Mistral)."""
    end = prompt[placeholders.last_start(prompt) :]  # the question and the beginning of the answer
    if not end or marked.startswith(prompt) or end not in marked:
        return marked
    return prompt + marked.rpartition(end)[2]


def _require_all_texts(text: str, masked: Masked, *, is_prompt: bool, is_row: bool) -> None:
    """Require every text in what is trained; a prompt may lack earlier turns.

    Raises NotTurnByTurnError if the conversation is more than a row, whose answers may still be trained one by one.
    """
    found = placeholders.find_placeholders(text)
    for number, path in enumerate(masked.paths):
        is_needed = path.startswith("tools") or not is_prompt
        if number not in found and is_needed and _NEEDED.fullmatch(path):
            raise (SaigaError if is_row else NotTurnByTurnError)(_LEFT_OUT.format(path))


def _require_thought(complete: str, masked: Masked, index: int) -> None:
    """A template may leave out the thoughts of earlier answers, but not of one that it ends with."""
    path = f"messages[{index}].{thoughts.KEY}"
    if path in masked.paths and masked.paths.index(path) not in placeholders.find_placeholders(complete):
        raise SaigaError(_LEFT_OUT.format(path))


def _answer_span(prompt: str, complete: str, special: re.Pattern[str]) -> _Span:
    """(start, end) of an answer: after its generation prompt, up to and including the token that ends the turn."""
    ends = [match.end() for match in special.finditer(complete, len(prompt))]
    if not ends:
        raise SaigaError("The chat template ends the assistant's turn without a special token of this vocabulary.")
    return len(prompt), ends[-1]


def _require_marks(marked: str, trained: Sequence[_Span], *, untrained: int) -> None:
    """Require that the template's `{% generation %}` tags, if any, begin where the trained spans begin.

    The `untrained` answers may be tagged or not.
    """
    begin, end = template.MARKS
    starts = [match.start() - 2 * index for index, match in enumerate(re.finditer(begin, marked))]
    in_trained = [start for start in starts if any(first <= start < last for first, last in trained)]
    is_agreed = (
        in_trained == [first for first, _ in trained]
        and len(starts) - len(trained) <= untrained
        and marked.count(begin) == marked.count(end)
    )
    if starts and not is_agreed:
        raise SaigaError(
            f"The generation tags of the chat template begin at the characters {starts}, but its generation prompts "
            f"end at {[first for first, _ in trained]}: fix the tags."
        )


def _split_parts(
    text: str, spans: Sequence[_Span], trained: Set[_Span], special: re.Pattern[str], tokenizer: Tokenizer
) -> Iterator[Part]:
    start = 0
    for part in special.split(text):
        end = start + len(part)
        span = next(((a, b) for a, b in spans if start < b and a < end), None)
        if part in tokenizer.special_tokens:
            yield Part(tokenizer.special_tokens[part], part, None, span in trained)
        elif part:
            yield Part(None, part, None if span is None else part[: max(0, span[0] - start)], span in trained)
        start = end
