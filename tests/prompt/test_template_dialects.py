"""Render the template of a GGUF with llama.cpp's Jinja and with MiniJinja: the text must equal jinja2's."""

from pathlib import Path

import llama_cpp_chain
import pytest
import vocabularies

from saigakit.prompt import template
from saigakit.registry import MODELS

minijinja = pytest.importorskip("minijinja")
SYSTEM = {"role": "system", "content": "Ты — Сайга."}
USER = {"role": "user", "content": " Привет 'мир' <b>&\n"}
ANSWER = {"role": "assistant", "content": "Да!"}
FUNCTION = {"name": "find", "description": "что <b>", "parameters": {"properties": {"b": {"type": "string"}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": {"b": "ё'", "a": 1}}}
CALLING = [{"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "42"}]
NESTED = """
{%- if messages[0].role == 'tool' %}{{- raise_exception('no (question) yet') }}{%- endif %}
{%- for message in messages[::-1] %}{{ message.role }} {{ loop.index0 }}{% if loop.last %}.{% endif %}{%- endfor %}"""
CONVERSATIONS = {
    "question": ([USER], None),
    "turns": ([SYSTEM, USER, ANSWER, USER], None),
    "tools": ([SYSTEM, USER, *CALLING, ANSWER, USER], [{"type": "function", "function": FUNCTION}]),
}
SAVE = {"name": "save", "description": "a \"b\" & 'c'", "parameters": {"properties": {"x": {"enum": ["a", "b"]}}}}
ARGUMENTS = {"x": 1.5, "y": [1, {"я": None}], "t": True, "s": 'a"b\n'}
SAVING = {"id": "c2", "type": "function", "function": {"name": "save", "arguments": ARGUMENTS}}
RESULTS = [{"role": "tool", "content": str(number), "tool_call_id": f"c{number}"} for number in (1, 2)]
LLAMA_CPPS = {
    **CONVERSATIONS,
    "many turns": ([SYSTEM, *[USER, ANSWER] * 3, USER], None),
    "empty": ([{"role": "user", "content": ""}, {"role": "assistant", "content": ""}, USER], None),
    "tags": ([{"role": "user", "content": "<s> {{ 7 * 7 }} {% raw %} \\n \x01 🙂"}, ANSWER], None),
    "two calls": (
        [USER, {"role": "assistant", "content": "Ищу", "tool_calls": [CALL, SAVING]}, *RESULTS, ANSWER, USER],
        [{"type": "function", "function": FUNCTION}, {"type": "function", "function": SAVE}],
    ),
}
NAMED = ("SAIGA2", "SAIGA_NEMO", "HERMES_TOOLS", "THINKING", "THINKING_PROMPT", "GEMMA", "FOLDED_SYSTEM", "LLAMA3")
REGISTERED = {spec.template: template.read_chat_template(spec, Path()) for spec in MODELS.values() if spec.template}
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}


def other_engine():
    other = minijinja.Environment(trim_blocks=True, lstrip_blocks=True, undefined_behavior="chainable", pycompat=True)
    other.add_filter("tojson", template._tojson)  # its own escapes <, >, & and ' as HTML, which chat engines do not
    return other


@pytest.mark.parametrize("conversation", [[USER, ANSWER], [CALLING[1], USER]])
def test_reversed_loops_and_refusals_are_rewritten_for_every_engine(conversation):
    text = template.for_inference(NESTED)
    assert "raise_exception" not in text
    assert "[::-1]" not in text
    expected = "".join(f"{each['role']} {i}" for i, each in enumerate(reversed(conversation))) + "."
    assert template.render(conversation, text) == expected
    assert other_engine().render_str(text, messages=conversation) == expected


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", [*NAMED, "MISTRAL_TOOLS"])
def test_minijinja_renders_the_same_text(name, conversation, add_generation_prompt):
    messages, tools = CONVERSATIONS[conversation]
    text = template.for_inference(getattr(vocabularies, name))
    given = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt, **VARIABLES}
    expected = template.render(
        messages, text, tools=tools, add_generation_prompt=add_generation_prompt, variables=VARIABLES
    )
    assert other_engine().render_str(text, **given) == expected


def test_removing_a_conditional_refusal_removes_no_text():
    text = (
        "{{ raise_exception('no') if not messages }}between{{ raise_exception('(a)') }}{{ messages[0].role.strip() }}"
    )
    kept = template.for_inference(text)
    assert template.render([USER], kept) == "betweenuser"
    turned = "{% for m in messages[::-1][1:] %}{{ m.role }}{% endfor %}"
    assert template.render([SYSTEM, USER], template.for_inference(turned)) == "system"


def test_minijinja_does_not_support_the_generation_tag():
    with pytest.raises(minijinja.TemplateError):
        minijinja.Environment().render_str(vocabularies.HERMES_TOOLS, messages=[ANSWER])


def llama_cpps(program, chat_template, messages, tools, add_generation_prompt):
    """Like llama-server, which omits absent values."""
    variables = {"messages": messages, **VARIABLES}
    variables |= {"tools": tools} if tools else {}
    variables |= {"add_generation_prompt": True} if add_generation_prompt else {}
    return llama_cpp_chain.render(program, [{"template": chat_template, "variables": variables}])[0]


@pytest.mark.slow  # compiles llama.cpp's Jinja: half a minute
@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("conversation", LLAMA_CPPS)
def test_llama_cpp_renders_the_same_text(jinja_program, request, conversation, add_generation_prompt):
    messages, tools = LLAMA_CPPS[conversation]
    own = {name: getattr(vocabularies, name) for name in (*NAMED, "MISTRAL_TOOLS")} | REGISTERED
    own["smollm2"] = (request.getfixturevalue("smollm2") / "chat_template.jinja").read_text(encoding="utf-8")
    for name, chat_template in own.items():
        text = template.for_inference(template.with_tools(chat_template))
        options = {"tools": tools, "add_generation_prompt": add_generation_prompt}
        wanted = template.render(messages, text, variables=VARIABLES, **options)
        assert llama_cpps(jinja_program, text, messages, **options) == wanted, name


@pytest.mark.slow
@pytest.mark.parametrize("conversation", [[USER, ANSWER], [CALLING[1], USER]])
def test_llama_cpp_supports_reversed_loops_and_refusals(jinja_program, conversation):
    text = template.for_inference(NESTED)
    assert llama_cpps(jinja_program, text, conversation, None, False) == template.render(conversation, text)


@pytest.mark.slow
def test_llama_cpp_keeps_a_unicode_space_that_jinja2_trims(jinja_program):
    conversation = [{"role": "user", "content": "\u00a0да"}]
    text = "{{ messages[0].content | trim }}"
    assert template.render(conversation, text) == "да"
    assert llama_cpps(jinja_program, text, conversation, None, False) == "\u00a0да"
