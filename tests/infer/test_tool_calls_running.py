"""Answers with calls of the tiny Saiga, whose choices are scripted, and Python functions that it calls."""

import enum
import json
from contextlib import closing
from typing import Literal, Optional

import numpy as np
import pytest
from transformers.utils import get_json_schema

from saigakit import infer
from saigakit.errors import SaigaError
from saigakit.infer import tool_calls, tool_form
from saigakit.infer.constraint import Constraint
from saigakit.prompt import encoding
from saigakit.prompt.backends import token_bytes

WEATHER = {
    "name": "погода",
    "parameters": {
        "type": "object",
        "properties": {"город": {"type": "string"}, "scale": {"type": "string", "enum": ["c", "f"]}},
        "required": ["город"],
    },
}
TOOLS = [{"type": "function", "function": WEATHER}, {"type": "function", "function": {"name": "время"}}]
PLAIN = """
{%- for message in messages %}{{- '<s>' + message.role + '\\n' + message.content + '</s>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<s>assistant\\n' }}{%- endif %}"""
QUESTION = [{"role": "user", "content": "Как в Омске?"}]


@pytest.fixture(scope="module")
def llm(gguf_file):
    with closing(infer.load(gguf_file, n_ctx=2048, n_threads=1)) as loaded:
        yield loaded


@pytest.fixture
def script(llm, monkeypatch):
    """Give these texts the highest logits, one answer after the other, or its end if the grammar forbids them."""
    special, choose = set(encoding.load_gguf_tokenizer(llm).special_tokens.values()), Constraint.choose
    pieces = {token_bytes(llm, token): token for token in range(llm.n_vocab()) if token not in special}
    waiting, written = [], {}

    def choose_scripted(self, logits):
        if self not in written:
            written[self] = (waiting.pop(0).encode("utf-8"), [])
        wanted, done = written[self]
        before = b"".join(token_bytes(llm, token) for token in done)
        rest = wanted.removeprefix(before) if wanted.startswith(before) else b""
        sizes = [size for size in range(len(rest), 0, -1) if rest[:size] in pieces]
        wish = pieces[rest[: sizes[0]]] if sizes else llm.token_eos()
        found = choose(self, np.where(np.arange(len(logits)) == wish, 1e9, logits))
        done += found
        return found

    monkeypatch.setattr(Constraint, "choose", choose_scripted)
    return waiting.extend


def call(name, **arguments):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments, ensure_ascii=False)}}}\n</tool_call>'


def names(message):
    return [(each["id"], each["function"]["name"], each["function"]["arguments"]) for each in message["tool_calls"]]


def test_an_answer_is_a_text_or_calls_in_openais_format(llm, script):
    script(
        ["Тепло.\n— Да?", "Смотрю\n" + call("погода", город='Ом"ск', scale="c") + "\n" + call("время"), call("время")]
    )
    assert infer.answer(llm, QUESTION, TOOLS) == {"role": "assistant", "content": "Тепло.\n— Да?"}
    two = infer.answer(llm, QUESTION, TOOLS)
    assert (two["role"], two["content"]) == ("assistant", "Смотрю")
    assert two["tool_calls"][0] == {
        "id": "call00001",
        "type": "function",
        "function": {"name": "погода", "arguments": '{"город": "Ом\\"ск", "scale": "c"}'},
    }
    assert names(two)[1] == ("call00002", "время", "{}")
    results = [{"role": "tool", "content": "1", "tool_call_id": f"call0000{i}"} for i in (1, 2)]
    assert names(infer.answer(llm, [*QUESTION, two, *results], TOOLS)) == [("call00003", "время", "{}")]


def test_a_call_that_has_begun_is_held_to_its_form(llm, script):
    scale = {"name": "scale", "parameters": {"properties": {"unit": {"enum": ["c", "f"]}}, "required": ["unit"]}}
    wishes = ["<tool_call>{'name': 'погода', 'unit': c", call("scale", unit="к"), call("sca"), call("scale", more=[1])]
    script(wishes)
    for _ in wishes:
        (found,) = names(infer.answer(llm, QUESTION, [{"type": "function", "function": scale}]))
        assert found[1] == "scale" and json.loads(found[2])["unit"] in ("c", "f")


