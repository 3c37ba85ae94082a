"""Normalise a record of any supported format to a conversation, or list its problems."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from saigakit.data import tool_calls
from saigakit.data.records import BadRecord, quote
from saigakit.data.tool_calls import describe_type, text_problems

Message = dict[str, Any]  # "role", "content" and, if present, "tool_calls", "tool_call_id", "name", "weight"
Conversation = dict[str, Any]  # "messages" and, if present, "tools"
_Turn = tuple[str, Message]  # the name of the content's field, and the message
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "bot": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",  # its text is JSON of calls
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
_LISTS = {"messages": ("role", "content"), "conversations": ("from", "value")}
_OF_RECORD = frozenset({"tools", "functions"})
_OF_ROLE = {"assistant": ("tool_calls", "function_call", "weight"), "tool": ("tool_call_id", "name")}
_OF_MESSAGE = ("function_call", "tool_call_id", "tool_calls")
_NEXT = {
    "start": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "call": ("tool",),
    "tool": ("tool", "assistant"),
}
_ORDER = "use the order system (optional), user, assistant, user …"
_TOOL_ORDER = f"{_ORDER}, with tool and assistant after tool_calls"


def normalise_record(record: object) -> Conversation | BadRecord:
    """Accept {"messages": [{"role", "content"}]}, {"system"?, "user", "bot"} or ShareGPT's {"conversations"}.

    A "system" next to a list becomes its first message. "tools" and calls become OpenAI's, with tools and arguments
    as JSON text, so that they fit one column of a Dataset. Unknown keys of messages are problems.
    """
    if not isinstance(record, dict):
        return BadRecord((f"record: is {describe_type(record)}; it must be an object",))
    shape = _find_shape(record)
    if isinstance(shape, BadRecord):
        return shape
    problems = [f"{key}: is outside the messages; move it into its message" for key in _OF_MESSAGE if record.get(key)]
    tools = tool_calls.read_tools(record, problems)
    names = None if problems else [tool["function"]["name"] for tool in tools]
    turns = [("system", _message("system", record["system"]))] if record.get("system") not in (None, "") else []
    if shape in _LISTS:
        turns += _read_list(shape, record[shape], names, problems)
    else:
        turns += [("user", _message("user", record.get("user"))), ("bot", _message("assistant", record.get("bot")))]
    for field, message in turns:
        may_be_empty = "tool_calls" in message or message["role"] == "tool"  # a call, or an empty result
        if not (may_be_empty and message["content"] == ""):
            problems += text_problems(field, message["content"])
    if not problems:
        problems += _order_problems(turns) or _answer_problems(turns) or _weight_problems(turns)
    if problems:
        return BadRecord(tuple(problems))
    return {"messages": [message for _, message in turns], **({"tools": tool_calls.to_json(tools)} if tools else {})}


def _find_shape(record: Mapping[str, Any]) -> str | BadRecord:
    """The key of the list of messages, or "user"."""
    present = {key for key in record if record[key] is not None}
    shapes = [key for key in _LISTS if key in present]
    if not shapes and not {"user", "bot"} & present:
        shapes = [key for key in _LISTS if key in record][:1]  # null, which is reported
    if not shapes and not {"user", "bot"} & record.keys():
        keys = ", ".join(map(quote, list(record)[:10])) or "no keys"
        return BadRecord(
            (f"record: has neither messages nor conversations nor user and bot, but {keys}; add one of them",)
        )
    if len(shapes) + ({"user", "bot"} <= present) > 1:
        return BadRecord(("record: has two of messages, conversations, and user and bot; keep one",))
    return shapes[0] if shapes else "user"


def unread_keys(record: Mapping[str, Any]) -> set[str]:
    present = {key for key in record if record[key] is not None}
    read = {"system", *(_LISTS if _LISTS.keys() & present else ("user", "bot")), *_OF_RECORD, *_OF_MESSAGE}
    return present - read


def _message(role: str, content: object) -> Message:
    return {"role": role, "content": content}


def _read_list(name: str, messages: object, names: Collection[str] | None, problems: list[str]) -> list[_Turn]:
    """Contents are checked by the caller. `names`: the functions that can be called, or None if unknown."""
    role_key, content_key = _LISTS[name]
    if not isinstance(messages, list) or not messages:
        problems.append(f"{name}: is {describe_type(messages)}; it must be a list of messages")
        return []
    turns = []
    for index, message in enumerate(messages):
        field = f"{name}[{index}]"
        if not isinstance(message, dict):
            problems.append(
                f"{field}: is {describe_type(message)}; it must be an object with {role_key} and {content_key}"
            )
            continue
        given = message.get(role_key)
        role = _ROLES.get(given) if isinstance(given, str) else None
        problems += tool_calls.unknown_keys(field, message, (role_key, content_key, *_OF_ROLE.get(role or "", ())))
        if role is None:
            problems.append(f"{field}.{role_key}: {_role_problem(given)}")
            continue
        turn = _message(role, message.get(content_key))
        if given == "function_call":
            calls = tool_calls.read_calls(f"{field}.{content_key}", turn["content"], names, problems)
            turn |= {"content": "", "tool_calls": calls}
        elif role == "assistant" and (given_calls := tool_calls.find_calls(field, message, problems)):
            turn["tool_calls"] = tool_calls.read_calls(*given_calls, names, problems)
            turn["content"] = "" if turn["content"] is None else turn["content"]
        elif role == "tool":  # the id and the function's name of the call that it answers
            answered = {key: message[key] for key in _OF_ROLE["tool"] if message.get(key) not in (None, "")}
            problems += [each for key, text in answered.items() for each in text_problems(f"{field}.{key}", text)]
            turn |= answered
        if role == "assistant":
            turn |= _read_weight(f"{field}.weight", message.get("weight"), problems)
        turns.append((f"{field}.{content_key}", turn))
    return turns


def _read_weight(field: str, weight: object, problems: list[str]) -> dict[str, int]:
    """As in OpenAI's fine-tuning files, an answer with weight 0 is not trained."""
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        shown = weight if isinstance(weight, int | float) else describe_type(weight)
        problems.append(f"{field}: is {shown}; use 0 for an answer that must not be trained, otherwise 1")
    return {"weight": 0} if weight == 0 and not isinstance(weight, bool) else {}


