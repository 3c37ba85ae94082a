"""Give a template the thought before an answer in the form that it knows."""

import re
from collections.abc import Sequence
from typing import Any

from saigakit.prompt.template import Message

KEY = "reasoning_content"
END = "</think>"
_LEADING = re.compile(r"<think>\n*(.*?)\n*</think>\n*(.*)", re.DOTALL)


def fold(messages: Sequence[Message], chat_template: str) -> list[dict[str, Any]]:
    """Put thoughts into the contents if the template does not know them, and would leave them out silently."""
    return [dict(message) if KEY in chat_template else _fold(message) for message in messages]


def _fold(message: Message) -> dict[str, Any]:
    rest: dict[str, Any] = {key: value for key, value in message.items() if key != KEY}
    thought = message.get(KEY)
    return {**rest, "content": f"<think>\n{thought}\n{END}\n\n{message['content']}"} if thought else rest


def split(messages: Sequence[Message], chat_template: str) -> list[Message]:
    """Move a thought that begins a content out of it, as templates that know thoughts do."""
    return [_split(message) for message in messages] if KEY in chat_template else list(messages)


def _split(message: Message) -> Message:
    found = _LEADING.fullmatch(message["content"])
    if message["role"] != "assistant" or KEY in message or found is None:
        return message
    return {**message, KEY: found[1], "content": found[2]}
