"""Normalise tools and calls of every format, and name the fields of bad ones."""

import pytest

from saigakit.data import tool_calls

SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "default": None}}}
FUNCTION = {"name": "weather", "description": "Погода", "parameters": SCHEMA}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Томск"}}}


def tools(**record):
    problems = []
    return tool_calls.read_tools(record, problems), problems


def read(value, names=("weather",)):
    problems = []
    return tool_calls.read_calls("calls", value, names, problems, set()), problems


def nested(levels):
    value = "дно"
    for _ in range(levels):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    "item",
    [
        TOOL,
        {"function": FUNCTION},
        {**TOOL, "type": None, "strict": None},
        FUNCTION,
        {**FUNCTION, "strict": None},
        {"type": "function", **FUNCTION},
        {**FUNCTION, "parameters": '{"type": "object", "properties": {"city": {"type": "string", "default": null}}}'},
    ],
)
def test_tools_in_every_format_are_normalised_and_schemas_keep_nulls(item):
    assert tools(tools=[item]) == ([TOOL], [])


def test_other_keys_of_a_tool_are_kept():
    assert tools(tools=[{**TOOL, "function": {**FUNCTION, "strict": True}}])[0][0]["function"]["strict"] is True


@pytest.mark.parametrize("empty", [None, [], {}, "", "[]", "{}", "null"])
def test_empty_tools_are_no_tools(empty):
    assert tools(tools=empty, functions=empty) == ([], [])


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"tools": 5}, "tools: is a number; it must be a list of tools"),
        ({"tools": {"name": "а"}}, "tools: is an object; it must be a list of tools"),
        ({"tools": "[{]"}, "tools: is invalid JSON (Expecting property name enclosed in double quotes, column 3)"),
        ({"tools": "[" * 100_000}, "tools: is nested too deeply; it must be a list of tools"),
        ({"tools": '[{"name": "а", "name": "б"}]'}, "tools: is invalid JSON (the key 'name' occurs twice)"),
        ({"tools": ["weather"]}, "tools[0]: is invalid JSON"),
        ({"tools": [TOOL, 5]}, "tools[1]: is a number; it must be an object"),
        ({"tools": [{"type": "function"}]}, "tools[0].name: is missing"),
        ({"tools": [{**TOOL, "type": "retrieval"}]}, "tools[0].type: is 'retrieval'; it must be 'function'"),
        ({"tools": [{"type": "function", "function": 5}]}, "tools[0].function: is a number; it must be an object"),
        ({"tools": [{"function": {"name": " "}}]}, "tools[0].function.name: is empty"),
        ({"functions": [{"name": 5}]}, "functions[0].name: is a number; it must be a text"),
        ({"tools": [{"name": "а", "description": ["б"]}]}, "tools[0].description: is a list; it must be a text"),
        ({"tools": [{"name": "а", "parameters": []}]}, "tools[0].parameters: is empty; it must be an object"),
        ({"tools": [TOOL, TOOL]}, "tools: 'weather' occurs 2 times; keep one"),
        ({"tools": [TOOL], "functions": [FUNCTION]}, "record: has both tools and functions; keep tools"),
        ({"tools": [{"name": "а", "parameters": {"x y": {"b": ["в", "\ud83d"]}}}]},
         "tools[0]: contains an unpaired surrogate ('\\ud83d')"),
        ({"tools": [{"name": "а", "parameters": {"\ud83d": 1}}]}, "contains an unpaired surrogate"),
        ({"tools": [{"name": "а", "parameters": {"x": float("nan")}}]}, "tools[0]: cannot be written as JSON (Out of"),
        ({"tools": [{"name": "а", "parameters": {"x": b"y"}}]}, "tools[0]: cannot be written as JSON (Object of"),
        ({"tools": [{"name": "а", "parameters": nested(101)}]}, "tools[0]: is nested too deeply"),
        ({"tools": [{**TOOL, "note": "\ud83d"}]}, "tools[0]: contains an unpaired surrogate"),
    ],
)  # fmt: skip
def test_a_problem_names_the_field_of_a_bad_tool(record, expected):
    _, problems = tools(**record)
    assert len(problems) == 1
    assert problems[0].startswith(expected) or expected in problems[0]


