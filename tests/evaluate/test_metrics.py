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
def test_text_that_is_not_one_json_value_is_invalid(answer):
    assert not metrics.is_json(answer)


@pytest.mark.parametrize("answer", ["[]", ' [ {"term": "кот"} ]\n', "null", "3"])
def test_any_json_value_is_valid(answer):
    assert metrics.is_json(answer)


def test_spaces_and_the_order_of_keys_do_not_matter_to_exactness():
    assert metrics.is_exact('[{"definition":"домашнее животное",  "term":"кот"}]', text(PAIR))


def test_the_order_of_items_matters_to_exactness():
    assert not metrics.is_exact(text(PAIR, OTHER), text(OTHER, PAIR))


@pytest.mark.parametrize(
    ("answer", "reference"), [("[]", text(PAIR)), ("[1]", "[true]"), ("кот", '"кот"'), ("", "[]"), ("не JSON", "[]")]
)
def test_other_values_are_not_exact(answer, reference):
    assert not metrics.is_exact(answer, reference)


def test_a_reference_that_is_no_json_is_compared_as_text():
    assert metrics.is_exact(" Привет!\n", "Привет!")


def test_f1_counts_pairs_over_all_texts_together():
    answers = [text(PAIR), text(OTHER, {**PAIR, "definition": "животное"})]
    assert metrics.f1(answers, [text(PAIR, OTHER), text(OTHER)]) == pytest.approx(2 * 2 / (3 + 3))


def test_f1_does_not_depend_on_the_order_of_items():
    assert metrics.f1([text(PAIR, OTHER)], [text(OTHER, PAIR)]) == 1


def test_nothing_found_where_nothing_is_defined_is_perfect():
    assert metrics.f1(["[]", "[]"], ["[]", "[]"]) == 1


def test_an_unreadable_answer_is_one_wrong_item_even_where_nothing_is_defined():
    assert metrics.f1(["что?", text(PAIR)], ["[]", text(PAIR)]) == pytest.approx(2 / 3)


def test_an_item_said_twice_counts_once():
    assert metrics.f1([text(PAIR, PAIR)], [text(PAIR)]) == pytest.approx(2 / 3)


def test_items_need_not_be_pairs():
    assert metrics.f1(['["а", 1, [2]]', '{"b": 1}'], ['["а", 1, [2]]', '{"b": 1}']) == 1


def test_shares_are_from_0_to_1():
    found = metrics.shares(["[]", "нет", text(PAIR)], ["[]", "[]", text(OTHER)])
    assert found == pytest.approx({"exact": 1 / 3, "json_valid": 2 / 3, "f1": 0})
