"""Give function calls the ids of nine letters and digits that Mistral's chat templates require."""

import re
from collections.abc import Sequence
from typing import Any

from saigakit.prompt.template import Message

_REQUIRES_NINE = re.compile(r"id\s*\|\s*length\s*\)?\s*!=\s*9\b")
_NINE = re.compile(r"[A-Za-z0-9]{9}")


def fit(messages: Sequence[Message], chat_template: str) -> Sequence[Message]:
    """Rename the ids that the template refuses, and add those that are missing.

    Made ones are call00001 and so on, in the order of the calls: unlike random ones, a model can learn them.
    """
    return _rename(messages) if _REQUIRES_NINE.search(chat_template) else messages


def _rename(messages: Sequence[Message]) -> list[Message]:
    names: dict[str, str] = {}  # of the ids so far
    unanswered: list[str] = []  # names of the calls in the last answer
    count = 0
    renamed: list[Message] = []
    for message in messages:
        changed: dict[str, Any] = {}
        if message.get("tool_calls"):
            unanswered = []
            for call in message["tool_calls"]:
                count += 1
                given = call.get("id") or f"{count}. call"
                names[given] = names.get(given) or (given if _NINE.fullmatch(given) else f"call{count:05}")
                unanswered.append(names[given])
            calls = zip(message["tool_calls"], unanswered, strict=True)
            changed["tool_calls"] = [{**call, "id": name} for call, name in calls]
        elif message["role"] == "tool":
            given = message.get("tool_call_id")
            name = names.get(given, given) if given else next(iter(unanswered), None)
            unanswered = [each for each in unanswered if each != name]
            changed |= {"tool_call_id": name} if name else {}
        renamed.append({**message, **changed})
    return renamed
