"""Schemas of records."""

import json

import jsonschema
import pytest

from saigakit import infer
from saigakit.errors import SaigaError
from saigakit.prompt.questions import Question


def question(text, answer):
    written = answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
    return Question([{"role": "user", "content": text}], {"role": "assistant", "content": written})


def guess(*pairs):
    return infer.guess_schema([question(text, answer) for text, answer in pairs])


def test_the_terms_of_a_text_are_quotations_in_the_order_of_the_records():
    schema = guess(
        ("Азот — газ.", [{"term": "Азот", "definition": "газ"}]),
        ("Нет определений.", []),
        (
            "Кот — это зверь, а кит — рыба.",
            [{"term": "Кот", "definition": "зверь"}, {"term": "кит", "definition": "рыба"}],
        ),
    )
    words = {"type": "string", "x-quote": True}
    pair = {"type": "object", "properties": {"term": words, "definition": words}, "required": ["term", "definition"]}
    assert schema == {"type": "array", "items": pair}
    assert list(schema["items"]["properties"]) == ["term", "definition"]


def test_a_word_in_another_form_makes_the_property_free():
    schema = guess(
        ("Об азоте: газ.", {"term": "азот", "kind": "газ"}), ("Азот — газ.", {"term": "Азот", "kind": "газ"})
    )
    assert schema["properties"] == {"term": {"type": "string"}, "kind": {"type": "string", "x-quote": True}}


def test_part_of_a_word_is_no_quotation():
    assert "x-quote" not in guess(("Газом", "Газ".join('""')))


def test_a_property_that_is_not_everywhere_is_optional_and_types_are_joined():
    schema = guess(("а", {"n": 1, "t": None}), ("б", {"n": 2.5}), ("в", {"n": 3, "t": "а"}), ("г", {"n": 4, "t": True}))
    assert schema["required"] == ["n"]
    assert schema["properties"]["n"] == {"type": "number"}
    kinds = [each["type"] for each in schema["properties"]["t"]["anyOf"]]
    assert sorted(kinds) == ["boolean", "null", "string"]
    for answer in ({"n": 1, "t": None}, {"n": 2.5}, {"n": 4, "t": True}):
        jsonschema.validate(answer, schema)


def test_empty_lists_only():
    assert guess(("а", []), ("б", [])) == {"type": "array", "maxItems": 0}


def test_answers_in_words_have_no_schema():
    with pytest.raises(SaigaError, match=r"'Да, конечно' is not JSON"):
        guess(("а", "[]"), ("б", "Да, конечно"))


def test_an_answer_by_a_guessed_schema_fits_it(llm):
    schema = guess(("Азот — газ.", {"term": "Азот"}), ("Кот — зверь.", {"term": "Кот"}))
    assert infer.extract(llm, "Кит — рыба.", schema)["term"] in "Кит — рыба."
