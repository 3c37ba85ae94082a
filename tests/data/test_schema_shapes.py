"""Read the shapes of records that other tools use, and report what is not read."""

import json

import pytest

from saigakit import data
from saigakit.data import schema, store
from saigakit.data.records import BadRecord
from saigakit.errors import DataError

ASKED = {"role": "user", "content": "Кто написал «Обломова»?"}
SAID = {"role": "assistant", "content": "Гончаров."}
TALK = [ASKED, SAID]
SYSTEM = {"role": "system", "content": "Отвечай кратко."}
THOUGHT = "Роман 1859 года."
THINKING = [ASKED, {**SAID, "reasoning_content": THOUGHT}]
Q, A = ASKED["content"], SAID["content"]
COLUMNS = {"role": ["user", "bot"], "content": [Q, A]}
TOOL = {"type": "function", "function": {"name": "now"}}


def read(record):
    notes = schema.Notes()
    made = schema.normalise_record(record, notes)
    assert not isinstance(made, BadRecord), made
    return made["messages"], set(notes.unread), notes.as_json


def problems(record):
    found = schema.normalise_record(record)
    assert isinstance(found, BadRecord), found
    return list(found.problems)


def answered(**message):
    return {"messages": [ASKED, {**SAID, **message}]}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": COLUMNS},
        {"messages": {**COLUMNS, "tool_calls": [], "name": None}},
        {"conversations": {"from": ["human", "gpt"], "value": [Q, A]}},
        {"messages": json.dumps(TALK)},
        {"messages": f" {json.dumps(COLUMNS)}"},
        {"conversations": json.dumps([{"from": "human", "value": Q}, {"from": "gpt", "value": A}])},
        TALK,
        {"conversations": TALK},
        {"conversation": TALK},
        {"messages": [{"from": "human", "value": Q}, {"role": "assistant", "content": A}]},
        {"messages": [{"role": "User", "content": Q}, {"role": " Model ", "content": A}]},
        {"messages": [{"role": "HUMAN", "content": Q}, {"role": "ChatGPT", "content": A}]},
        {"instruction": Q, "output": A},
        {"instruction": Q, "input": "", "output": A, "system": "", "history": []},
        {"instruction": "", "input": Q, "response": A},
        {"instruction": "Кто написал", "input": "«Обломова»?", "output": A} | {"instruction": Q, "input": None},
        {"prompt": Q, "completion": A},
        {"prompt": [ASKED], "completion": [SAID]},
        {"prompt": [ASKED], "completion": A},
        {"prompt": Q, "response": A},
        {"query": Q, "response": A, "history": None},
        {"question": Q, "answer": A},
        {"messages": [], "conversations": "", "user": Q, "bot": A},
        {"messages": TALK, "question": Q, "answer": A},
        {"messages": TALK, "bot": [], "user": "кто-то"} | {"user": None},
        {"messages": [{**ASKED, "content": [{"type": "text", "text": "Кто написал "},
                                            {"type": "input_text", "text": "«Обломова»?"}]}, SAID]},
        {"messages": [{**ASKED, "name": "", "tool_calls": []},
                      {**SAID, "refusal": None, "annotations": [], "audio": None, "function_call": None,
                       "tool_calls": None, "reasoning_content": "\n"}], "tools": None},
    ],
)  # fmt: skip
def test_the_shapes_of_other_tools_are_read_completely(record):
    assert read(record) == (TALK, set(), 0)


def test_a_developer_is_the_system():
    assert read({"messages": [{**SYSTEM, "role": "developer"}, *TALK]})[0] == [SYSTEM, *TALK]


def test_alpaca_has_a_system_prompt_an_input_and_a_history():
    record = {
        "instruction": "Переведи.",
        "input": "cat",
        "output": "кот",
        "system": SYSTEM["content"],
        "history": [[Q, A]],
    }
    asked, said = {"role": "user", "content": "Переведи.\ncat"}, {"role": "assistant", "content": "кот"}
    assert read(record) == ([SYSTEM, *TALK, asked, said], set(), 0)


@pytest.mark.parametrize(
    "record",
    [
        answered(content=f"<think>\n{THOUGHT}\n</think>\n\n{A}"),
        answered(content=f"\n<think>{THOUGHT}</think>{A}"),
        answered(reasoning_content=f"\n{THOUGHT}\n", content=f"\n{A}"),
        answered(reasoning=THOUGHT),
        answered(thinking=THOUGHT, reasoning=THOUGHT, reasoning_content=""),
        answered(content=f"<think>{THOUGHT}</think>{A}", reasoning_content=THOUGHT),
        answered(content=f"<think></think>{A}", reasoning_content=THOUGHT),
        {"user": Q, "bot": f"<think>{THOUGHT}</think>{A}"},
        {"messages": {**COLUMNS, "reasoning_content": [None, THOUGHT]}},
    ],
)
def test_a_thought_becomes_reasoning_content(record):
    assert read(record) == (THINKING, set(), 0)


