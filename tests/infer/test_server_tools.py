"""Calls and values from the server with a model that follows a script, in the forms of real templates."""

import json
from contextlib import closing

import jsonschema
import openai
import pytest
import scripted_gguf
import vocabularies
from matrix import matrix
from starlette.testclient import TestClient
from tool_templates import FORMS, NO_TEXT_BEFORE, ONE_CALL, XML, calling

from saigakit.infer import chat_request, server
from saigakit.prompt import encoding, template
from saigakit.prompt.backends import gguf_vocabulary

WEATHER = {
    "type": "object",
    "properties": {"город": {"type": "string"}, "scale": {"enum": ["c d", "f"]}, "days": {"type": "integer"}},
    "required": ["город", "scale"],
}
TOOLS = [
    {"type": "function", "function": {"name": "погода", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "время"}},
]
QUESTION = [{"role": "user", "content": "Как в Омске?"}]
OMSK = ("погода", {"город": 'Ом"ск в 1975 </tool_call>[TOOL_CALLS]', "scale": "c d"})
TIME = ("время", {})
QUICK = {"saiga2 with the fallback"}


@pytest.fixture(scope="module")
def load(request, tmp_path_factory):
    """The file of a vocabulary, and its template."""

    def get(name):
        case, chat_template = FORMS[name]
        fixture = vocabularies.source_fixture(vocabularies.CASES[case][0])
        source = request.getfixturevalue(fixture) if fixture else None
        pair = vocabularies.pair(case, tmp_path_factory.mktemp("vocabularies"), source)
        with closing(pair.gguf._llm) as llm:
            own = llm.metadata["tokenizer.chat_template"]
        return pair.tokenizer_dir / "vocabulary.gguf", template.for_inference(chat_template or own)

    return get


@pytest.fixture(params=matrix(FORMS, QUICK), scope="module")
def name(request):
    return request.param


@pytest.fixture(scope="module")
def form(name, load):
    return load(name)


def read(llm, **options):
    return chat_request.read(json.dumps({"messages": QUESTION, **options}).encode(), llm, 900)


def trained(tokenizer, answer):
    """The tokens of an answer, as training renders it, or of a text."""
    if isinstance(answer, str):
        return tokenizer.encode_text(answer)
    labels = encoding.encode([*QUESTION, answer], tokenizer, tools=TOOLS)["labels"]
    return [label for label in labels if label != encoding.IGNORE_INDEX][:-1]


@pytest.fixture
def ask(form, tmp_path, one_thread):
    """Ask a model that prefers `answer`."""
    file, chat_template = form

    def asking(answer, **options):
        options = {"temperature": 0, "tools": TOOLS, **options}
        options = {key: value for key, value in options.items() if value is not None}
        with gguf_vocabulary(file) as llm:
            llm.metadata["tokenizer.chat_template"] = chat_template
            encoding.load_gguf_tokenizer.cache_clear()
            plain = {key: value for key, value in options.items() if key != "stream"}
            prompt = read(llm, **plain).settings["prompt"]
            tokenizer = encoding.load_gguf_tokenizer(llm)
            tokens = [*trained(tokenizer, answer), min(encoding.end_of_turn_ids(tokenizer))]
            scripted = scripted_gguf.write(file, tmp_path / "scripted.gguf", len(prompt), tokens, chat_template)
            app = server._Service(scripted, llm, 900, 1).application()
            client = openai.OpenAI(base_url="http://x/v1", api_key="x", max_retries=0, http_client=TestClient(app))
            found = client.chat.completions.create(model="x", messages=QUESTION, **options)
            return list(found) if options.get("stream") else found.choices[0]

    return asking


def made(choice):
    calls = choice.message.tool_calls or ()
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls]


def test_calls_are_parsed(ask, name):
    several = [OMSK] if name in ONE_CALL else [OMSK, TIME, OMSK]
    choice = ask(calling(*several))
    assert made(choice) == several
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "")
    assert len({call.id for call in choice.message.tool_calls}) == len(several)
    assert {call.type for call in choice.message.tool_calls} == {"function"}


def test_a_text_is_no_call(ask):
    choice = ask({"role": "assistant", "content": "Тепло < 7, [5] <b>да</b>."})
    assert (choice.message.content, choice.finish_reason) == ("Тепло < 7, [5] <b>да</b>.", "stop")
    assert choice.message.tool_calls is None


