"""One record in the shapes people have into a normalised conversation, or into what is wrong with it."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from saigakit.data import tool_calls
from saigakit.data.records import Bad, named
from saigakit.data.tool_calls import kind, text_problem

Message = dict[str, Any]  # "role", "content" and, where there are any, "tool_calls", "tool_call_id", "name"
Conversation = dict[str, Any]  # "messages" and, where there are any, "tools"
_Turn = tuple[str, Message]  # the field of its content, and itself
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "bot": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",  # its text is the JSON of the calls
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
_ORDER = "system first if at all, then user, assistant, user …"
_TOOL_ORDER = f"{_ORDER}, and tool after an assistant's tool_calls, then assistant"


def conversation(record: object) -> Conversation | Bad:
    """Of {"messages": [{"role", "content"}]}, of {"system"?, "user", "bot"} or of ShareGPT's {"conversations"}.

    A "system" beside a list becomes its first message. "tools" and calls of them become OpenAI's; tools and
    arguments are JSON text, so that any of them fits one column of a Dataset. An unknown key of a message, which
    could change what is learned, is a problem.
    """
    if not isinstance(record, dict):
        return Bad((f"record: is {kind(record)}; it must be an object",))
    shape = _shape(record)
    if isinstance(shape, Bad):
        return shape
    problems = [f"{key}: stands beside the messages; put it into its message" for key in _OF_MESSAGE if record.get(key)]
    tools = tool_calls.tools_of(record, problems)
    names = None if problems else [tool["function"]["name"] for tool in tools]
    turns = [("system", _message("system", record["system"]))] if record.get("system") not in (None, "") else []
    if shape in _LISTS:
        turns += _listed(shape, record[shape], names, problems)
    else:
        turns += [("user", _message("user", record.get("user"))), ("bot", _message("assistant", record.get("bot")))]
    for field, message in turns:
        may_be_empty = "tool_calls" in message or message["role"] == "tool"  # a call, or a function's empty result
        if not (may_be_empty and message["content"] == "") and (problem := text_problem(field, message["content"])):
            problems.append(problem)
    if not problems:
        problems += _order_problems(turns) or _answer_problems(turns) or _weight_problems(turns)
    if problems:
        return Bad(tuple(problems))
    return {"messages": [message for _, message in turns], **({"tools": tool_calls.as_text(tools)} if tools else {})}


def _shape(record: Mapping[str, Any]) -> str | Bad:
    """The key of its list, or "user"."""
    there = {key for key in record if record[key] is not None}
    shapes = [key for key in _LISTS if key in there]
    if not shapes and not {"user", "bot"} & there:
        shapes = [key for key in _LISTS if key in record][:1]  # null, and said to be so
    if not shapes and not {"user", "bot"} & record.keys():
        keys = ", ".join(map(named, list(record)[:10])) or "none"
        return Bad(
            (f"record: has no messages, no conversations and no user and bot (its keys: {keys}); write one of these",)
        )
    if len(shapes) + ({"user", "bot"} <= there) > 1:
        return Bad(("record: holds two conversations (of messages, conversations, user and bot); keep one",))
    return shapes[0] if shapes else "user"


def keys_not_read(record: Mapping[str, Any]) -> set[str]:
    there = {key for key in record if record[key] is not None}
    read = {"system", *(_LISTS if _LISTS.keys() & there else ("user", "bot")), *_OF_RECORD, *_OF_MESSAGE}
    return there - read


def _message(role: str, content: object) -> Message:
    return {"role": role, "content": content}


def _listed(name: str, messages: object, names: Collection[str] | None, problems: list[str]) -> list[_Turn]:
    """What is wrong but for the contents goes to `problems`. `names`: what can be called; None where it is unknown."""
    role_key, content_key = _LISTS[name]
    if not isinstance(messages, list) or not messages:
        problems.append(f"{name}: is {kind(messages)}; it must be a list of messages")
        return []
    turns = []
    for index, message in enumerate(messages):
        field = f"{name}[{index}]"
        if not isinstance(message, dict):
            problems.append(f"{field}: is {kind(message)}; it must be an object with {role_key} and {content_key}")
            continue
        given = message.get(role_key)
        role = ROLES.get(given) if isinstance(given, str) else None
        problems += tool_calls.unknown_keys(field, message, (role_key, content_key, *_OF_ROLE.get(role or "", ())))
        if role is None:
            problems.append(f"{field}.{role_key}: {_role_problem(given)}")
            continue
        made = _message(role, message.get(content_key))
        if given == "function_call":
            made |= {
                "content": "",
                "tool_calls": tool_calls.read_calls(f"{field}.{content_key}", made["content"], names, problems),
            }
            _take_weight(made, f"{field}.weight", message.get("weight"), problems)
        elif role == "assistant":
            _take_calls(made, tool_calls.calls_of(field, message, names, problems))
            _take_weight(made, f"{field}.weight", message.get("weight"), problems)
        elif role == "tool":
            made |= _answered(field, message, problems)
        turns.append((f"{field}.{content_key}", made))
    return turns


def _take_calls(message: Message, found: list[tool_calls.Call] | None) -> None:
    """Beside calls there need be no text."""
    if found is not None:
        message["tool_calls"] = found
        message["content"] = "" if message["content"] is None else message["content"]


def _take_weight(message: Message, field: str, weight: object, problems: list[str]) -> None:
    """OpenAI's files for fine-tuning: 0 for an answer that is only read."""
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        problems.append(
            f"{field}: is {weight if isinstance(weight, int | float) else kind(weight)}; use 0 for an answer "
            "that is not to be learned, 1 for one that is"
        )
    elif weight == 0:
        message["weight"] = 0


