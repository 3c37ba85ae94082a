"""Calls in the forms of real templates, accepted and rejected by llguidance, and read back."""

import json
from collections.abc import Iterator

import pytest
import vocabularies
from llguidance import LLMatcher
from matrix import matrix
from tool_templates import FORMS, NO_TEXT_BEFORE, ONE_CALL, QUICK, XML, calling

from saigakit.errors import SaigaError
from saigakit.infer import constraint, extraction, tool_calls, tool_form
from saigakit.prompt import encoding, template

FIND = {
    "name": "найти",
    "description": "Ищет",
    "parameters": {
        "type": "object",
        "properties": {
            "слово": {"type": "string"},
            "where": {
                "type": "object",
                "properties": {"years": {"type": "array", "items": {"type": "integer"}}, "exact": {"type": "boolean"}},
                "required": ["years"],
            },
        },
        "required": ["слово"],
    },
}
NOW = {"name": "find_now"}
TOOLS = [{"type": "function", "function": FIND}, {"type": "function", "function": NOW}]
CALLS = [
    ("найти", {"слово": 'Ёж "в\\тумане"\n— 🎉'}),
    ("найти", {"слово": "x", "where": {"years": [1975, -1], "exact": True}}),
    (
        "найти",
        {"слово": '</s><tool_call></tool_call><|im_end|>[TOOL_CALLS]}, {"name": "find_now"', "where": {"years": []}},
    ),
    ("find_now", {}),
]