def _role_problem(role: object) -> str:
    if role is None:
        return "is missing; use system, user or assistant"
    return f"is {quote(role) if isinstance(role, str) else describe_type(role)}; use system, user, assistant or tool"


def _order_problems(turns: Sequence[_Turn]) -> list[str]:
    state, order = "start", _TOOL_ORDER if any(message["role"] == "tool" for _, message in turns) else _ORDER
    for field, message in turns:
        if message["role"] not in _NEXT[state]:
            order = _TOOL_ORDER if state == "call" else order
            where, expected = field.partition(".")[0], _NEXT[state][-1]
            return [f"{where}: the role is {message['role']}, expected {expected}; {order}"]
        state = "call" if "tool_calls" in message else message["role"]
    field, message = turns[-1]
    if message["role"] != "assistant":
        where = field.partition(".")[0]
        return [f"{where}: the last message is of {message['role']}; end with one of the assistant"]
    return []


def _answer_problems(turns: Sequence[_Turn]) -> list[str]:
    """Check that every tool_call_id belongs to a call in the previous assistant turn."""
    problems: list[str] = []
    ids: list[str] = []
    for field, message in turns:
        if "tool_calls" in message:
            ids = [call["id"] for call in message["tool_calls"] if "id" in call]
        answered = message.get("tool_call_id")
        if answered is not None and answered not in ids:
            known = ", ".join(map(quote, ids)) or "none"
            where = f"{field.partition('.')[0]}.tool_call_id"
            problems.append(f"{where}: is {quote(answered)}; the ids of the previous assistant turn are {known}")
    return problems


def _weight_problems(turns: Sequence[_Turn]) -> list[str]:
    if all(message.get("weight") == 0 for _, message in turns if message["role"] == "assistant"):
        where = turns[0][0].partition("[")[0]
        return [f"{where}: all answers have weight 0, so nothing is trained; leave the record out"]
    return []