@pytest.mark.parametrize(
    "value",
    [
        [CALL],
        CALL,
        CALL["function"],
        '{"name": "weather", "arguments": {"city": "Томск"}}',
        '[{"name": "weather", "arguments": {"city": "Томск"}}]',
        [{"id": None, "function": {"name": "weather", "arguments": '{"city": "Томск"}'}}],
        [{"id": "", "type": None, "function": {"name": "weather", "arguments": ' {"city": "\\u0422омск"} '}}],
    ],
)
def test_calls_in_every_format_are_normalised(value):
    kept = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Томск"}'}}
    assert read(value) == ([kept], [])


def test_an_id_is_kept_and_empty_arguments_are_an_object():
    made, problems = read([{"id": "7", "function": {"name": "weather", "arguments": "{}"}}])
    assert problems == []
    assert made == [{"type": "function", "id": "7", "function": {"name": "weather", "arguments": "{}"}}]


def test_the_empty_arguments_of_a_call_without_parameters_are_an_object():
    made, problems = read([{"function": {"name": "weather", "arguments": ""}}])
    assert (made[0]["function"]["arguments"], problems) == ("{}", [])


def test_other_keys_of_a_call_are_not_read_unless_they_are_empty():
    unread = set()
    call = {**CALL, "index": 0, "id": None, "note": "", "function": {**CALL["function"], "strict": False, "extra": {}}}
    made = tool_calls.read_calls("m[3].tool_calls", [call], ["weather"], [], unread)
    assert made == read([CALL])[0]
    assert unread == {"m[].tool_calls[].index", "m[].tool_calls[].function.strict"}


def called(**function):
    return [{"function": {**CALL["function"], **function}}]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (5, "calls: is a number; it must be a list of calls"),
        ("погода", "calls: is invalid JSON (Expecting value, column 1); it must be a list of calls"),
        ("[]", "calls: is empty; it must be a list of calls"),
        (["погода"], "calls[0]: is a text; it must be an object with a function"),
        ([{"function": "погода"}], "calls[0].function: is a text; it must be an object with name and arguments"),
        ([{**CALL, "type": "custom"}], "calls[0].type: is 'custom'; it must be 'function'"),
        ([{**CALL, "id": 5}], "calls[0].id: is a number; it must be a text"),
        ([{**CALL, "id": "\ud83d"}], "calls[0].id: contains an unpaired surrogate"),
        (called(name=None), "calls[0].function.name: is missing"),
        (called(name="time"), "calls[0].function.name: is 'time', which the record's tools ('weather') lack"),
        (
            called(arguments='{"a": 1'),
            "calls[0].function.arguments: is invalid JSON (Expecting ',' delimiter, column 8)",
        ),
        (
            called(arguments='{"a": 1, "a": 2}'),
            "calls[0].function.arguments: is invalid JSON (the key 'a' occurs twice)",
        ),
        (called(arguments="[1]"), "calls[0].function.arguments: is a list; it must be an object"),
        (called(arguments="null"), "calls[0].function.arguments: is null; it must be an object"),
        (called(arguments=5), "calls[0].function.arguments: is a number; it must be an object"),
        (called(arguments={"a": ["\ud83d"]}), "calls[0].function.arguments: contains an unpaired surrogate"),
        (called(arguments='{"a": "\\ud83d"}'), "calls[0].function.arguments: contains an unpaired surrogate"),
        (called(arguments='{"a": NaN}'), "calls[0].function.arguments: cannot be written as JSON (Out of range"),
        (called(arguments=nested(500)), "calls[0].function.arguments: is nested too deeply"),
        ([{**CALL, "id": "1"}, {**CALL, "id": "1"}], "calls: 2 calls have the id '1'; make the ids unique"),
    ],
)
def test_a_problem_names_the_field_of_a_bad_call(value, expected):
    _, problems = read(value)
    assert len(problems) == 1
    assert problems[0].startswith(expected)


def test_a_call_without_tools_is_a_problem_unless_the_tools_are_invalid():
    assert read([CALL], names=[])[1] == ["calls: calls a function, but the record has no tools; add them"]
    assert read([CALL], names=None)[1] == []


def test_accepts_values_of_exactly_the_maximum_depth():
    assert read(called(arguments=nested(tool_calls.NESTED)))[1] == []
    assert read(called(arguments=nested(tool_calls.NESTED + 1)))[1] != []


def test_rejects_a_message_with_both_kinds_of_calls():
    problems = []
    tool_calls.find_calls("m", {"tool_calls": [CALL], "function_call": CALL["function"]}, problems)
    assert problems == ["m: has both tool_calls and function_call; keep tool_calls"]