def test_a_call_that_has_begun_is_held_to_the_schema(ask):
    choice = ask(calling(("погода", {"town": 5})), max_tokens=300)
    if choice.finish_reason == "tool_calls":  # perhaps more than one: off its script the model may go on to another
        calls = made(choice)
        assert calls[0][0] == "погода"
        for called, arguments in calls:
            assert called in ("погода", "время")
            jsonschema.validate(arguments, WEATHER if called == "погода" else {"type": "object", "maxProperties": 0})
    else:  # a model without an end writes into a string without an end
        assert (choice.finish_reason, choice.message.tool_calls) == ("length", None)


def test_a_call_that_is_cut_is_no_call(ask):
    choice = ask(calling(OMSK), max_tokens=16)
    assert (choice.finish_reason, choice.message.tool_calls, choice.message.content) == ("length", None, "")


def test_a_stream_has_the_text_first_and_the_calls_at_once(ask, name):
    text = "" if name in NO_TEXT_BEFORE else "Смотрю: 5 < 7"
    choices = [chunk.choices[0] for chunk in ask(calling(OMSK, content=text), stream=True) if chunk.choices]
    assert "".join(choice.delta.content for choice in choices) == text
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["tool_calls"]
    [[call]] = [choice.delta.tool_calls for choice in choices if choice.delta.tool_calls]
    assert (call.index, call.function.name, json.loads(call.function.arguments)) == (0, *OMSK)


def test_without_a_choice_there_is_no_call(ask):
    choice = ask({"role": "assistant", "content": "Тепло"}, tool_choice="none")
    assert choice.message.content.endswith("Тепло")  # perhaps after a thought
    assert choice.message.tool_calls is None


def test_after_calls_a_text_or_a_value_can_be_asked_for(load, one_thread):
    file, chat_template = load("qwen")
    call = {"id": "call00001", "type": "function", "function": {"name": "время", "arguments": "{}"}}
    turns = [*QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}]
    turns += [{"role": "tool", "tool_call_id": "call00001", "name": "время", "content": "12:00"}]
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": WEATHER}}
    with gguf_vocabulary(file) as llm:
        llm.metadata["tokenizer.chat_template"] = chat_template
        encoding.load_gguf_tokenizer.cache_clear()
        for further in ({}, {"response_format": format}):
            asked = read(llm, messages=turns, tools=TOOLS, tool_choice="none", **further)
            assert asked.form is None
            assert ("grammar" in asked.settings) == bool(further)


def test_a_value_has_the_separators_and_the_words_of_the_schema(ask):
    value = {"город": "Омск в 1975", "scale": "c d", "days": 3}
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": WEATHER}}
    for written in (json.dumps(value, ensure_ascii=False), json.dumps(value, ensure_ascii=False, indent=8)):
        choice = ask(written, tools=None, response_format=format)
        if choice.finish_reason == "stop":
            assert choice.message.content == json.dumps(json.loads(choice.message.content), ensure_ascii=False)
            jsonschema.validate(json.loads(choice.message.content), WEATHER)


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"properties": {"a": {"type": "string", "x-quote": True}}}, "x-quote is only for"),
        ({"properties": {"a": {"type": "array", "maxItems": 10**9}}}, "maxItems"),
        ({"properties": {"a": {"not": {}}}}, "cannot be held"),
        ({"properties": {"a": {"type": "string", "pattern": "["}}}, "regex"),
        ({"properties": {"a": 5}}, "not a JSON schema"),
    ],
)
def test_what_cannot_be_held_is_refused(form, parameters, reason):
    file, chat_template = form
    with gguf_vocabulary(file) as llm:
        llm.metadata["tokenizer.chat_template"] = chat_template
        encoding.load_gguf_tokenizer.cache_clear()
        tools = [{"type": "function", "function": {"name": "x", "parameters": parameters}}]
        format = {"type": "json_schema", "json_schema": {"schema": parameters}}
        for param, value in (("tools", tools), ("response_format", format)):
            with pytest.raises(chat_request.RefusedError, match=reason) as refused:
                read(llm, **{param: value})
            assert (refused.value.status, refused.value.content["error"]["param"]) == (400, param)


def test_a_template_with_another_form_is_refused(load):
    file, _ = load("qwen")
    with gguf_vocabulary(file) as llm:
        llm.metadata["tokenizer.chat_template"] = template.for_inference(XML)
        encoding.load_gguf_tokenizer.cache_clear()
        with pytest.raises(chat_request.RefusedError, match="does not recognise how the chat template"):
            read(llm, tools=TOOLS)