def _answered(field: str, message: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """The call that a tool's message answers: its id, its function's name."""
    found = {key: message[key] for key in _OF_ROLE["tool"] if message.get(key) not in (None, "")}
    problems += [problem for key, text in found.items() if (problem := text_problem(f"{field}.{key}", text))]
    return found


def _role_problem(role: object) -> str:
    if role is None:
        return "is missing; use system, user or assistant"
    return f"is {named(role) if isinstance(role, str) else kind(role)}; use system, user, assistant or tool"


def _order_problems(turns: Sequence[_Turn]) -> list[str]:
    state, order = "start", _TOOL_ORDER if any(message["role"] == "tool" for _, message in turns) else _ORDER
    for field, message in turns:
        if message["role"] not in _NEXT[state]:
            order = _TOOL_ORDER if state == "call" else order
            where, expected = field.partition(".")[0], _NEXT[state][-1]
            return [f"{where}: {message['role']} speaks where {expected} should; {order}"]
        state = "call" if "tool_calls" in message else message["role"]
    field, message = turns[-1]
    if message["role"] != "assistant":
        where = field.partition(".")[0]
        return [f"{where}: {message['role']} has the last word; end with an answer of the assistant"]
    return []


def _answer_problems(turns: Sequence[_Turn]) -> list[str]:
    """An id that no call of the assistant's turn before it has."""
    problems: list[str] = []
    ids: list[str] = []
    for field, message in turns:
        if "tool_calls" in message:
            ids = [call["id"] for call in message["tool_calls"] if "id" in call]
        answered = message.get("tool_call_id")
        if answered is not None and answered not in ids:
            known = f"only {', '.join(map(named, ids))}" if ids else "none with an id"
            where = f"{field.partition('.')[0]}.tool_call_id"
            problems.append(f"{where}: is {named(answered)}, no call of the assistant's turn before: there is {known}")
    return problems


def _weight_problems(turns: Sequence[_Turn]) -> list[str]:
    if all(message.get("weight") == 0 for _, message in turns if message["role"] == "assistant"):
        where = turns[0][0].partition("[")[0]
        return [f"{where}: each answer of the assistant has weight 0, so nothing is learned; leave the record out"]
    return []
