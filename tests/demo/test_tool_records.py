"""The records of the demo of function calling."""

import json
from itertools import chain

import pytest

from saigakit.data import records
from saigakit.data.schema import normalise_record
from saigakit.demo import tool_records
from saigakit.demo.tool_records import FUNCTIONS, HELD_OUT
from saigakit.errors import SaigaError
from saigakit.prompt import encoding


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    files = tool_records.write_records(tmp_path_factory.mktemp("records"))
    return [[json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in files]


def calls(record):
    return [call["function"] for call in record["messages"][1].get("tool_calls", ())]


def names(record):
    return [tool["function"]["name"] for tool in record["tools"]]


def request(record):
    return record["messages"][0]["content"]


def test_a_third_is_due_no_call_and_a_tenth_two(made):
    assert list(map(len, made)) == [480, 200]
    for rows in made:
        shares = [sum(len(calls(record)) == count for record in rows) / len(rows) for count in (0, 1, 2)]
        assert shares == pytest.approx([0.35, 0.55, 0.1], abs=0.02)


def test_every_record_is_one_that_is_accepted(made):
    for record in chain(*made):
        assert not isinstance(normalise_record(record), records.BadRecord)
        assert 3 <= len(names(record)) <= 5
        assert len(set(names(record))) == len(names(record))


def test_a_call_is_of_a_tool_with_values_that_the_request_names(made):
    for record in chain(*made):
        for call in calls(record):
            assert call["name"] in names(record)
            assert all(str(value) in request(record) for value in call["arguments"].values())


def test_some_functions_and_half_of_the_values_are_only_in_the_evaluation(made):
    train, held_out = made
    assert not HELD_OUT & set(chain(*map(names, train)))
    called = [call["name"] for record in held_out for call in calls(record)]
    assert 0.15 < sum(name in HELD_OUT for name in called) / len(called) < 0.4
    assert set(called) >= HELD_OUT
    cities = [{call["arguments"].get("city") for record in rows for call in calls(record)} for rows in made]
    assert len(cities[1] - cities[0]) >= 5
    assert not set(map(request, train)) & set(map(request, held_out))


def test_every_part_of_a_held_out_function_is_in_another_one():
    known = [each for each in FUNCTIONS if each.name not in HELD_OUT]
    assert {each.name for each in FUNCTIONS} >= HELD_OUT
    assert {each.action for each in FUNCTIONS} == {each.action for each in known}
    assert {each.thing for each in FUNCTIONS} == {each.thing for each in known}


def test_the_same_records_are_written_again(made, tmp_path):
    first, _ = tool_records.write_records(tmp_path)
    assert [json.loads(line) for line in first.read_text(encoding="utf-8").splitlines()] == made[0]


def test_more_records_than_there_are_sentences_for_are_refused(tmp_path):
    with pytest.raises(SaigaError, match="not enough for 5000 records"):
        tool_records.write_records(tmp_path, held_out=20000)


@pytest.mark.slow
def test_a_prompt_has_about_400_tokens_at_most(made, callers_cache, monkeypatch):
    monkeypatch.setenv("SAIGAKIT_CACHE", str(callers_cache))
    tokenizer = encoding.load_tokenizer("smollm2_135m")
    prompts = [
        encoding.encode(record["messages"][:1], tokenizer, tools=record["tools"], add_generation_prompt=True)
        for record in chain(*made)
    ]
    lengths = [len(prompt["input_ids"]) for prompt in prompts]
    assert max(lengths) <= 425
    assert sum(length > 400 for length in lengths) < 0.02 * len(lengths)
