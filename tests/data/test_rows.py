"""Tokenise conversations into rows that fit, in order, and store the rows."""

import os
import re
import subprocess
import sys

import pytest
from chatml import THOUGHTFUL, chatml

from saigakit.core import display, workspace
from saigakit.data import rows
from saigakit.errors import DataError, SaigaError
from saigakit.prompt import encoding, layout, template
from saigakit.prompt.encoding import IGNORE_INDEX, encode

SYSTEM = {"role": "system", "content": "Отвечай кратко."}


def turns(count: int, words: int = 5) -> list[dict[str, str]]:
    made = []
    for index in range(count):
        made += [
            {"role": "user", "content": f"Вопрос {index} " + "слово " * words},
            {"role": "assistant", "content": f"Ответ {index}."},
        ]
    return made


def ids_and_labels(row):
    return {key: row[key] for key in ("input_ids", "labels")}


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return encoding.load_tokenizer("saiga_tiny")


def test_rows_equal_those_of_encode_in_order_over_many_batches(tokenizer):
    conversations = [{"messages": turns(1 + index % 3)} for index in range(700)]
    made = [row for item in rows.encode_fitting(conversations, tokenizer, 512, name="records") for row in item.rows]
    assert made == [encode(each["messages"], tokenizer) for each in conversations]


def test_a_long_conversation_loses_complete_turns_from_its_end(tokenizer):
    messages = [SYSTEM, *turns(6)]
    length = len(encode(messages, tokenizer)["input_ids"])
    fits = len(encode(messages[:7], tokenizer)["input_ids"])
    (item,) = rows.encode_fitting([{"messages": messages, "id": 7}], tokenizer, fits, name="records")
    assert item.conversation == {"messages": messages[:7], "id": 7}
    assert item.rows == [encode(messages[:7], tokenizer)]
    assert (item.tokens, item.is_cut) == (length, True)
    (item,) = rows.encode_fitting([{"messages": messages}], tokenizer, fits - 1, name="records")
    assert item.conversation["messages"] == messages[:5]


def test_a_cut_conversation_ends_with_a_complete_answer(tokenizer):
    (end,) = encoding.end_of_turn_ids(tokenizer)
    for limit in range(30, 200, 7):
        (item,) = rows.encode_fitting([{"messages": turns(5)}], tokenizer, limit, name="records")
        for row in item.rows:
            assert len(row["input_ids"]) <= limit
            assert [label for label in row["labels"] if label != IGNORE_INDEX][-1] == end
            assert item.conversation["messages"][-1]["role"] == "assistant"


def test_a_conversation_whose_first_answer_does_not_fit_is_dropped(tokenizer):
    (item,) = rows.encode_fitting([{"messages": turns(2, words=100)}], tokenizer, 50, name="records")
    assert item.rows == []
    assert not item.is_cut
    assert item.tokens > 50


def test_names_every_conversation_that_cannot_be_tokenised(tokenizer):
    bad = {"messages": [{"role": "user"}]}
    conversations = [{"messages": turns(1)}] * 300 + [bad] + [{"messages": turns(1)}] * 300 + [bad]
    with pytest.raises(DataError, match=r"records\.jsonl: 2 of 602 conversations cannot be tokenised") as caught:
        list(rows.encode_fitting(conversations, tokenizer, 512, name="records.jsonl"))
    numbers = [problem.split(": ")[0] for problem in caught.value.problems]
    assert numbers == ["records.jsonl, conversation 301", "records.jsonl, conversation 602"]


def test_progress_is_printed_only_at_intervals(tokenizer, capsys, monkeypatch):
    conversations = [{"messages": turns(1)}] * 600
    list(rows.encode_fitting(conversations, tokenizer, 512, name="records"))
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(display, "EVERY_S", 0)
    list(rows.encode_fitting(conversations, tokenizer, 512, name="records"))
    assert capsys.readouterr().out.splitlines()[-1] == "records: 600 of 600 conversations tokenised"


def test_stored_rows_are_read_back_in_any_order_and_leave_no_file(tokenizer):
    before = set(workspace.scratch_dir().iterdir())
    conversations = [{"messages": turns(1 + index % 4, words=index)} for index in range(40)]
    stored = rows.tokenise(conversations, tokenizer, 2000, name="records")
    expected = [encode(each["messages"], tokenizer) for each in conversations]
    assert set(workspace.scratch_dir().iterdir()) == before
    assert [ids_and_labels(stored[index]) for index in (39, 0, 17, -1)] == [expected[i] for i in (39, 0, 17, -1)]
    assert list(map(ids_and_labels, stored)) == expected
    assert list(rows.read_column(stored, "length")) == [len(each["input_ids"]) for each in expected]
    learned = [sum(label != IGNORE_INDEX for label in each["labels"]) for each in expected]
    assert list(rows.read_column(stored, "learned")) == learned
    assert list(rows.read_column(stored, "conversation")) == list(range(1, 41))


