"""Give function calls the ids of nine letters and digits that Mistral's chat templates require."""

import re
from collections.abc import Mapping, Sequence
from itertools import count
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
    taken = {call.get("id") for message in messages for call in message.get("tool_calls") or ()}
    made = (name for number in count(1) if (name := f"call{number:05}") not in taken)
    names: dict[str, str] = {}  # of the ids so far
    waiting: list[tuple[str, Mapping[str, Any]]] = []  # calls of the last answer that have no result yet
    renamed: list[Message] = []
    for message in messages:
        changed: dict[str, Any] = {}
        if message.get("tool_calls"):
            waiting = []
            for call in message["tool_calls"]:
                given = str(call.get("id") or "")
                name = names.get(given) or (given if _NINE.fullmatch(given) else next(made))
                names |= {given: name} if given else {}
                waiting.append((name, call))
            changed["tool_calls"] = [{**call, "id": name} for name, call in waiting]
        elif message["role"] == "tool":
            given = str(message.get("tool_call_id") or "")
            name = names.get(given, given) or _find_call(waiting, message.get("name"))
            waiting = [each for each in waiting if each[0] != name]
            changed |= {"tool_call_id": name} if name else {}
        renamed.append({**message, **changed})
    return renamed


def _find_call(waiting: Sequence[tuple[str, Mapping[str, Any]]], function: object) -> str:
    """The first call of this function, rather one that came without an id; if there is none, another one."""
    calls = [(call["function"]["name"] != function, bool(call.get("id")), name) for name, call in waiting]
    return min(calls, key=lambda each: each[:2], default=(True, True, ""))[2]
