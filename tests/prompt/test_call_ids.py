"""Templates like Mistral's refuse a call whose id has not nine letters and digits."""

import pytest
from chatml import MESSAGES, TOOLS, chatml, learned

from saigakit.prompt import encoding
from saigakit.prompt.encoding import encode

REFUSAL = "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}"
STRICT = (
    """
{%- if tools %}{{- tools | tojson + '<think>' }}{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'tool' %}
        {%- if not m.tool_call_id is defined or m.tool_call_id|length != 9 %}REFUSED{%- endif %}
        {{- '<|im_start|>' + m.tool_call_id + ': ' + m.content + '<think>' }}
    {%- else %}
        {{- '<|im_start|>' + m.content }}
        {%- for call in m.tool_calls or [] %}
            {%- if not call.id is defined or call.id|length != 9 %}REFUSED{%- endif %}
            {{- call.function.name + '#' + call.id + ';' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>' }}{%- endif %}"""
).replace("REFUSED", REFUSAL)
FUNCTION = {"name": "найти", "arguments": {}}


def calling(*ids, names=()):
    functions = [{"name": name, "arguments": {}} for name in names] or [FUNCTION] * len(ids)
    pairs = zip(ids or [None] * len(functions), functions, strict=True)
    calls = [{"type": "function", **({"id": each} if each else {}), "function": function} for each, function in pairs]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def result(text, call_id=None, **others):
    return {"role": "tool", "content": text, **({"tool_call_id": call_id} if call_id else {}), **others}


def trained_text(*messages):
    tokenizer = chatml(STRICT)
    asked = {"role": "user", "content": "?"}
    example = encode([asked, *messages, {"role": "assistant", "content": "Всё"}], tokenizer, tools=TOOLS)
    return tokenizer.decode(example["input_ids"]).partition("]?")[2], tokenizer.decode(learned(example))


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([calling("call_62136754"), result("1", "call_62136754")], "найти#call00001;call00001: 1Всё"),
        ([calling("a1B2c3D4e"), result("1", "a1B2c3D4e")], "найти#a1B2c3D4e;a1B2c3D4e: 1Всё"),
        ([calling("call_6213"), result("1", "call_6213")], "найти#call00001;call00001: 1Всё"),
        ([calling(None), result("1")], "найти#call00001;call00001: 1Всё"),
        (
            [calling(None, None), result("1"), result("2")],
            "найти#call00001;найти#call00002;call00001: 1call00002: 2Всё",
        ),
        (
            [calling("x", "y"), result("2", "y"), result("1", "x")],
            "найти#call00001;найти#call00002;call00002: 2call00001: 1Всё",
        ),
        (
            [calling("x"), result("1", "x"), calling("z"), result("2", "z")],
            "найти#call00001;call00001: 1найти#call00002;call00002: 2Всё",
        ),
        # A made id is not one that another call has, now or later.
        (
            [calling("call_1", "call00001"), result("1", "call_1"), result("2", "call00001")],
            "найти#call00002;найти#call00001;call00002: 1call00001: 2Всё",
        ),
        (
            [calling("call00002"), result("1", "call00002"), calling("x", "y"), result("2", "x"), result("3", "y")],
            "найти#call00002;call00002: 1найти#call00001;найти#call00003;call00001: 2call00003: 3Всё",
        ),
        # A result without an id belongs to a call of the same function, or to one without an id.
        (
            [calling(names=("погода", "время")), result("12:00", name="время"), result("ясно", name="погода")],
            "погода#call00001;время#call00002;call00002: 12:00call00001: ясноВсё",
        ),
        (
            [calling("a", None), result("2"), result("1", "a")],
            "найти#call00001;найти#call00002;call00002: 2call00001: 1Всё",
        ),
    ],
)
def test_ids_of_any_form_become_nine_letters_and_digits(messages, text):
    assert trained_text(*messages)[0] == text


def test_the_model_learns_the_id_that_it_will_be_asked_with():
    assert trained_text(calling("call_62136754"), result("1", "call_62136754"))[1] == "найти#call00001;Всё"
    tokenizer, asked = chatml(STRICT), [{"role": "user", "content": "?"}]
    turns = [*asked, calling("toolu_01A"), result("1", "toolu_01A"), {"role": "assistant", "content": "Всё"}]
    complete = encode(turns, tokenizer, tools=TOOLS)["input_ids"]
    prompt = encode(turns[:3], tokenizer, tools=TOOLS, add_generation_prompt=True)["input_ids"]
    assert complete[: len(prompt)] == prompt


def test_other_templates_keep_the_ids():
    text = "{{ messages | tojson }}{{ tools | tojson }}<|im_end|>"
    tokenizer = chatml(text)
    with_id = [MESSAGES[0], calling("call_62136754"), result("1", "call_62136754")]
    assert "call_62136754" in tokenizer.decode(
        encode(with_id, tokenizer, tools=TOOLS, add_generation_prompt=True)["input_ids"]
    )


def test_the_rows_of_a_data_set_get_them_too():
    """There, missing ids are null and arguments are JSON text."""
    call = {"id": None, "type": "function", "function": {"name": "найти", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "?", "tool_calls": None, "tool_call_id": None},
        {"role": "assistant", "content": "", "tool_calls": [call], "tool_call_id": None},
        {"role": "tool", "content": "1", "tool_calls": None, "tool_call_id": None},
        {"role": "assistant", "content": "Всё", "tool_calls": None, "tool_call_id": None},
    ]
    tokenizer = chatml(STRICT)
    ((row,),) = encoding.encode_rows([{"messages": messages, "tools": TOOLS}], tokenizer)
    assert "найти#call00001;call00001: 1" in tokenizer.decode(row["input_ids"])
