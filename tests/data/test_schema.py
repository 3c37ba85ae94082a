"""Normalise records of every format, and list the problems of bad ones."""

import json

import pytest

from saigakit.data import schema
from saigakit.data.records import BadRecord

TALK = [{"role": "user", "content": "Кто ты?"}, {"role": "assistant", "content": "Сайга."}]
WITH_SYSTEM = [{"role": "system", "content": "Отвечай кратко."}, *TALK]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
ASK = {"role": "user", "content": "Какая погода в Томске?"}
TOOLS = json.dumps([WEATHER], ensure_ascii=False)  # as they are kept
ARGUMENTS = '{"city": "Томск"}'
CALL = {"type": "function", "id": "1", "function": {"name": "weather", "arguments": ARGUMENTS}}
ANSWER = {"role": "tool", "content": "-5", "tool_call_id": "1"}
SAID = {"role": "assistant", "content": "Минус пять."}
WITH_TOOL = [ASK, {"role": "assistant", "content": "", "tool_calls": [CALL]}, ANSWER, SAID]
PLAIN_CALL = {"name": "weather", "arguments": ARGUMENTS}
TOOL_TURNS = [
    ASK,
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": PLAIN_CALL}]},
    {"role": "tool", "content": "-5"},
    SAID,
]


def calling(**changes):
    """WITH_TOOL with other keys in the assistant's message."""
    return {"messages": [ASK, {**WITH_TOOL[1], **changes}, ANSWER, SAID], "tools": [WEATHER]}


def problems(record):
    found = schema.normalise_record(record)
    assert isinstance(found, BadRecord), found
    return list(found.problems)


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"messages": TALK}, TALK),
        ({"messages": WITH_SYSTEM}, WITH_SYSTEM),
        ({"messages": [TALK[0], {"role": "bot", "content": "Сайга."}]}, TALK),
        ({"messages": [*TALK, *TALK]}, [*TALK, *TALK]),
        ({"messages": TALK, "system": "Отвечай кратко."}, WITH_SYSTEM),
        ({"messages": [TALK[0], {**TALK[1], "tool_calls": None, "name": None}], "tools": []}, TALK),
        ({"messages": [TALK[0], {**TALK[1], "tool_calls": [], "function_call": {}}], "tools": "[]"}, TALK),
        ({"user": "Кто ты?", "bot": "Сайга."}, TALK),
        ({"system": "Отвечай кратко.", "user": "Кто ты?", "bot": "Сайга."}, WITH_SYSTEM),
        ({"system": "", "user": "Кто ты?", "bot": "Сайга.", "tools": "", "functions": None}, TALK),
        ({"conversations": [{"from": "human", "value": "Кто ты?"}, {"from": "gpt", "value": "Сайга."}]}, TALK),
        (
            {
                "conversations": [
                    {"from": "system", "value": "Отвечай кратко."},
                    {"from": "user", "value": "Кто ты?"},
                    {"from": "assistant", "value": "Сайга."},
                ]
            },
            WITH_SYSTEM,
        ),
    ],
)
def test_every_format_is_normalised_to_the_same_messages(record, messages):
    assert schema.normalise_record(record) == {"messages": messages}


@pytest.mark.parametrize(
    "record",
    [
        calling(),
        calling(content=None),
        {"messages": WITH_TOOL, "tools": '[{"function": {"name": "weather", "parameters": {"type": "object", '
         '"properties": {}}}}]'},
        {"messages": WITH_TOOL, "tools": [WEATHER["function"]]},
        {"messages": WITH_TOOL, "functions": [WEATHER["function"]]},
        calling(tool_calls=[{**CALL, "function": {"name": "weather", "arguments": {"city": "Томск"}}}]),
        calling(tool_calls=[{"id": "1", **PLAIN_CALL}]),
    ],
)  # fmt: skip
def test_tools_and_calls_in_every_format_are_normalised(record):
    assert schema.normalise_record(record) == {"messages": WITH_TOOL, "tools": TOOLS}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [ASK, {"role": "assistant", "content": None, "function_call": PLAIN_CALL}, *TOOL_TURNS[2:]]},
        {
            "conversations": [
                {"from": "human", "value": ASK["content"]},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Томск"}}'},
                {"from": "observation", "value": "-5"},
                {"from": "gpt", "value": "Минус пять."},
            ]
        },
        {
            "conversations": [
                {"from": "human", "value": ASK["content"]},
                {"from": "function_call", "value": '[{"name": "weather", "arguments": "{\\"city\\": \\"Томск\\"}"}]'},
                {"from": "tool", "value": "-5"},
                {"from": "gpt", "value": "Минус пять."},
            ]
        },
    ],
)
def test_older_calls_and_sharegpt_calls_are_normalised(record):
    assert schema.normalise_record({**record, "tools": [WEATHER]}) == {"messages": TOOL_TURNS, "tools": TOOLS}


