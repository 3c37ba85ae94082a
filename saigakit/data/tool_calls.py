"""Normalise the tools of a record and the calls of them to OpenAI's format, or list their problems."""

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from saigakit.data import records
from saigakit.data.records import quote

Call = dict[str, Any]
Tool = dict[str, Any]
T = TypeVar("T")
NESTED = 100  # levels of lists and objects in tools or arguments, well below Python's recursion limit
_ABSENT: tuple[Any, ...] = (None, [], {}, "", "[]", "{}", "null")
_INDEX = re.compile(r"\[\d+\]")
to_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def is_empty(value: object) -> bool:
    """Whether it is null or has nothing in it; 0 and false say something."""
    return not value and value != 0


def describe_type(value: object) -> str:
    if isinstance(value, list | str) and not value:
        return "empty"
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    names |= {type(None): "null", int: "a number", float: "a number"}
    return names.get(type(value), f"of the type {type(value).__name__}")


def describe(value: object) -> str:
    return quote(value) if isinstance(value, str) else describe_type(value)


def text_problems(field: str, text: object) -> list[str]:
    if text is None:
        return [f"{field}: is missing; add the text"]
    if not isinstance(text, str):
        return [f"{field}: is {describe_type(text)}; it must be a text"]
    if not text or text.isspace():
        return [f"{field}: is empty; write the text or remove the record"]
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return [f"{field}: contains an unpaired surrogate ({text[error.start]!a}); remove it"]
    return []


def read_tools(record: Mapping[str, Any], problems: list[str]) -> list[Tool]:
    """Read `tools` or the older `functions`; either may be JSON text."""
    given = [key for key in ("tools", "functions") if record.get(key) and record[key] not in _ABSENT]
    if len(given) > 1:
        problems.append("record: has both tools and functions; keep tools")
    if len(given) != 1:
        return []
    (field,) = given
    items = enumerate(decode(field, record[field], list, "a list of tools", problems) or ())
    tools = [tool for index, item in items if (tool := _tool(f"{field}[{index}]", item, problems))]
    counts = Counter(tool["function"]["name"] for tool in tools)
    problems += [f"{field}: {quote(name)} occurs {n} times; keep one" for name, n in counts.items() if n > 1]
    return tools


def _tool(field: str, item: object, problems: list[str]) -> Tool | None:
    """Return {"type": "function", "function": …}, also for a bare function; None if it has problems."""
    before = len(problems)
    given = decode(field, item, dict, "an object", problems)
    if given is None:
        return None
    others = {key: value for key, value in given.items() if key != "type" and value is not None}
    if given.get("type") not in (None, "function"):
        problems.append(f"{field}.type: is {describe(given['type'])}; it must be 'function'")
    if "function" in given:
        tool = {"type": "function", **others, "function": _function(f"{field}.function", given["function"], problems)}
    else:
        tool = {"type": "function", "function": _function(field, others, problems)}
    if len(problems) == before:
        problems += value_problems(field, tool)
    return tool if len(problems) == before else None


def _function(field: str, value: object, problems: list[str]) -> dict[str, Any]:
    given = decode(field, value, dict, "an object", problems)
    if given is None:
        return {}
    function = {key: value for key, value in given.items() if value is not None}
    problems += text_problems(f"{field}.name", function.get("name"))
    if "description" in function and not isinstance(function["description"], str):
        problems.append(f"{field}.description: is {describe_type(function['description'])}; it must be a text")
    if "parameters" in function:
        function["parameters"] = decode(f"{field}.parameters", function["parameters"], dict, "an object", problems)
    return function


def find_calls(field: str, message: Mapping[str, Any], problems: list[str]) -> tuple[str, object] | None:
    """The field and the value of `tool_calls` or of the older `function_call`, if the message has one."""
    given = [key for key in ("tool_calls", "function_call") if message.get(key) not in _ABSENT]
    if len(given) > 1:
        problems.append(f"{field}: has both tool_calls and function_call; keep tool_calls")
    return (f"{field}.{given[0]}", message[given[0]]) if given else None


