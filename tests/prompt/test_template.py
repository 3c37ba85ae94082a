"""Render like transformers, and inside a sandbox."""

import json

import pytest

from saigakit.errors import SaigaError
from saigakit.prompt import template
from saigakit.registry import MODELS, ModelSpec

MESSAGES = [
    {"role": "system", "content": "Ты — Сайга."},
    {"role": "user", "content": "Привет"},
    {"role": "assistant", "content": "Здравствуй!"},
]
SAIGA2 = "<s>system\nТы — Сайга.</s>\n<s>user\nПривет</s>\n<s>bot\nЗдравствуй!</s>\n"
# Loops with blanks around their tags, `loop` variables, break, tojson and raise_exception: what real templates use.
INVOLVED = """{{ bos_token }}
{%- for message in messages %}
    {%- if message.role == 'stop' %}
        {%- break %}
    {%- endif %}
    {%- if message.role == 'assistant' %}
        {%- generation %}
{{ message.content | tojson }}
        {%- endgeneration %}
    {%- else %}
{{ message.role }}: {{ message.content | trim }}{{ '' if loop.last else ';' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
!
{%- endif %}
"""


def directory_spec() -> ModelSpec:
    return ModelSpec(name="mine", base_model="mine")


def test_saiga2_is_rendered_as_in_its_training():
    chat_template = template.read_chat_template(MODELS["saiga2_7b"], None)
    assert template.render(MESSAGES, chat_template) == SAIGA2
    prompt = template.render(MESSAGES[:2], chat_template, add_generation_prompt=True)
    assert SAIGA2.startswith(prompt)
    assert prompt.endswith("<s>bot\n")


@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_the_rendered_text_matches_transformers(add_generation_prompt):
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [*MESSAGES, {"role": "user", "content": "  <b>Ещё</b> \n"}, {"role": "stop", "content": ""}]
    theirs, _ = render_jinja_template(
        [messages], chat_template=INVOLVED, add_generation_prompt=add_generation_prompt, bos_token="<s>"
    )
    ours = template.render(
        messages, INVOLVED, add_generation_prompt=add_generation_prompt, variables={"bos_token": "<s>"}
    )
    assert ours == theirs[0]


def test_the_generation_tag_renders_its_content():
    text = "{% for m in messages %}{% generation %}[{{ m.content }}]{% endgeneration %}{% endfor %}"
    assert template.render(MESSAGES[1:], text) == "[Привет][Здравствуй!]"


def test_raise_exception_becomes_a_saiga_error():
    with pytest.raises(SaigaError, match="refuses this conversation: Roles must alternate"):
        template.render(MESSAGES, "{{ raise_exception('Roles must alternate') }}")


@pytest.mark.parametrize("text", ["{{ ''.__class__ }}", "{{ raise_exception.__globals__ }}", "{{ cycler.__init__ }}"])
def test_a_template_cannot_reach_python_internals(text):
    assert template.render(MESSAGES, text) == ""


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.append(1) }}",
    ],
)
def test_rejects_a_template_that_tries_to_leave_the_sandbox(text):
    with pytest.raises(SaigaError, match="cannot render"):
        template.render(MESSAGES, text)


@pytest.mark.parametrize(
    "text", ["{% for m in messages %}", "{{ messages[7].content }}", "{{ 'a' + none }}", "{{ x() }}"]
)
def test_a_broken_template_is_a_saiga_error(text):
    with pytest.raises(SaigaError, match="The chat template cannot render this conversation"):
        template.render(MESSAGES, text)


def test_contents_are_neither_escaped_nor_rendered():
    message = {"role": "user", "content": "{{ 7 * 7 }} <b>&amp;</b> {% raw %}"}
    assert template.render([message], "{{ messages[0].content }}") == message["content"]


def test_the_registrys_template_takes_precedence(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("theirs", encoding="utf-8")
    assert "bot" in template.read_chat_template(MODELS["saiga2_7b"], tmp_path)


def test_reads_the_template_file_of_the_tokenizer(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("из файла", encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "из настроек"}', encoding="utf-8")
    assert template.read_chat_template(directory_spec(), tmp_path).endswith("из файла")


@pytest.mark.parametrize(
    "value", ["plain", [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]]
)
def test_reads_the_template_in_the_tokenizer_config(tmp_path, value):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}), encoding="utf-8")
    assert template.read_chat_template(directory_spec(), tmp_path).endswith("plain")


@pytest.mark.parametrize("config", [None, {}, {"chat_template": [{"name": "rag", "template": "x"}]}])
def test_rejects_a_model_without_a_template(tmp_path, config):
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(SaigaError, match=r"has no chat template.*mine has none.*instruction-tuned"):
        template.read_chat_template(directory_spec(), tmp_path)


CALL = {"id": "1", "type": "function", "function": {"name": "найти", "arguments": {"что": "</s>", "раз": 2}}}
TOOLS = [{"type": "function", "function": {"name": "найти", "parameters": {"type": "object"}}}]


def test_a_row_of_a_dataset_becomes_the_messages_and_tools_it_was_made_of():
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    text = json.dumps(CALL["function"]["arguments"], ensure_ascii=False)
    as_text = {**CALL, "id": None, "function": {"name": "найти", "arguments": text}}
    row = [
        {**MESSAGES[1], "tool_calls": None, "weight": None},
        {**called, "tool_calls": [as_text], "weight": None},
    ]
    without_id = {key: value for key, value in CALL.items() if key != "id"}
    expected = [MESSAGES[1], {**called, "tool_calls": [without_id]}]
    assert template.decode_row(row, json.dumps(TOOLS)) == (expected, TOOLS)
    assert row[1]["tool_calls"] == [as_text]  # the row itself is not changed


@pytest.mark.parametrize("calls", [[CALL["function"]], ["найти"], [{"function": "найти"}]])
def test_calls_of_another_shape_are_left_to_the_template(calls):
    messages = [{"role": "assistant", "content": "", "tool_calls": calls}]
    assert template.decode_row(messages, TOOLS) == (messages, TOOLS)


@pytest.mark.parametrize(("arguments", "tools", "name"), [("{bad", TOOLS, "arguments"), ({}, "[bad", "tools")])
def test_text_that_is_not_json_is_refused_with_its_name(arguments, tools, name):
    calls = [{"type": "function", "function": {"name": "найти", "arguments": arguments}}]
    with pytest.raises(SaigaError, match=f"^{name} is not valid JSON"):
        template.decode_row([{"role": "assistant", "content": "", "tool_calls": calls}], tools)
