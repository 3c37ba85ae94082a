"""Tools of a record and calls of them, in the shapes people have, into OpenAI's, or into what is wrong with them."""

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

from saigakit.data import records
from saigakit.data.records import named

Call = dict[str, Any]
Tool = dict[str, Any]
T = TypeVar("T")
NESTED = 100  # levels of lists and objects in tools or arguments: what is decoded later has room below Python's limit
_ABSENT: tuple[Any, ...] = (None, [], {}, "", "[]", "{}", "null")
as_text = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def kind(value: object) -> str:
    """A value's type in words."""
    if isinstance(value, list | str) and not value:
        return "empty"
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    names |= {type(None): "null", int: "a number", float: "a number"}
    return names.get(type(value), f"of the type {type(value).__name__}")


def text_problem(field: str, text: object) -> str | None:
    if text is None:
        return f"{field}: is missing; add the text"
    if not isinstance(text, str):
        return f"{field}: is {kind(text)}; it must be a text"
    if not text or text.isspace():
        return f"{field}: is empty; write the text or remove the record"
    return _half_a_character(field, text)


def _half_a_character(field: str, text: str) -> str | None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"{field}: holds half a character ({text[error.start]!a}); write the whole one"
    return None


def tools_of(record: Mapping[str, Any], problems: list[str]) -> list[Tool]:
    """Of `tools`, or of the older `functions`; either may be the JSON of a list."""
    given = [key for key in ("tools", "functions") if record.get(key) not in _ABSENT]
    if len(given) > 1:
        problems.append("record: has both tools and functions; keep tools")
        return []
    tools = []
    for field in given:
        for index, item in enumerate(_decoded(field, record[field], list, "a list of tools", problems) or ()):
            tool = _tool(f"{field}[{index}]", item, problems)
            tools += [tool] if tool else []
    counts = Counter(tool["function"]["name"] for tool in tools)
    problems += [f"{given[0]}: {named(name)} is there {n} times; keep one" for name, n in counts.items() if n > 1]
    return tools


def _tool(field: str, item: object, problems: list[str]) -> Tool | None:
    """{"type": "function", "function": …}, also of a bare function; None where it has problems."""
    before = len(problems)
    given = _decoded(field, item, dict, "an object", problems)
    if given is None:
        return None
    others = {key: value for key, value in given.items() if key != "type" and value is not None}
    if given.get("type") not in (None, "function"):
        problems.append(f"{field}.type: is {_said(given['type'])}; it must be 'function'")
    if "function" in given:
        function = _function(f"{field}.function", given["function"], problems)
        problems += value_problems(field, {key: value for key, value in others.items() if key != "function"})
        tool = {"type": "function", **others, "function": function}
    else:
        tool = {"type": "function", "function": _function(field, others, problems)}
    return tool if len(problems) == before else None


def _function(field: str, value: object, problems: list[str]) -> dict[str, Any]:
    given = _decoded(field, value, dict, "an object", problems)
    if given is None:
        return {}
    function = {key: value for key, value in given.items() if value is not None}
    _add(problems, text_problem(f"{field}.name", function.get("name")))
    if "description" in function and not isinstance(function["description"], str):
        problems.append(f"{field}.description: is {kind(function['description'])}; it must be a text")
    if "parameters" in function:
        function["parameters"] = _decoded(f"{field}.parameters", function["parameters"], dict, "an object", problems)
    problems += value_problems(field, {key: value for key, value in function.items() if key != "name"})
    return function


def calls_of(
    field: str, message: Mapping[str, Any], names: Collection[str] | None, problems: list[str]
) -> list[Call] | None:
    """Of `tool_calls`, or of the older `function_call`; None where the message has neither."""
    given = [key for key in ("tool_calls", "function_call") if message.get(key) not in _ABSENT]
    if not given:
        return None
    if len(given) > 1:
        problems.append(f"{field}: has both tool_calls and function_call; keep tool_calls")
    return read_calls(f"{field}.{given[0]}", message[given[0]], names, problems)


def read_calls(field: str, value: object, names: Collection[str] | None, problems: list[str]) -> list[Call]:
    """Of a list of calls or of one, or of the JSON of these. `names`: what can be called; None where it is unknown."""
    before = len(problems)
    found = _decoded(field, value, object, "a list of calls", problems)
    if not isinstance(found, list | dict) or not found:
        problems += [f"{field}: is {kind(found)}; it must be a list of calls"] if len(problems) == before else []
        return []
    if names is not None and not names:
        problems.append(f"{field}: calls a function, and the record has no tools; add its tools")
        names = None
    items = [(field, found)] if isinstance(found, dict) else [(f"{field}[{i}]", item) for i, item in enumerate(found)]
    calls = [call for where, item in items if (call := _call(where, item, names, problems))]
    ids = Counter(call["id"] for call in calls if "id" in call)
    problems += [f"{field}: {n} calls have the id {named(name)}; give each its own" for name, n in ids.items() if n > 1]
    return calls