@pytest.mark.parametrize(
    "text",
    [
        f"<think>\n\n</think>\n\n{A}",
        f"<think></think>{A}",
        f"{A} <think>{THOUGHT}</think>",
        f"<think>{THOUGHT}",
        f"{THOUGHT}</think>{A}",
    ],
)
def test_an_empty_or_later_thought_stays_in_the_text(text):
    assert read(answered(content=text))[0] == [ASKED, {**SAID, "content": text}]


def test_a_thought_of_the_user_stays_in_the_text():
    asked = {**ASKED, "content": f"<think>{THOUGHT}</think>{Q}"}
    assert read({"messages": [{**asked, "reasoning": "а"}, SAID]}) == ([asked, SAID], {"messages[].reasoning"}, 0)


def test_a_call_may_have_a_thought_and_no_text():
    call = {"type": "function", "function": {"name": "now", "arguments": "{}"}}
    turns = [ASKED, {"role": "assistant", "content": f"<think>{THOUGHT}</think>\n\n", "tool_calls": [call]}]
    made = schema.normalise_record({"messages": turns, "tools": [TOOL]})
    assert made["messages"][1] == {
        "role": "assistant", "content": "", "reasoning_content": THOUGHT, "tool_calls": [call],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"user": Q, "bot": []}, "[]"),
        ({"user": Q, "bot": {"автор": "Гончаров"}}, '{"автор": "Гончаров"}'),
        ({"instruction": Q, "output": [{"автор": "Гончаров"}]}, '[{"автор": "Гончаров"}]'),
        ({"prompt": Q, "completion": ["Гончаров"]}, '["Гончаров"]'),
        ({"prompt": Q, "completion": [{"role": "автор", "имя": "Гончаров"}]}, '[{"role": "автор", "имя": "Гончаров"}]'),
        ({"question": Q, "answer": {}}, "{}"),
        (answered(content={"автор": None}), '{"автор": null}'),
        (answered(content=[1, 2]), "[1, 2]"),
    ],
)
def test_an_answer_that_is_a_list_or_an_object_becomes_json(record, text):
    assert read(record) == ([ASKED, {**SAID, "content": text}], set(), 1)


@pytest.mark.parametrize(
    ("record", "keys"),
    [
        ({"messages": TALK, "id": 0, "user": "Иван", "source": None, "tools": [], "tool_choice": "auto"},
         {"id", "user", "tool_choice"}),
        ({"messages": TALK, "history": [[Q, A]]}, {"history"}),
        ({"user": Q, "bot": A, "input": "а"}, {"input"}),
        ({"messages": [{**ASKED, "name": "Иван", "weight": 0, "tool_calls": [1]}, SAID]},
         {"messages[].name", "messages[].weight", "messages[].tool_calls"}),
        (answered(train=False, wait=0, tool_call_id="1"),
         {"messages[].train", "messages[].wait", "messages[].tool_call_id"}),
        ({"messages": {**COLUMNS, "score": [1, 2]}}, {"messages[].score"}),
        ({"messages": {**COLUMNS, "lang": "ru"}}, {"messages.lang"}),
        ({"messages": [{**ASKED, "content": [{"type": "text", "text": Q, "cache_control": {"type": "а"}}]}, SAID]},
         {"messages[].content[].cache_control"}),
    ],
)  # fmt: skip
def test_what_is_not_used_is_reported_and_nothing_is_refused(record, keys):
    assert read(record) == (TALK, keys, 0)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": {"role": ["user", "bot"], "content": [Q]}},
         "messages: its columns have different lengths ('role' 2, 'content' 1); add what is missing"),
        ({"messages": {"role": "user", "content": Q}}, "messages: is an object; it must be a list of messages"),
        ({"messages": "[{]"}, "messages: is invalid JSON"),
        ({"messages": "null"}, "messages: is a text; it must be a list of messages"),
        ({"prompt": [{"type": "image_url", "image_url": {}}], "completion": A},
         "prompt[0]: is not of the type 'text' with a text; only texts can be trained"),
        ({"messages": [ASKED, {**SAID, "content": [{"type": "text", "text": "а"}, {"type": "image"}]}]},
         "messages[1].content[1]: is not of the type 'text'"),
        ({"instruction": Q, "output": 5}, "output: is a number; it must be a text"),
        ({"instruction": Q, "input": 5, "output": A}, "instruction and input: is a number; it must be a text"),
        ({"instruction": Q, "output": ""}, "output: is empty"),
        ({"instruction": Q, "output": A, "history": [[Q]]},
         "history[0]: is a list; it must be a list of a question and an answer"),
        ({"instruction": Q, "output": A, "history": 5}, "history: is a number; it must be a list"),
        ({"instruction": Q, "output": A, "history": [[Q, ""]]}, "history[0][1]: is empty"),
        ({"user": Q, "bot": {"а": float("nan")}}, "bot: cannot be written as JSON (Out of range"),
        (answered(reasoning_content=5), "messages[1].reasoning_content: is a number; it must be a text"),
        (answered(thinking=True), "messages[1].thinking: is true or false; it must be a text"),
        (answered(reasoning="\ud83d"), "messages[1].reasoning: contains an unpaired surrogate"),
        (answered(content=f"<think>\ud83d</think>{A}"), "messages[1].content: contains an unpaired surrogate"),
        (answered(content=f"<think>{THOUGHT}</think>\n"), "messages[1].content after the thought: is empty"),
        (answered(content=f"<think>а</think>{A}", reasoning="б"),
         "messages[1].content: has another thought than reasoning_content; write them as one"),
        ({"user": Q, "bot": A, "question": Q, "answer": "Другой."},
         "record: has different conversations under user and bot, question and answer; write each as a record"),
        ({"question": Q, "context": "а", "answer_text": A},
         "record: looks most like user and bot: rename 'question' to user and 'answer_text' to bot"),
        ({"user": Q, "answer": A}, "record: looks most like user and bot: rename 'answer' to bot"),
        ({"INSTRUCTION": Q, "RESPONSE": A}, "rename 'INSTRUCTION' to user and 'RESPONSE' to bot"),
        ({"prompt": Q, "chosen": A, "rejected": "а"}, "rename 'prompt' to user and 'chosen' to bot"),
        ({"Вопрос": Q, "Ответ": A}, "rename 'Вопрос' to user and 'Ответ' to bot"),
        ({"username": "Иван", "bot": A}, "user: is missing; add the text"),
        ({"dialog": TALK}, "record: looks most like messages: rename 'dialog' to messages"),
        (ASKED, "record: is a single message; write all messages of a conversation as a list named messages"),
    ],
)  # fmt: skip
def test_a_problem_names_the_field_or_the_keys_to_rename(record, expected):
    assert len(problems(record)) == 1
    assert expected in problems(record)[0]