def test_reports_how_much_is_cut_and_left_out(tokenizer, capsys):
    fits = len(encode(turns(1), tokenizer)["input_ids"])
    conversations = [{"messages": turns(1)}, {"messages": turns(3)}, {"messages": turns(1, words=90)}]
    assert len(rows.tokenise(conversations, tokenizer, fits, name="records")) == 2
    said = capsys.readouterr().out
    assert "records: 1 of 3 conversations cut after an earlier answer and 1 left out" in said
    assert f"more than {fits} tokens.\n" in said


def test_an_error_names_the_limit_if_nothing_fits(tokenizer):
    with pytest.raises(SaigaError, match=r"records: no conversation has an answer within max_seq_length=10 tokens"):
        rows.tokenise([{"messages": turns(1)}], tokenizer, 10, name="records")


def test_a_full_disk_is_an_error_with_the_needed_size(tiny, tmp_path):
    """In its own process, because the limit stays."""
    code = """
import resource
from saigakit.data import rows
resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))
try:
    rows.as_dataset((number, {"input_ids": [1] * 100, "labels": [1] * 100}) for number in range(10_000))
except rows.SaigaError as error:
    print(error)
"""
    environment = {**os.environ, "SAIGAKIT_CACHE": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert re.match(r"The tokenised copy of the records needs 0\.00 GB of disk or more at ", ended.stdout), ended.stderr
    assert "SAIGAKIT_CACHE" in ended.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_very_long_conversation_is_cut_with_few_renderings(tokenizer, monkeypatch):
    rendered = []
    render = template.render
    monkeypatch.setattr(layout.template, "render", lambda *a, **k: rendered.append(1) or render(*a, **k))
    (item,) = rows.encode_fitting([{"messages": turns(60)}], tokenizer, 300, name="records")
    assert item.is_cut
    assert len(rendered) < 2 * 60 + 4 + 2 * 60  # the conversation once, and what is left of it once or twice


def test_each_answer_is_a_row_if_the_final_turn_is_rendered_differently(capsys):
    split = chatml(THOUGHTFUL)
    conversations = [{"messages": turns(2)}, {"messages": turns(1)}]
    stored = rows.tokenise(conversations, split, 500, name="records")
    ends = [encoding.encode_rows([{"messages": turns(count)}], split)[0][-1] for count in (1, 2, 1)]
    assert list(map(ids_and_labels, stored)) == ends
    assert "records: 3 rows of 2 conversations, one for each answer" in capsys.readouterr().out
    shorter = len(ends[1]["input_ids"]) - 1
    stored = rows.tokenise(conversations, split, shorter, name="records")
    assert list(map(ids_and_labels, stored)) == [ends[0], ends[2]]
    assert "1 of 2 conversations cut" in capsys.readouterr().out
    (item, _) = rows.encode_fitting(conversations, split, shorter, name="records")
    assert item.conversation["messages"] == turns(1)


def test_a_final_answer_with_weight_0_does_not_hide_a_cut(tokenizer):
    messages = [
        *turns(2),
        {"role": "user", "content": "слово " * 50},
        {"role": "assistant", "content": "а", "weight": 0},
    ]
    fits = len(encode(messages[:4], tokenizer)["input_ids"])
    (item,) = rows.encode_fitting([{"messages": messages}], tokenizer, fits, name="records")
    assert (item.conversation["messages"], item.is_cut) == (messages[:4], True)
    (item,) = rows.encode_fitting([{"messages": messages}], tokenizer, fits - 1, name="records")
    assert item.conversation["messages"] == messages[:2]


def test_a_conversation_cut_to_a_single_row_is_encoded_as_that_row(capsys):
    """If the template renders the shortened conversation turn by turn, it becomes a single row."""
    only_long_ones = THOUGHTFUL.replace("and loop.last", "and loop.last and messages | length > 4")
    assert only_long_ones != THOUGHTFUL
    tokenizer = chatml(only_long_ones)
    short, long = {"messages": turns(2)}, {"messages": [*turns(2), *turns(1, words=90)]}
    limit = len(encode(short["messages"], tokenizer)["input_ids"])
    (item,) = rows.encode_fitting([long], tokenizer, limit, name="records")
    assert item.conversation == short
    assert item.rows == [encode(short["messages"], tokenizer)]


def test_conversations_without_trained_tokens_are_not_reported_as_long(tokenizer, capsys):
    silent = [{**each, "weight": 0} if each["role"] == "assistant" else each for each in turns(1)]
    assert len(rows.tokenise([{"messages": silent}, {"messages": turns(1)}], tokenizer, 500, name="records")) == 1
    said = capsys.readouterr().out
    assert "records: left out 1 conversation without trained tokens" in said
    assert "longer than" not in said
