"""The template inside a GGUF in another Jinja engine, MiniJinja of Rust: the same text as in jinja2."""

import pytest
import vocabularies

from saigakit import template

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
NAMED = ("SAIGA2", "SAIGA_NEMO", "HERMES_TOOLS", "THINKING", "THINKING_PROMPT", "GEMMA", "FOLDED_SYSTEM", "LLAMA3")
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}


def other_engine():
    other = minijinja.Environment(trim_blocks=True, lstrip_blocks=True, undefined_behavior="chainable", pycompat=True)
    other.add_filter("tojson", template._tojson)  # its own escapes <, >, & and ' as HTML, which chat engines do not
    return other


@pytest.mark.parametrize("conversation", [[USER, ANSWER], [CALLING[1], USER]])
def test_loops_backwards_and_refusals_are_put_in_words_that_every_engine_knows(conversation):
    text = template.for_inference(NESTED)
    assert "raise_exception" not in text
    assert "[::-1]" not in text
    expected = "".join(f"{each['role']} {i}" for i, each in enumerate(reversed(conversation))) + "."
    assert template.render(conversation, text) == expected
    assert other_engine().render_str(text, messages=conversation) == expected


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", [*NAMED, "MISTRAL_TOOLS"])
def test_another_engine_renders_the_same_text(name, conversation, add_generation_prompt):
    messages, tools = CONVERSATIONS[conversation]
    text = template.for_inference(getattr(vocabularies, name))
    given = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt, **VARIABLES}
    expected = template.render(
        messages, text, tools=tools, add_generation_prompt=add_generation_prompt, variables=VARIABLES
    )
    assert other_engine().render_str(text, **given) == expected


def test_the_other_engine_does_not_know_the_generation_tag():
    with pytest.raises(minijinja.TemplateError):
        minijinja.Environment().render_str(vocabularies.HERMES_TOOLS, messages=[ANSWER])
