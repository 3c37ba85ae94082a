"""Exact match, valid JSON and F1."""

import json

import pytest

from saigakit.evaluate import metrics

PAIR = {"term": "кот", "definition": "домашнее животное"}
OTHER = {"term": "пёс", "definition": "друг человека"}


def text(*items):
    return json.dumps(items, ensure_ascii=False)


@pytest.mark.parametrize(
    "answer", ["", "[", "[{]", "Вот: []", "[] []", "[NaN]", "{'term': 1}", "[" * 100_000, "\ud800"]
)
def test_text_that_is_not_exactly_one_json_value_is_invalid(answer):
    assert not metrics.is_json(answer)


@pytest.mark.parametrize("answer", ["[]", ' [ {"term": "кот"} ]\n', "null", "3"])
def test_any_json_value_is_valid(answer):
    assert metrics.is_json(answer)


def test_whitespace_and_key_order_do_not_matter_for_an_exact_match():
    assert metrics.is_exact('[{"definition":"домашнее животное",  "term":"кот"}]', text(PAIR))


def test_item_order_matters_for_an_exact_match():
    assert not metrics.is_exact(text(PAIR, OTHER), text(OTHER, PAIR))


@pytest.mark.parametrize(
    ("answer", "reference"), [("[]", text(PAIR)), ("[1]", "[true]"), ("кот", '"кот"'), ("", "[]"), ("не JSON", "[]")]
)
def test_different_values_do_not_match_exactly(answer, reference):
    assert not metrics.is_exact(answer, reference)


def test_a_reference_that_is_not_json_is_compared_as_text():
    assert metrics.is_exact(" Привет!\n", "Привет!")


def test_f1_is_computed_over_the_items_of_all_answers():
    answers = [text(PAIR), text(OTHER, {**PAIR, "definition": "животное"})]
    assert metrics.f1(answers, [text(PAIR, OTHER), text(OTHER)]) == pytest.approx(2 * 2 / (3 + 3))


def test_f1_does_not_depend_on_item_order():
    assert metrics.f1([text(PAIR, OTHER)], [text(OTHER, PAIR)]) == 1


def test_f1_is_1_if_there_is_nothing_to_find_and_nothing_is_found():
    assert metrics.f1(["[]", "[]"], ["[]", "[]"]) == 1


def test_an_answer_that_is_not_json_counts_as_one_wrong_item():
    assert metrics.f1(["что?", text(PAIR)], ["[]", text(PAIR)]) == pytest.approx(2 / 3)


def test_a_repeated_item_counts_as_found_once():
    assert metrics.f1([text(PAIR, PAIR)], [text(PAIR)]) == pytest.approx(2 / 3)


def test_items_need_not_be_pairs():
    assert metrics.f1(['["а", 1, [2]]', '{"b": 1}'], ['["а", 1, [2]]', '{"b": 1}']) == 1


def test_shares_are_from_0_to_1():
    found = metrics.shares(["[]", "нет", text(PAIR)], ["[]", "[]", text(OTHER)])
    assert found == pytest.approx({"exact": 1 / 3, "json_valid": 2 / 3, "f1": 0})


CALL, OTHER_CALL = (f'<tool_call>\n{{"name": "find_{name}", "arguments": {{}}}}\n</tool_call>' for name in "ab")


def test_calls_count_where_they_are_due_and_restraint_where_none_is():
    answers = [CALL, CALL, "Нет.", "Да.", f"Нет. {CALL}", "Нет."]
    references = [CALL, OTHER_CALL, CALL, "Нет.", "Нет.", "Нет."]
    found = metrics.shares(answers, references, [True, True, True, False, False, False])
    assert found == pytest.approx({"exact": 2 / 6, "calls": 1 / 3, "restraint": 2 / 3})


def test_restraint_is_not_a_share_of_nothing():
    assert metrics.shares([CALL], [CALL], [True]) == {"exact": 1, "calls": 1}


@pytest.mark.parametrize(
    "form", ['{{"name": "{}", "parameters": {{}}}}', '[TOOL_CALLS] [{{"name": "{}"}}]', "{}({{}})"]
)
def test_calls_are_recognised_in_other_forms(form):
    references = [form.format("find_a"), form.format("get_b"), "Нет."]
    found = metrics.shares([form.format("x"), "Нет.", form.format("find_a")], references, [True, True, False])
    assert found == {"exact": 0, "calls": 0, "restraint": 0}