def read_calls(
    field: str, value: object, names: Collection[str] | None, problems: list[str], unread: set[str]
) -> list[Call]:
    """Read one call or several, perhaps as JSON text. `names`: the known functions, or None if unknown."""
    before = len(problems)
    found = decode(field, value, object, "a list of calls", problems)
    if not isinstance(found, list | dict) or not found:
        if len(problems) == before:
            problems.append(f"{field}: is {describe_type(found)}; it must be a list of calls")
        return []
    if names is not None and not names:
        problems.append(f"{field}: calls a function, but the record has no tools; add them")
        names = None
    items = [(field, found)] if isinstance(found, dict) else [(f"{field}[{i}]", item) for i, item in enumerate(found)]
    calls = [call for where, item in items if (call := _call(where, item, names, problems, unread))]
    ids = Counter(call["id"] for call in calls if "id" in call)
    problems += [f"{field}: {n} calls have the id {quote(key)}; make the ids unique" for key, n in ids.items() if n > 1]
    return calls


def _call(
    field: str, item: object, names: Collection[str] | None, problems: list[str], unread: set[str]
) -> Call | None:
    """Return {"type", "id"?, "function"}, also for a bare {"name", "arguments"}; None if it has problems."""
    before = len(problems)
    if not isinstance(item, dict):
        problems.append(f"{field}: is {describe_type(item)}; it must be an object with a function")
        return None
    is_bare = "function" not in item
    inner = field if is_bare else f"{field}.function"
    function = item if is_bare else item["function"]
    if not isinstance(function, dict):
        problems.append(f"{inner}: is {describe_type(function)}; it must be an object with name and arguments")
        return None
    own, its = ("id", "type"), ("name", "arguments")
    unread |= unread_keys(field, item, own + (its if is_bare else ("function",)))
    unread |= set() if is_bare else unread_keys(inner, function, its)
    if item.get("type") not in (None, "function"):
        problems.append(f"{field}.type: is {describe(item['type'])}; it must be 'function'")
    call_id, name = item.get("id"), function.get("name")
    if call_id not in (None, ""):
        problems += text_problems(f"{field}.id", call_id)
    problems += text_problems(f"{inner}.name", name)
    if isinstance(name, str) and names is not None and name not in names:
        known = ", ".join(map(quote, list(names)[:10]))
        problems.append(f"{inner}.name: is {quote(name)}, which the record's tools ({known}) lack; add the tool")
    where, given = f"{inner}.arguments", function.get("arguments")
    # OpenAI's models call a function without parameters with "".
    is_blank = is_empty(given) or (isinstance(given, str) and given.isspace())
    arguments = {} if is_blank else decode(where, given, dict, "an object, {} if there are none", problems)
    problems += value_problems(where, arguments)
    if len(problems) > before:
        return None
    return {
        "type": "function",
        **({"id": call_id} if call_id else {}),
        "function": {"name": name, "arguments": to_json(arguments)},
    }


def unread_keys(field: str, item: Mapping[str, Any], read: Collection[str]) -> set[str]:
    """The other keys that say something, as in "messages[].name"."""
    return {_INDEX.sub("[]", f"{field}.{key}") for key in item if key not in read and not is_empty(item[key])}


def decode(field: str, value: object, expected: type[T], what: str, problems: list[str]) -> T | None:
    """Parse JSON text; None if the value is not of the `expected` type, which goes to `problems`."""
    if isinstance(value, str):
        try:
            value = records.parse_json(value)
        except (ValueError, RecursionError) as error:
            problems.append(f"{field}: is {records.explain_json_error(error)}; it must be {what}")
            return None
    if not isinstance(value, expected):
        problems.append(f"{field}: is {describe_type(value)}; it must be {what}")
        return None
    return value


def value_problems(field: str, value: object) -> list[str]:
    """Whether JSON can represent it, in UTF-8 and with few enough levels."""
    try:
        text = to_json(value)
        is_too_deep = text.count("{") + text.count("[") > NESTED and _levels(value) > NESTED
    except (ValueError, TypeError) as error:  # NaN, or a type that only Parquet has
        return [f"{field}: cannot be written as JSON ({error}); replace the value by null or a text"]
    except RecursionError:
        is_too_deep = True
    return [f"{field}: is nested too deeply; make it flatter"] if is_too_deep else text_problems(field, text)


def _levels(value: object) -> int:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if children is None else 1 + max(map(_levels, children), default=0)