def test_whatever_the_weights_prefer_the_answer_fits(llm):
    only = [{"type": "function", "function": {"name": "a", "parameters": {"properties": {"b": {"enum": [1, 2]}}}}}]
    for text in ("Привет", "</s><tool_call>", "вызови a"):
        found = infer.answer(llm, [{"role": "user", "content": text}], only, max_new_tokens=40)
        assert "tool_calls" in found or found["content"] == found["content"].strip()


def test_a_call_without_an_end_is_an_error_and_a_text_is_cut(llm, script):
    script([call("погода", город="О" * 50)] * 2 + ["<tool_call>" + "ы" * 20, "Долгий ответ " * 9])
    for limit in (30, 20, 12):
        with pytest.raises(SaigaError, match=r"no end after \d+ tokens. Give a larger max_new_tokens"):
            infer.answer(llm, QUESTION, TOOLS, max_new_tokens=limit)
    assert infer.answer(llm, QUESTION, TOOLS, max_new_tokens=5)["content"] in "Долгий ответ " * 9


def test_arguments_are_validated_once_more(llm, script, monkeypatch):
    monkeypatch.setattr(tool_form, "json_rule", lambda _: '"{\\"город\\": 1}"')
    script([call("погода", город=1)])
    with pytest.raises(SaigaError, match="arguments of 'погода' do not fit its schema: 1 is not of type 'string'"):
        infer.answer(llm, QUESTION, TOOLS)


def test_a_number_that_json_lacks_is_an_error(llm, script):
    number = {"name": "a", "parameters": {"properties": {"b": {"type": "number"}}, "required": ["b"]}}
    script(['<tool_call>\n{"name": "a", "arguments": {"b": 1e999}}\n</tool_call>'])
    with pytest.raises(SaigaError, match=r"arguments of 'a' do not fit its schema: .*cannot be written as JSON"):
        infer.answer(llm, QUESTION, [number])


def test_a_template_without_tools_is_refused_with_its_reason(gguf_file):
    with closing(infer.load(gguf_file, n_ctx=256, n_threads=1)) as without:
        without.metadata["tokenizer.chat_template"] = PLAIN
        with pytest.raises(SaigaError, match="leaves out tools"):
            infer.answer(without, QUESTION, TOOLS)


def test_without_tools_the_answer_is_the_most_likely_text(llm):
    greedy = "".join(infer.stream(llm, QUESTION, sampling=tool_calls.Sampling(temperature=0.0), max_new_tokens=8))
    assert infer.answer(llm, QUESTION, [], max_new_tokens=8) == {"role": "assistant", "content": greedy}


class Scale(enum.Enum):
    CELSIUS = "c"
    FAHRENHEIT = "f"


def weather(
    city: str,
    days: int,
    scale: Literal["c", "f"] = "c",
    wind: float = 0.5,
    exact: bool = False,
    hours: list[int] = [],  # noqa: B006  # only described
    place: Optional[str] = None,  # noqa: UP045  # both spellings
    other: str | None = None,
):
    """
    Tell the weather.

    More about it.

    Args:
        city: the city
        days: how many days
        scale: the scale
        wind: the wind
        exact: whether to be exact
        hours: the hours
        place: the place
        other: something else
    """


def test_a_signature_is_described_as_transformers_describes_it():
    ours, theirs = tool_calls._describe(weather)["function"], get_json_schema(weather)["function"]
    assert ours["name"] == theirs["name"]
    assert ours["description"] == "Tell the weather."
    assert ours["parameters"]["required"] == theirs["parameters"]["required"] == ["city", "days"]
    described = ours["parameters"]["properties"]
    assert list(described) == list(theirs["parameters"]["properties"])
    for name, expected in theirs["parameters"]["properties"].items():
        found = dict(described[name])
        if expected.pop("nullable", False):
            (kind, null), found = found["anyOf"], {"description": found["description"], **found["anyOf"][0]}
            assert null == {"type": "null"} and kind["type"] == "string"
        found.pop("default", None)
        assert found == expected, name