def test_a_function_message_becomes_a_tool_message_and_keeps_its_name():
    answered = {"role": "function", "name": "weather", "content": "-5"}
    made = schema.normalise_record({"messages": [*TOOL_TURNS[:2], answered, SAID], "tools": [WEATHER]})
    assert made["messages"][2] == {"role": "tool", "name": "weather", "content": "-5"}


def test_text_next_to_a_call_is_kept():
    assert schema.normalise_record(calling(content=" Смотрю. "))["messages"][1]["content"] == " Смотрю. "


def test_two_calls_have_two_answers_and_a_call_may_be_last():
    second = {**CALL, "id": "2"}
    both = {"role": "assistant", "content": "", "tool_calls": [CALL, second]}
    turns = [ASK, both, {**ANSWER, "tool_call_id": "2"}, ANSWER, {**WITH_TOOL[1], "tool_calls": [CALL]}]
    assert schema.normalise_record({"messages": turns, "tools": [WEATHER]})["messages"] == turns


def test_tools_that_are_not_called_are_kept():
    assert schema.normalise_record({"user": "а", "bot": "б", "tools": [WEATHER]})["tools"] == TOOLS


def test_texts_are_unchanged():
    text = "  отступ\n\tтаб </s> <|im_end|> 🙂 漢 e\u0301\u200b \x00 "
    made = schema.normalise_record({"user": text, "bot": text})
    assert [message["content"] for message in made["messages"]] == [text, text]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (5, "record: is a number; it must be an object"),
        ({}, "record: has neither messages nor user and bot, but no keys"),
        ({"заметка": "а"}, "record: has neither messages nor user and bot, but 'заметка'; give its texts these names"),
        ([], "messages: is empty"),
        ([5], "messages[0]: is a number; it must be an object with role and content"),
        (
            {"messages": TALK, "user": "а", "bot": "б"},
            "record: has different conversations under messages, user and bot",
        ),
        ({"user": "а"}, "bot: is missing"),
        ({"bot": "а"}, "user: is missing"),
        ({"user": None, "bot": "а"}, "user: is missing"),
        ({"user": 5, "bot": "а"}, "user: is a number; it must be a text"),
        ({"user": True, "bot": "а"}, "user: is true or false"),
        ({"user": b"a", "bot": "а"}, "user: is of the type bytes; it must be a text"),
        ({"user": {"text": "а"}, "bot": "а"}, "user: is an object"),
        ({"user": "а", "bot": " \n\t"}, "bot: is empty"),
        ({"user": "", "bot": "а"}, "user: is empty"),
        ({"user": "\ud83d", "bot": "а"}, "user: contains an unpaired surrogate ('\\ud83d')"),
        ({"user": "а", "bot": "\ude42\ud83d"}, "bot: contains an unpaired surrogate ('\\ude42')"),
        ({"system": "  ", "user": "а", "bot": "а"}, "system: is empty"),
        ({"system": 1, "user": "а", "bot": "а"}, "system: is a number"),
        ({"messages": "Кто ты?"}, "messages: is a text; it must be a list"),
        ({"messages": []}, "messages: is empty"),
        ({"messages": None}, "messages: is null"),
        ({"messages": ["Кто ты?", TALK[1]]}, "messages[0]: is a text; it must be an object with role and content"),
        ({"messages": [{"role": "user"}, TALK[1]]}, "messages[0].content: is missing"),
        ({"messages": [{"content": "а"}, TALK[1]]}, "messages[0].role: is missing"),
        ({"messages": [{"role": "narrator", "content": "а"}, TALK[1]]}, "messages[0].role: is 'narrator'; use system"),
        ({"messages": [{"role": 1, "content": "а"}, TALK[1]]}, "messages[0].role: is a number"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}, TALK[1]]}, "messages[0].content[0]: is not of"),
        ({"messages": [{"role": "user", "content": [{"a": 1}]}, TALK[1]]}, "messages[0].content: is a list"),
        ({"messages": [TALK[0], {**TALK[1], "weight": 0}]}, "messages: all answers have weight 0"),
        (
            {"messages": [TALK[0], {**TALK[1], "weight": 2}]},
            "messages[1].weight: is 2; use 0 for an answer that must not",
        ),
        ({"messages": [TALK[0], {**TALK[1], "weight": "0"}]}, "messages[1].weight: is a text; use 0"),
        ({"messages": [TALK[0], {**TALK[1], "weight": True}]}, "messages[1].weight: is True; use 0"),
        ({"conversations": [{"from": "human"}, {"from": "gpt", "value": "б"}]}, "conversations[0].value: is missing"),
        ({"conversations": [{"value": "а"}, TALK[1]]}, "conversations[0].from: is missing"),
        ({"messages": [TALK[1], TALK[0]]}, "messages[0]: the role is assistant, expected user"),
        ({"messages": [TALK[0], *TALK]}, "messages[1]: the role is user, expected assistant"),
        ({"messages": [*TALK, WITH_SYSTEM[0], *TALK]}, "messages[2]: the role is system, expected user"),
        ({"messages": WITH_SYSTEM, "system": "Ещё один."}, "messages[0]: the role is system, expected user"),
        ({"messages": [*TALK, TALK[0]]}, "messages[2]: the last message is of user"),
        ({"messages": [WITH_SYSTEM[0]]}, "messages[0]: the last message is of system"),
        ({"messages": TALK, "tool_calls": [CALL]}, "tool_calls: is outside the messages"),
    ],
)
def test_a_problem_names_the_field_of_a_bad_record(record, expected):
    assert any(expected in problem for problem in problems(record)), problems(record)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (calling(content=" "), "messages[1].content: is empty"),
        (calling(content=5), "messages[1].content: is a number"),
        ({"messages": [TALK[0], {"role": "assistant", "content": ""}]}, "messages[1].content: is empty"),
        ({"messages": [*TALK, ANSWER, SAID]}, "messages[2]: the role is tool, expected user; use the order "
         "system (optional), user, assistant, user …, with tool and assistant after tool_calls"),
        ({"messages": [*WITH_TOOL[:2], *TALK], "tools": [WEATHER]}, "messages[2]: the role is user, expected tool"),
        ({"messages": [*WITH_TOOL[:3], *TALK], "tools": [WEATHER]}, "messages[3]: the role is user, expected"),
        ({"messages": WITH_TOOL[:3], "tools": [WEATHER]}, "messages[2]: the last message is of tool"),
        ({"messages": [*WITH_TOOL[:2], {**ANSWER, "content": " "}, SAID]}, "messages[2].content: is empty"),
        ({"messages": [*WITH_TOOL[:2], {**ANSWER, "content": {"t": -5}}, SAID]}, "messages[2].content: is an object"),
        ({"messages": [*WITH_TOOL[:2], {**ANSWER, "tool_call_id": 1}, SAID]}, "messages[2].tool_call_id: is a number"),
        ({"messages": [*WITH_TOOL[:2], {**ANSWER, "name": "\ud83d"}, SAID]}, "messages[2].name: contains an unpaired"),
        (calling(tool_calls=[{**CALL, "id": "2"}]), "messages[2].tool_call_id: is '1'; the ids of the previous "
         "assistant turn are '2'"),
        (calling(tool_calls=[PLAIN_CALL]), "messages[2].tool_call_id: is '1'; the ids of the previous "
         "assistant turn are none"),
        ({"messages": [*WITH_TOOL[:3], {**WITH_TOOL[1], "tool_calls": [{**CALL, "id": "2"}]}, ANSWER, SAID],
          "tools": [WEATHER]}, "messages[4].tool_call_id: is '1'"),
        ({"messages": WITH_TOOL}, "messages[1].tool_calls: calls a function, but the record has no tools"),
        ({"conversations": [{"from": "human", "value": "а"}, {"from": "function_call", "value": "{"}]},
         "conversations[1].value: is invalid JSON"),
        ({"conversations": [{"from": "human", "value": "а"}, {"from": "function_call"}]},
         "conversations[1].value: is null; it must be a list of calls"),
    ],
)  # fmt: skip
def test_a_problem_names_the_field_of_a_bad_tool_turn(record, expected):
    assert any(expected in problem for problem in problems(record)), problems(record)


