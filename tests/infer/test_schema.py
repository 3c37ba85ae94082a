"""Grammars of JSON schemas, read by llguidance itself with the vocabulary of the tiny Saiga."""

import json

import pytest
from llguidance import LLMatcher

from saigakit.errors import SaigaError
from saigakit.infer import constraint
from saigakit.infer.schema import find_quotes, make_grammar, read_schema

TEXT = 'Азот — газ "без цвета", C:\\temp.\nКислород — тоже газ.'
TERM = {"type": "string", "x-quote": True}
PAIR = {"type": "object", "properties": {"term": TERM, "definition": TERM}, "required": ["term", "definition"]}
PAIRS = {"type": "array", "items": PAIR}


@pytest.fixture(scope="module")
def fits(llm):
    """Whether a text is a complete answer by the grammar of a schema."""
    vocabulary = constraint._read_vocabulary(llm)

    def check(schema, answer, *, text=TEXT, quotes=(), prefix="", separators=(", ", ": ")):
        written = prefix + json.dumps(answer, ensure_ascii=False, separators=separators)
        matcher = LLMatcher(vocabulary, make_grammar(read_schema(schema, quotes), text, prefix), log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        ids = vocabulary.tokenize_str(written)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    return check


@pytest.mark.parametrize(
    "words",
    [
        "Азот",
        "газ",
        'газ "без цвета"',
        "C:\\temp",
        "temp.\nКислород",
        '"',
        'без цвета", C:\\temp.\nКислород — тоже газ.',
    ],
)
def test_a_quotation_is_any_run_of_words_of_the_text(fits, words):
    assert words in TEXT
    assert fits(TERM, words) == (words == words.strip())


@pytest.mark.parametrize(
    "words", ["", " ", "Азо", "азот", "зот", "газ газ", " газ", "газ ", "\nКислород", "temp.\n", "Азот газ"]
)
def test_other_words_are_no_quotation(fits, words):
    assert not fits(TERM, words)


def test_a_text_of_control_characters_is_quoted_as_json_writes_it(fits):
    text = "а\tб\u0000в\u001fг \u2028д\u00a0е"
    assert fits(TERM, "а\tб\u0000в\u001fг", text=text)
    assert fits(TERM, "г \u2028д\u00a0е", text=text)
    assert not fits(TERM, "\tб", text=text)


def test_an_answer_has_the_order_and_the_separators_of_the_training_records(fits):
    good = [{"term": "Азот", "definition": "газ"}, {"term": "Кислород", "definition": "тоже газ"}]
    assert fits(PAIRS, []) and fits(PAIRS, good[:1]) and fits(PAIRS, good)
    assert not fits(PAIRS, good, separators=(",", ":"))
    assert not fits(PAIRS, [{"definition": "газ", "term": "Азот"}])
    assert not fits(PAIRS, [{"term": "Азот"}])
    assert not fits(PAIRS, [{"term": "Азот", "definition": "газ", "more": "газ"}])


def test_a_field_that_is_no_quotation_is_free(fits):
    schema = {**PAIR, "properties": {"term": {"type": "string"}, "definition": TERM}}
    assert fits(schema, {"term": "азоту", "definition": "газ"})
    assert not fits(schema, {"term": "азоту", "definition": "газу"})


def test_properties_are_marked_by_their_names_too(fits):
    plain = {
        "type": "object",
        "properties": {"tags": {"type": "array", "items": {"type": "string"}}},
        "required": ["tags"],
    }
    assert fits(plain, {"tags": ["что угодно"]})
    assert fits(plain, {"tags": ["Азот", "газ"]}, quotes=["tags"])
    assert not fits(plain, {"tags": ["что угодно"]}, quotes=["tags"])
    with pytest.raises(SaigaError, match=r"no property 'tag'.*Did you mean 'tags'"):
        read_schema(plain, ["tag"])


@pytest.mark.parametrize(("least", "most"), [(0, None), (1, None), (2, 2), (0, 0), (0, 1), (1, 3)])
def test_the_number_of_items_is_held(fits, least, most):
    schema = {"type": "array", "items": TERM, "minItems": least} | ({} if most is None else {"maxItems": most})
    for count in range(5):
        assert fits(schema, ["газ"] * count) == (least <= count <= (9 if most is None else most))


def test_optional_and_nullable_properties(fits):
    names = {"a": TERM, "b": {**TERM, "type": ["string", "null"]}, "c": {"type": "integer"}}
    schema = {"type": "object", "properties": names, "required": ["b"]}
    for answer in ({"b": None}, {"a": "газ", "b": "газ"}, {"b": "газ", "c": 7}, {"a": "газ", "b": None, "c": -1}):
        assert fits(schema, answer), answer
    for answer in ({}, {"a": "газ"}, {"c": 1, "b": None}, {"a": None, "b": None}):
        assert not fits(schema, answer), answer
    empty = {"type": "object", "properties": {"a": TERM, "b": TERM}}
    assert all(fits(empty, answer) for answer in ({}, {"a": "газ"}, {"b": "газ"}, {"a": "газ", "b": "газ"}))


def test_a_pydantic_model_is_a_schema(fits):
    pydantic = pytest.importorskip("pydantic")

    class Item(pydantic.BaseModel):
        term: str = pydantic.Field(json_schema_extra={"x-quote": True})
        parts: list["Item"] = pydantic.Field(default_factory=list)
        note: str | None = None

    good = {"term": "Азот", "parts": [{"term": "газ", "parts": [], "note": None}], "note": "свободно"}
    assert fits(list[Item], [good]) and fits(Item, {"term": "газ"})
    assert not fits(list[Item], [{**good, "term": "Азота"}])
    assert not fits(list[Item], [{**good, "parts": [{"term": "Азота"}]}])
    assert [each["path"] for each in find_quotes(read_schema(list[Item]), [good], TEXT)] == [
        "/0/term",
        "/0/parts/0/term",
    ]


PLAIN = {"type": "string"}


@pytest.mark.parametrize(
    "definition",
    [
        {"anyOf": [PLAIN, {"type": "null"}], "x-quote": True},
        {"anyOf": [{"$ref": "#/$defs/word"}, {"type": "array", "items": PLAIN}], "x-quote": True},
        {"$ref": "#/$defs/word", "x-quote": True},
        {"type": "array", "items": PLAIN, "x-quote": True},
        {"type": "array", "items": {"anyOf": [PLAIN, {"type": "integer"}]}, "x-quote": True},
        {"type": ["string", "null"], "x-quote": True},
    ],
)
def test_a_mark_around_strings_is_one_of_each_of_them(fits, definition):
    schema = {"type": "object", "properties": {"a": definition}, "required": ["a"], "$defs": {"word": PLAIN}}
    unmarked = {**schema, "properties": {"a": {**definition, "x-quote": False}}}
    wrap = (lambda text: [text]) if "array" in str(definition.get("type")) else (lambda text: text)
    for given, quotes in ((schema, ()), (unmarked, ["a"])):
        assert fits(given, {"a": wrap("газ")}, quotes=quotes)
        assert not fits(given, {"a": wrap("газы")}, quotes=quotes)


def test_an_optional_field_of_a_pydantic_model_can_be_a_quotation(fits):
    pydantic = pytest.importorskip("pydantic")

    class Item(pydantic.BaseModel):
        definition: str | None = None

    assert fits(Item, {"definition": None}, quotes=["definition"])
    assert fits(Item, {"definition": "газ"}, quotes=["definition"])
    assert not fits(Item, {"definition": "выдумка"}, quotes=["definition"])


@pytest.mark.parametrize(
    "schema",
    [{"type": "integer"}, PAIR, {"$ref": "#/$defs/pair"}, {"anyOf": [{"type": "null"}]}, {"type": "array"}, True],
)
def test_a_mark_where_there_is_no_string_is_refused(schema):
    root = {"type": "object", "properties": {"a": schema}, "$defs": {"pair": PAIR}}
    with pytest.raises(SaigaError, match="'a' is no free string in the schema"):
        read_schema(root, ["a"])
    if isinstance(schema, dict) and schema != {"type": "integer"}:
        with pytest.raises(SaigaError, match="x-quote stands where there is no string"):
            read_schema({**root, "properties": {"a": {**schema, "x-quote": True}}})


def test_a_value_of_another_choice_is_no_quotation():
    schema = {"anyOf": [TERM, {"enum": ["нет"]}]}
    assert find_quotes(schema, "нет", TEXT) == []
    assert find_quotes(schema, "газ", TEXT) == [{"path": "", "start": 7, "end": 10}]


@pytest.mark.parametrize(
    "schema",
    [{"type": "array", "items": True}, {"properties": {"a": True}}, {"$ref": "#/$defs/any", "$defs": {"any": {}}}],
)
def test_what_may_be_anything_has_no_quotations(schema):
    for value in ([1], {"a": "газ"}, "газ"):
        assert find_quotes(schema, value, TEXT) == []


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({**TERM, "minLength": 3}, "minLength cannot be held"),
        ({**TERM, "enum": ["газ"]}, "enum cannot be held"),
        ({**PAIRS, "uniqueItems": True}, "uniqueItems cannot be held"),
        ({**PAIR, "additionalProperties": {"type": "string"}}, "additionalProperties cannot be held"),
        ({**PAIR, "patternProperties": {"a": TERM}}, "patternProperties cannot be held"),
        ({"type": "object", "properties": {"list": {**PAIRS, "contains": PAIR}}}, "the schema, list: contains cannot"),
        ({"oneOf": [TERM, {"type": "integer"}]}, "oneOf cannot be held"),
        ({"type": "array", "items": {"$ref": "#/$defs/no"}}, r"\$ref '#/\$defs/no' is not in the schema"),
        ({"$ref": "https://example.org/schema"}, "Only references inside it"),
    ],
)
def test_what_cannot_be_held_around_a_quotation_is_refused_with_its_keyword(schema, reason):
    with pytest.raises(SaigaError, match=reason):
        make_grammar(read_schema(schema), TEXT)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "(?=a)b"},
        {"not": {"type": "string"}},
        {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
        {"$ref": "https://example.org/schema"},
        {"type": "string", "format": "no such format"},
    ],
)
def test_what_llguidance_cannot_hold_is_refused_before_the_first_token(llm, schema):
    with pytest.raises(SaigaError, match=r"cannot be held|Only references inside it"):
        constraint.Constraint(llm, make_grammar(read_schema(schema), TEXT))


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "arrray"}, r"not a JSON schema: \$\.type: 'arrray'"),
        ({"type": "object", "properties": {"a": "string"}}, r"not a JSON schema: \$\.properties\.a"),
        ([{"type": "string"}], "neither a JSON schema nor a type that pydantic knows"),
        ({"type": {1, 2}}, "neither a JSON schema nor a type that pydantic knows"),
    ],
)
def test_what_is_no_schema_is_one_sentence(schema, reason):
    with pytest.raises(SaigaError, match=reason):
        read_schema(schema)