def _call(field: str, item: object, names: Collection[str] | None, problems: list[str]) -> Call | None:
    """{"type", "id"?, "function"}, also of a bare {"name", "arguments"}; None where it has problems."""
    before = len(problems)
    if not isinstance(item, dict):
        problems.append(f"{field}: is {kind(item)}; it must be an object with a function")
        return None
    is_bare = "function" not in item
    inner = field if is_bare else f"{field}.function"
    function = item if is_bare else item["function"]
    if not isinstance(function, dict):
        problems.append(f"{inner}: is {kind(function)}; it must be an object with name and arguments")
        return None
    own, its = ("id", "type"), ("name", "arguments")
    problems += unknown_keys(field, item, own + (its if is_bare else ("function",)))
    problems += () if is_bare else unknown_keys(inner, function, its)
    if item.get("type") not in (None, "function"):
        problems.append(f"{field}.type: is {_said(item['type'])}; it must be 'function'")
    call_id, name = item.get("id"), function.get("name")
    if call_id not in (None, ""):
        _add(problems, text_problem(f"{field}.id", call_id))
    _add(problems, text_problem(f"{inner}.name", name))
    if isinstance(name, str) and names is not None and name not in names:
        among = ", ".join(map(named, list(names)[:10]))
        problems.append(
            f"{inner}.name: is {named(name)}, which is not among the record's tools ({among}); add its tool"
        )
    arguments = _arguments(f"{inner}.arguments", function.get("arguments"), problems)
    if len(problems) > before:
        return None
    return {
        "type": "function",
        **({"id": call_id} if call_id else {}),
        "function": {"name": name, "arguments": as_text(arguments)},
    }


def _arguments(field: str, value: object, problems: list[str]) -> dict[str, Any] | None:
    if value is None:
        problems.append(f"{field}: is missing; write {{}} where there are none")
        return None
    found: dict[str, Any] | None = _decoded(field, value, dict, "an object", problems)
    if found is not None:
        problems += value_problems(field, found)
    return found


def unknown_keys(field: str, item: Mapping[str, Any], known: Collection[str]) -> list[str]:
    unknown = sorted(key for key in item if key not in known and item[key] is not None)
    return [f"{field}: {named(key)} is an unknown key and would be lost; remove it" for key in unknown]


def _decoded(field: str, value: object, expected: type[T], what: str, problems: list[str]) -> T | None:
    """The value, or of a text the JSON in it; None where that is not `expected`, which goes to `problems`."""
    if isinstance(value, str):
        try:
            value = records.parse(value)
        except (ValueError, RecursionError) as error:
            problems.append(f"{field}: is {records.reason(error)}; it must be {what}")
            return None
    if not isinstance(value, expected):
        problems.append(f"{field}: is {kind(value)}; it must be {what}")
        return None
    return value


def value_problems(field: str, value: object) -> list[str]:
    """What in a value, however deep, JSON cannot say."""
    try:
        text = as_text(value)
        text.encode("utf-8")
    except (ValueError, TypeError):
        return list(_located(field, value))
    except RecursionError:
        return [f"{field}: is nested too deeply; make it flatter"]
    if text.count("{") + text.count("[") > NESTED and _levels(value) > NESTED:
        return [f"{field}: is nested too deeply; make it flatter"]
    return []


def _levels(value: object) -> int:
    count = 0
    layer = [value]
    while layer := [child for item in layer for child in _children(item)]:
        count += 1
    return count


def _children(item: object) -> Iterable[object]:
    return item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()


def _located(field: str, value: object) -> Iterable[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            where = f"{field}.{key}" if isinstance(key, str) and key.isidentifier() else f"{field}[{_said(key)}]"
            if not isinstance(key, str):
                yield f"{where}: the key is {kind(key)}; it must be a text"
            elif problem := _half_a_character(where, key):
                yield problem
            yield from _located(where, item)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _located(f"{field}[{index}]", item)
    elif isinstance(value, str):
        yield from filter(None, [_half_a_character(field, value)])
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{field}: is {value}, which is no number of JSON; write null or a text"
    elif not isinstance(value, bool | int | float | None):
        yield f"{field}: is {kind(value)}; write it as a text"


def _said(value: object) -> str:
    return named(value) if isinstance(value, str) else kind(value)


def _add(problems: list[str], problem: str | None) -> None:
    if problem is not None:
        problems.append(problem)