def test_names_every_problem_of_a_record():
    messages = [
        {"role": "user", "content": 5},
        {"role": "narrator"},
        {"role": "assistant", "content": "", "weights": 1},
    ]
    assert [problem.partition(":")[0] for problem in problems({"messages": messages, "tools": 5})] == [
        "tools",
        "messages[0].content",
        "messages[1].role",
        "messages[2].content",
    ]


def test_a_sharegpt_call_keeps_weight_0():
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}
    tools = [{"type": "function", "function": {"name": "f"}}]
    turns = [
        {"from": "human", "value": "а"},
        call,
        {"from": "observation", "value": "1"},
        {"from": "gpt", "value": "б"},
    ]
    made = schema.normalise_record({"tools": tools, "conversations": [turns[0], {**call, "weight": 0}, *turns[2:]]})
    assert [message.get("weight") for message in made["messages"]] == [None, 0, None, None]
    bad = schema.normalise_record({"tools": tools, "conversations": [turns[0], {**call, "weight": "0"}, *turns[2:]]})
    assert bad.problems == (
        "conversations[1].weight: is a text; use 0 for an answer that must not be trained, otherwise 1",
    )
    nothing = schema.normalise_record({"conversations": [turns[0], {**turns[3], "weight": 0}]})
    assert nothing.problems[0].startswith("conversations: all answers have weight 0")


def test_an_answer_keeps_weight_0_and_loses_weight_1():
    messages = [TALK[0], {**TALK[1], "weight": 0}, TALK[0], {**TALK[1], "weight": 1}]
    made = schema.normalise_record({"messages": messages})
    assert made == {"messages": [TALK[0], {**TALK[1], "weight": 0}, *TALK[:2]]}