def test_names_of_properties_are_no_keywords(fits):
    names = {"properties": TERM, "$ref": TERM, "x-quote": {"type": "integer"}, "anything": True}
    schema = {"type": "object", "properties": names, "required": list(names)}
    assert fits(schema, {"properties": "газ", "$ref": "Азот", "x-quote": 3, "anything": [None]})
    assert not fits(schema, {"properties": "газ", "$ref": "азот", "x-quote": 3, "anything": 1})
    assert fits({"type": "array", "items": {"const": {"properties": 1}}}, [{"properties": 1}])
    with pytest.raises(SaigaError, match="'anything' is no free string"):
        read_schema(schema, ["anything"])


def test_an_object_is_closed_unless_its_schema_says_otherwise(fits):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    assert fits(schema, {"a": 1})
    assert not fits(schema, {"a": 1, "b": 2})
    assert fits({**schema, "additionalProperties": True}, {"a": 1, "b": 2})


def test_an_answer_begins_as_the_template_makes_it_begin(llm):
    assert make_grammar(read_schema(PAIRS), TEXT, " ").startswith('start: " " "["')


def test_quotations_are_found_where_they_are_whole_words():
    text = "Газом газ. Газ газ"
    schema = read_schema({"type": "array", "items": TERM})
    spans = [(each["start"], each["end"]) for each in find_quotes(schema, ["газ", "газ", "газ", "Газ"], text)]
    assert [text[start:end] for start, end in spans] == ["газ", "газ", "газ", "Газ"]
    assert spans == [(6, 9), (15, 18), (15, 18), (11, 14)]


def test_a_path_is_a_json_pointer():
    schema = {"type": "object", "properties": {"a/b~c": {"type": "array", "items": TERM}}, "required": ["a/b~c"]}
    assert find_quotes(read_schema(schema), {"a/b~c": ["газ"]}, TEXT) == [{"path": "/a~1b~0c/0", "start": 7, "end": 10}]
