"""Render like transformers, and inside a sandbox."""

import json
from pathlib import Path

import pytest
from chatml import CHATML

from saigakit.errors import SaigaError
from saigakit.prompt import encoding, template
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
        "{% include '../secret' %}",
        "{% import '/etc/passwd' as secret %}{{ secret }}",
    ],
)
def test_rejects_a_template_that_tries_to_leave_the_sandbox(text):
    with pytest.raises(SaigaError, match="cannot render"):
        template.render(MESSAGES, text)


NESTED_TOO_DEEPLY = "{% for m in messages %}" * 25 + "{% endfor %}" * 25  # for Python, when it is rendered
WITHOUT_MEANING = [
    *("{% for m in messages %}", "{{ 'a' | unknown }}", "{% unknown %}"),
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
]


@pytest.mark.parametrize(
    "text",
    [
        *(*WITHOUT_MEANING, "{{ messages[7].content }}", "{{ 'a' + none }}", "{{ x() }}", "{{ 1 is unknown }}"),
        *("{{ 3 | dictsort }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ 'a' * 10**15 }}"),
        NESTED_TOO_DEEPLY,
    ],
)
def test_a_broken_template_is_a_saiga_error(text):
    with pytest.raises(SaigaError, match="The chat template cannot render this conversation"):
        template.render(MESSAGES, text)


@pytest.mark.parametrize("text", WITHOUT_MEANING)
def test_a_template_that_cannot_be_compiled_is_broken_before_tools_are_added(text):
    with pytest.raises(SaigaError, match=r"The chat template is broken: .") as caught:
        template.with_tools(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{{ 'a' | unknown }}", "{{ 1 is unknown }}", "{{ unknown() }}"])
def test_a_base_with_a_broken_template_is_a_saiga_error(tiny, tmp_path, text):
    for file in ("config.json", "tokenizer.model"):
        (tmp_path / file).write_bytes((tiny / "base" / file).read_bytes())
    (tmp_path / "chat_template.jinja").write_text(text, encoding="utf-8")
    with pytest.raises(SaigaError, match=r"The chat template .*unknown"):
        encoding.load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_damaged_file_with_the_template_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"chat_template": "\xff"')
    with pytest.raises(SaigaError, match=rf"{name} is (missing or )?damaged"):
        template.read_chat_template(directory_spec(), tmp_path)


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


def test_a_packaged_template_or_a_file_replaces_the_models_own(tmp_path):
    own = tmp_path / "own.jinja"
    own.write_text("из файла", encoding="utf-8")
    for spec in (directory_spec(), MODELS["saiga2_7b"]):
        assert template.read_chat_template(spec, tmp_path, str(own)).endswith("из файла")
        assert template.read_chat_template(spec, tmp_path, "chatml").endswith(CHATML_ROWS)
    saiga2 = template.read_chat_template(MODELS["saiga2_7b"], tmp_path)
    assert template.read_chat_template(directory_spec(), tmp_path, "saiga2") == saiga2


CHATML_ROWS = template._packaged("chatml")


@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_the_packaged_chatml_renders_as_chatml(add_generation_prompt):
    options = {"add_generation_prompt": add_generation_prompt}
    assert template.render(MESSAGES, CHATML_ROWS, **options) == template.render(MESSAGES, CHATML, **options)


@pytest.mark.parametrize("name", ["hermes", "нет", "../x", ""])
def test_rejects_an_unknown_template_and_lists_the_packaged_ones(tmp_path, name):
    with pytest.raises(SaigaError, match=r"Give .*saiga2 or chatml|chat_template: saiga2, chatml or a file"):
        template.read_chat_template(directory_spec(), tmp_path, name)


def test_every_packaged_template_but_the_one_for_tools_can_be_chosen():
    files = {file.stem for file in Path(template.__file__).with_name("templates").iterdir()}
    assert files == {*template.PACKAGED, "hermes"}
    assert {spec.template for spec in MODELS.values()} <= {*template.PACKAGED, None}


def test_a_base_without_a_template_is_trained_with_the_chosen_one(tiny, smollm2, tmp_path):
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((smollm2 / file).read_bytes())
    with pytest.raises(SaigaError, match="has no chat template"):
        encoding.load_tokenizer(str(tmp_path))
    chosen = encoding.load_tokenizer(str(tmp_path), chat_template="chatml")
    assert encoding.encode(MESSAGES, chosen)["input_ids"][0] == chosen.special_tokens["<|im_start|>"]
    with pytest.raises(SaigaError, match="without a special token"):
        encoding.load_tokenizer("saiga_tiny", str(tiny / "base"), chat_template="chatml")


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