def test_functions_run_with_python_values_and_the_model_reads_their_results(llm, script):
    given = []

    def find(city: str, scale: Scale, wind: float = 1.5, days: list[int] | None = None) -> dict[str, object]:
        """Найти погоду."""
        given.append((city, scale, wind, days))
        return {"город": city, "t": [1, None]}

    script(
        [
            call("find", city="Ом\"ск'", scale="f", wind=2, days=[1, 2]) + "\n" + call("find", city="", scale="c"),
            "Тепло",
        ]
    )
    found = infer.run_tools(llm, QUESTION, [find])
    assert given == [("Ом\"ск'", Scale.FAHRENHEIT, 2.0, [1, 2]), ("", Scale.CELSIUS, 1.5, None)]
    assert [each["role"] for each in found] == ["user", "assistant", "tool", "tool", "assistant"]
    assert found[2] == {
        "role": "tool",
        "tool_call_id": "call00001",
        "name": "find",
        "content": '{"город": "Ом\\"ск\'", "t": [1, null]}',
    }
    assert found[3]["tool_call_id"] == "call00002"
    assert found[-1] == {"role": "assistant", "content": "Тепло"}
    assert found[:1] == QUESTION


def fail(kind: Literal["raise", "nan", "set", "half", "secret", "saiga"]):
    """Fail."""
    if kind == "raise":
        raise TypeError("нет города")
    if kind == "saiga":
        raise SaigaError("нельзя")
    if kind == "secret":
        raise ValueError("hf_" + "a" * 30)
    return {"nan": float("nan"), "set": {1}, "half": "\ud83d"}[kind]


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("raise", "TypeError: нет города"),
        ("saiga", "SaigaError: нельзя"),
        ("secret", "ValueError: …"),
        ("nan", "ValueError: Out of range"),
        ("set", "TypeError: Object of type set is not JSON"),
        ("half", "UnicodeEncodeError: "),
    ],
)
def test_the_model_reads_the_exception_of_a_function(llm, script, kind, error):
    script([call("fail", kind=kind), "Жаль"])
    found = infer.run_tools(llm, QUESTION, [fail])
    assert json.loads(found[2]["content"])["error"].startswith(error)
    assert found[-1]["content"] == "Жаль"


def test_ctrl_c_in_a_function_ends_the_run(llm, script):
    def stop():
        raise KeyboardInterrupt

    script([call("stop")])
    with pytest.raises(KeyboardInterrupt):
        infer.run_tools(llm, QUESTION, [stop])


def test_calls_without_end_are_an_error_with_what_was_called(llm, script):
    done = []

    def again(n: int):
        done.append(n)

    script([call("again", n=number) for number in range(3)])
    with pytest.raises(SaigaError, match=r'after 2 rounds: again\(\{"n": 0\}\), again\(\{"n": 1\}\)\.'):
        infer.run_tools(llm, QUESTION, [again], max_rounds=2)
    assert done == [0, 1]


def test_only_the_given_functions_are_called(llm, script):
    def one() -> str:
        return "1"

    script([call("eval", code="1"), "Всё"])
    found = infer.run_tools(llm, QUESTION, [one], max_rounds=1)
    assert {each["function"]["name"] for message in found for each in message.get("tool_calls", ())} <= {"one"}


def no_type(x, y: int):
    pass


def many(*names: str):
    pass


def positional(x: int, /):
    pass


def stream(x: list[memoryview]):
    pass


@pytest.mark.parametrize("function", [no_type, many, positional, stream])
def test_an_unsupported_parameter_is_named(llm, function):
    with pytest.raises(SaigaError, match=rf"{function.__name__}: the type of the parameter `[*]?(x|names)\b"):
        infer.run_tools(llm, QUESTION, [function])
    with pytest.raises(SaigaError, match="occurs 2 times"):
        infer.run_tools(llm, QUESTION, [fail, fail])