def test_written_thoughts_are_read_as_the_same_rows(tmp_path):
    source = tmp_path / "source.jsonl"
    twice = f"<think>{THOUGHT}</think>\n\n<think>{THOUGHT}</think>{A}"
    empty = f"<think>\n\n</think>\n\n{A}"
    rows = [answered(content=twice), answered(reasoning=THOUGHT), answered(content=empty), {"messages": TALK}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    first = data.read_conversations(source)
    again = data.read_conversations(data.write_conversations(first, tmp_path / "train.jsonl"))
    assert list(again) == list(first)
    read_rows = [row["messages"] for row in store.iter_conversations(again)]
    assert read_rows == [THINKING, THINKING, [ASKED, {**SAID, "content": empty}], TALK]
    assert (
        store.to_json_line({"messages": THINKING}).decode()
        == json.dumps({"messages": THINKING}, ensure_ascii=False) + "\n"
    )


def test_reports_once_what_is_not_read_and_what_became_json(tmp_path, capsys):
    rows = [
        {"messages": [{**ASKED, "name": "Иван"}, SAID, {**ASKED, "name": "Пётр"}, SAID]},
        {"user": Q, "bot": [1]},
        {"user": Q, "bot": {}, "id": 1},
    ]
    (tmp_path / "а.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data.read_conversations(tmp_path / "а.jsonl")
    assert capsys.readouterr().out.splitlines() == [
        "а.jsonl: keys that are not read: 'messages[].name' in 1 record, 'id' in 1 record.",
        "а.jsonl: answers that are lists or objects, which become JSON text: 2.",
    ]


def test_a_malformed_thought_is_refused_with_its_line(tmp_path):
    (tmp_path / "а.jsonl").write_text(json.dumps(answered(reasoning_content=["а"])), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        data.read_conversations(tmp_path / "а.jsonl")
    assert caught.value.problems == ["а.jsonl:1: messages[1].reasoning_content: is a list; it must be a text"]


@pytest.mark.parametrize("content", ["", None])
@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")])
def test_an_empty_system_prompt_in_a_list_is_ignored(keys, content):
    turns = [("system", content), ("user", "q"), ("assistant", "a")]
    record = {"messages": [dict(zip(keys, turn, strict=True)) for turn in turns]}
    assert schema.normalise_record(record) == {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    }


def test_a_completion_may_be_messages_beside_a_prompt_that_is_a_text():
    expected = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    assert schema.normalise_record({"prompt": "q", "completion": expected["messages"][1:]}) == expected
    answer = [{"role": "режиссёр", "name": "Тарковский"}]
    made = schema.normalise_record({"prompt": "q", "completion": answer})
    assert json.loads(made["messages"][1]["content"]) == answer


@pytest.mark.parametrize("arguments", [None, "", " ", {}, "{}"])
def test_arguments_that_are_empty_are_none(arguments):
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "a"},
    ]
    made = schema.normalise_record({"messages": messages, "tools": [{"type": "function", "function": {"name": "f"}}]})
    assert made["messages"][1]["tool_calls"][0]["function"]["arguments"] == "{}"