class Model:
    """A vocabulary with a template, and the grammar of its answers."""

    def __init__(self, llm, chat_template) -> None:
        if chat_template is not None:
            llm.metadata["tokenizer.chat_template"] = template.for_inference(chat_template)
        encoding.load_gguf_tokenizer.cache_clear()
        self.llm, self.tokenizer = llm, encoding.load_gguf_tokenizer(llm)
        self.form = tool_form.read_form(llm)
        self.vocabulary = constraint._read_vocabulary(llm)
        self.grammar = tool_form.make_grammar(self.form, tool_calls.read_schemas(TOOLS, tool_form.json_rules)[1])

    def trained(self, answer):
        turn = [{"role": "user", "content": "?"}, answer]
        labels = encoding.encode(turn, self.tokenizer, tools=TOOLS)["labels"]
        return [label for label in labels if label != encoding.IGNORE_INDEX][:-1]

    def accepts(self, ids):
        matcher = LLMatcher(self.vocabulary, self.grammar, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    def read(self, ids):
        text, rest = self.form.split(extraction.write(self.llm, ids))
        return text, [(name, arguments) for name, arguments, _ in self.form.read_calls(rest)] if rest else []


@pytest.fixture(scope="module")
def load(request, tmp_path_factory) -> Iterator:
    """Each vocabulary is made once."""
    made = {}

    def get(case):
        if case not in made:
            fixture = vocabularies.source_fixture(vocabularies.CASES[case][0])
            source = request.getfixturevalue(fixture) if fixture else None
            made[case] = vocabularies.pair(case, tmp_path_factory.mktemp("vocabularies"), source).gguf._llm
        return made[case]

    yield get
    for llm in made.values():
        llm.close()


@pytest.fixture(params=matrix(FORMS, QUICK))
def name(request) -> str:
    return request.param


@pytest.fixture
def model(name, load) -> Model:
    case, chat_template = FORMS[name]
    return Model(load(case), chat_template)


def test_calls_as_training_renders_them_are_accepted_and_read_back(model, name):
    several = [[call] for call in CALLS] + ([] if name in ONE_CALL else [CALLS[:2], CALLS])
    for calls in several:
        ids = model.trained(calling(*calls))
        assert model.accepts(ids)
        assert model.read(ids) == ("", calls)


def test_a_text_goes_before_calls_where_the_template_renders_it(model, name):
    if name in NO_TEXT_BEFORE:
        with pytest.raises(SaigaError, match="leaves out"):
            model.trained(calling(CALLS[0], content="Ищу"))
        return
    ids = model.trained(calling(*CALLS[:1], content="Ищу <b>ежа</b>.\n{"))
    assert model.accepts(ids)
    assert model.read(ids) == ("Ищу <b>ежа</b>.\n{", CALLS[:1])


@pytest.mark.parametrize("text", ["Привет, <мир>!\n\n— [1, {}]", "</s><|im_end|> 🎉", 'Пишите так: {"name": "ёж"}'])
def test_a_text_is_accepted_and_read_back(model, text):
    ids = model.trained({"role": "assistant", "content": text})
    assert model.accepts(ids)
    assert model.read(ids) == (text, [])


def test_what_begins_a_call_is_not_in_a_text(model):
    trigger = model.form.trigger
    if token := tool_form.MARK.fullmatch(trigger):
        assert not model.accepts([int(token[1]), *model.tokenizer.encode_text("Да")])
    else:
        assert not model.accepts(model.trained({"role": "assistant", "content": f"{trigger}Да"}))


@pytest.mark.parametrize(
    "call",
    [
        ("найти_всё", {"слово": "x"}),
        ("най", {"слово": "x"}),
        ("найти", {}),
        ("найти", {"слово": 1}),
        ("найти", {"слово": "x", "more": 1}),
        ("найти", {"слово": "x", "where": {"years": ["1975"]}}),
        ("find_now", {"слово": "x"}),
    ],
)
def test_other_names_and_arguments_that_do_not_fit_are_rejected(model, call):
    assert not model.accepts(model.trained(calling(call)))


def test_a_special_token_cannot_be_in_an_argument(model):
    ids = model.trained(calling(CALLS[0]))
    for special in list(model.tokenizer.special_tokens.values())[:12]:
        for position in (len(ids) // 2, len(ids) // 2 + 1):
            assert not model.accepts([*ids[:position], special, *ids[position:]])


def test_what_is_not_the_whole_form_is_rejected(model):
    ids = model.trained(calling(CALLS[0]))
    assert not model.accepts(ids[:-1])
    assert not model.accepts([*ids, *model.tokenizer.encode_text("Ещё")])


def test_a_template_with_another_form_is_refused(load):
    with pytest.raises(SaigaError, match="does not recognise how the chat template"):
        Model(load("qwen_tokens-hermes_tools"), XML)


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=a)b"}}}, "x: .*cannot be held"),
        ({"type": "object", "properties": {"a": {"not": {}}}}, "x: .*cannot be held"),
        ("{", "parameters: is"),
    ],
)
def test_a_function_that_cannot_be_held_is_named(parameters, reason):
    tool = {"type": "function", "function": {"name": "x", "parameters": parameters}}
    with pytest.raises(SaigaError, match=reason):
        tool_calls.read_schemas([*TOOLS, tool], tool_form.json_rules)


def test_arguments_are_an_object_of_known_properties():
    tools = [{"name": "a"}, {"name": "b", "parameters": {"properties": {"x": {"type": "integer"}}}}]
    given, schemas = tool_calls.read_schemas(json.loads(json.dumps(tools)), tool_form.json_rules)
    assert [tool["type"] for tool in given] == ["function"] * 2
    assert {name: (each["type"], each["additionalProperties"]) for name, each in schemas.items()} == {
        "a": ("object", False),
        "b": ("object", False),
    }


@pytest.mark.parametrize(
    ("answer", "text"),
    [("<think>думаю</think>Да.", "Да."), ("<think>думаю", ""), ("Да.", "Да."), ("<think>a</think><think>б", "")],
)
def test_a_thought_is_no_text_even_if_a_limit_cuts_it(answer, text):
    parts = dict.fromkeys(("head", "first", "call", "again", "last"), "")
    marks = {"trigger": "<tool_call>", "keys": {}, "thoughts": ("<think>", "</think>")}
    form = tool_form.ToolForm(**parts, **marks, is_after_text=True)
    assert form.split(answer) == (text, "")
    assert form.split(f"{answer}<tool_call>{{}}")[1] == "<tool_call>{}"
