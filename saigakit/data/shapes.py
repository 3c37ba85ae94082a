"""Find the keys under which a record has its conversation, and the texts and thoughts inside contents."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

from saigakit.data.formats import SHAPES, Shape
from saigakit.data.records import BadRecord, quote
from saigakit.data.tool_calls import is_empty, text_problems, unread_keys

_BY_LAST_KEY = {last: [shape for shape in SHAPES if shape[-1] == last] for *_, last in SHAPES}
READ = {shape: {*shape, "system", "tools", "functions", *["history"][: len(shape) - 1]} for shape in SHAPES}
_QUESTION = re.compile("question|query|prompt|instruction|input|user|human|вопрос|запрос|инструкц", re.IGNORECASE)
_ANSWER = re.compile("answer|response|output|completion|bot|assistant|reply|target|chosen|ответ", re.IGNORECASE)
_NO_TEXT = re.compile("(id|name|type|role|lang|language|source|date|time|score|count|index)s?$", re.IGNORECASE)
_TEXTS = ("text", "input_text", "output_text")
_OTHERS = ("image", "image_url", "input_image", "audio", "input_audio", "video", "file", "refusal", "thinking")
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)


def find_shapes(record: Mapping[str, Any]) -> list[Shape] | BadRecord:
    """All complete shapes of a record, or else the one that lacks least."""
    ends = [shape for key in record for shape in _BY_LAST_KEY.get(key, ())]
    whole = [shape for shape in ends if len(shape) == 1 or informative(record, shape[:-1])]
    # An empty list is an answer too, if there is no other.
    if complete := [shape for shape in whole if not is_empty(record[shape[-1]])] or [
        shape for shape in whole if record[shape[-1]] not in (None, "")
    ]:
        return complete
    present = [shape for shape in SHAPES if record.keys() & shape]
    if (problem := _compare(record)) or not present:
        names = ", ".join(map(quote, list(record)[:10])) or "no keys"
        problem = problem or f"has neither messages nor user and bot, but {names}; give its texts these names"
        return BadRecord((f"record: {problem}",))
    return [max(present, key=lambda shape: len(informative(record, shape)))]


def informative(record: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    return [key for key in keys if not is_empty(record.get(key))]


def is_messages(value: object) -> TypeGuard[list[Any]]:
    """An answer may be a list of objects too, but not with roles."""
    return isinstance(value, list) and any(isinstance(item, dict) and item.keys() & {"role", "from"} for item in value)


def are_complete(messages: Iterable[Mapping[str, Any]]) -> bool:
    """Whether all have a role and a content: the objects of an answer that is JSON may have one of the two."""
    return all(each.keys() >= {"role", "content"} or each.keys() >= {"from", "value"} for each in messages)


def _compare(record: Mapping[str, Any]) -> str:
    """How the keys of a record map to a shape, if their names suggest one."""
    keys = informative(record, list(record))
    if {"role", "content"} <= set(keys) or {"from", "value"} <= set(keys):
        return "is a single message; write all messages of a conversation as a list named messages"
    if lists := [key for key in keys if is_messages(record[key])]:
        return f"looks most like messages: rename {quote(lists[0])} to messages"
    keys = [key for key in keys if not _NO_TEXT.search(key)]
    answer = next(filter(_ANSWER.search, keys), "")
    question = next((key for key in keys if key != answer and _QUESTION.search(key)), "")
    renamed = [f"{quote(old)} to {new}" for old, new in ((question, "user"), (answer, "bot")) if old != new]
    return f"looks most like user and bot: rename {' and '.join(renamed)}" if question and answer else ""


def is_parts(content: object) -> TypeGuard[list[Any]]:
    return isinstance(content, list) and any(_type(part) in (*_TEXTS, *_OTHERS) for part in content)


def _type(part: object) -> object:
    return part.get("type") if isinstance(part, dict) else None


def join_parts(field: str, parts: Iterable[Any], problems: list[str], unread: set[str]) -> str:
    """Put the texts one after the other, as chat templates do."""
    texts = []
    for index, part in enumerate(parts):
        if _type(part) in _TEXTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
            unread |= unread_keys(f"{field}[{index}]", part, ("type", "text"))
        else:
            problems.append(f"{field}[{index}]: is not of the type 'text' with a text; only texts can be trained")
    return "".join(texts)


def add_thought(field: str, thought: object, turn: dict[str, Any], problems: list[str]) -> None:
    """Without the line ends at both ends, which Qwen3's template strips."""
    if isinstance(thought, str) and not thought.strip():
        return
    if not isinstance(thought, str) or text_problems(field, thought):
        problems += text_problems(field, thought)
    elif turn.setdefault("reasoning_content", thought.strip("\n")) != thought.strip("\n"):
        problems.append(f"{field}: has another thought than reasoning_content; write them as one")


def split_thought(field: str, text: str, turn: dict[str, Any], problems: list[str]) -> str:
    """Move a thought before the answer to `turn`; an empty one stays if there is no other."""
    while (found := _THOUGHT.match(text)) and (found[1].strip() or "reasoning_content" in turn):
        add_thought(field, found[1], turn, problems)
        text = text[found.end() :]
    return text.lstrip("\n") if "reasoning_content" in turn else text
