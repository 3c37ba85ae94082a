"""Ollama's Modelfile: its template rendered by Go itself, tokenised by llama.cpp, has the ids of the training.

Ollama itself is not run: what it hands to a template is written out in go_engine.
"""

import re

import go_engine
import llama_cpp_chain
import pytest
import vocabularies

from saigakit.errors import SaigaError
from saigakit.export import fit, modelfile
from saigakit.export.chat_format import ChatFormat
from saigakit.prompt import encoding, template
from saigakit.registry import MODELS, Sampling
from saigakit.weights.memory import Shape

LLAMA2 = Shape(
    hidden=4096, layers=32, heads=32, kv_heads=32, head_dim=128, intermediate=11008, vocabulary=32000, tied=False
)
SMALL = fit.chosen(LLAMA2, {"Q4_K_M": 4_081_004_224}, longest=4096)  # on 6 GiB
LARGE = fit.chosen(LLAMA2, {"Q8_0": 7_161_089_728}, longest=4096)  # on 16 GiB

SYSTEM = {"role": "system", "content": "Ты — кот. Отвечай: «мяу» & <b>."}
TALK = [
    {"role": "user", "content": "Привет, ёж!\n\n  2 + 2 = ?"},
    {"role": "assistant", "content": 'Здравствуй! {{ 4 }} и "кавычки"'},
    {"role": "user", "content": "А\tещё?"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "save_terms",
            "description": "Сохранить «термины»",
            "parameters": {
                "type": "object",
                "properties": {"items": {"type": "array", "description": "слова", "items": {"type": "string"}}},
                "required": ["items"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "unit",
            "description": "Единица",
            "parameters": {
                "type": "object",
                "properties": {"u": {"type": "string", "enum": ["м", "кг"]}},
            },
        },
    },
]


def call(name, **arguments):
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}


def calling(content, *calls):
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


RESULT = {"role": "tool", "content": '{"ok": true}'}
CALLED = [*TALK, calling("", call("save_terms", items=["ёж", 'не "кот"', {"n": 12}]), call("unit", u="м")), RESULT]
CONVERSATIONS = [
    {"messages": TALK[:1]},
    {"messages": TALK},
    {"messages": [SYSTEM, *TALK]},
    {"messages": TALK, "tools": TOOLS},
    {"messages": [SYSTEM, *TALK], "tools": TOOLS[:1]},
    {"messages": CALLED, "tools": TOOLS},
    {"messages": [SYSTEM, *CALLED, RESULT, TALK[1], TALK[0]], "tools": TOOLS},
    {"messages": [*TALK, calling("Сейчас.", call("unit", u="кг")), RESULT], "tools": TOOLS},
]
WITH_TOOLS = [
    *("llama2-saiga2", "smollm2-its_own", "smollm2-hermes_tools", "llama3_tokens-llama3"),
    *("qwen_tokens-hermes_tools", "gemma_tokens-saiga_gemma"),
]


@pytest.fixture
def pair(request, tmp_path):
    smollm2 = request.getfixturevalue("smollm2") if vocabularies.needs_smollm2(request.param) else None
    return vocabularies.pair(request.param, tmp_path, smollm2)


def chat_of(tokenizer):
    (end,) = encoding.end_of_turn_ids(tokenizer)
    name = next(name for name, number in tokenizer.special_tokens.items() if number == end)
    return ChatFormat.of(tokenizer.chat_template, tokenizer.variables, name)


def llama_cpps_ids(pair, text):
    """As llama-server reads a prompt of Ollama's: special tokens found, BOS where the file says so."""
    return pair.gguf._llm.tokenize(text.encode(), True, True)


@pytest.mark.parametrize("pair", WITH_TOOLS, indirect=True)
def test_ollamas_prompt_has_the_ids_of_the_training(pair, tmp_path):
    go_template = modelfile.go_template(chat_of(pair.fast))
    texts = go_engine.rendered(go_template, CONVERSATIONS, tmp_path / "go")
    for conversation, text in zip(CONVERSATIONS, texts, strict=True):
        expected = encoding.encode(
            conversation["messages"], pair.fast, tools=conversation.get("tools"), add_generation_prompt=True
        )["input_ids"]
        assert llama_cpps_ids(pair, text) == expected, text


@pytest.mark.parametrize("pair", ["smollm2-hermes_tools"], indirect=True)
def test_arguments_come_with_commas_in_the_order_of_their_names(pair, tmp_path):
    """Ollama's maps come sorted; those of the engine in any order, so one of many renderings has it."""
    messages = [*TALK, calling("", call("unit", a="б", b={"в": True})), RESULT]
    go_template = modelfile.go_template(chat_of(pair.fast))
    texts = go_engine.rendered(go_template, [{"messages": messages, "tools": TOOLS}] * 40, tmp_path / "go")
    variables = pair.fast.variables
    chat_template = pair.fast.chat_template
    expected = template.render(messages, chat_template, tools=TOOLS, add_generation_prompt=True, variables=variables)
    assert expected in texts


@pytest.mark.parametrize("pair", ["mistral_v3-tools"], indirect=True)
def test_functions_that_are_written_in_another_way_are_left_out_and_that_is_said(pair, tmp_path):
    chat = chat_of(pair.fast)
    assert chat.tools is None
    made = modelfile.modelfile("m.gguf", chat, stops=[], sampling=Sampling(), choice=SMALL, system_prompt=None)
    assert "# Functions (tools) are not in this template" in made
    (text,) = go_engine.rendered(modelfile.go_template(chat), CONVERSATIONS[2:3], tmp_path / "go")
    messages = CONVERSATIONS[2]["messages"]
    expected = encoding.encode(messages, pair.fast, add_generation_prompt=True)["input_ids"]
    assert llama_cpps_ids(pair, text) == expected


@pytest.mark.parametrize(
    "text",
    [
        vocabularies.FOLDED_SYSTEM,
        "{% for message in messages %}{{ message.content | upper }}</s>{% endfor %}",
        "{{ messages | length }}"
        + vocabularies.SAIGA2.replace("'<s>bot\\n' }}", "'<s>bot\\n' + messages[0].content }}"),
        "{% if messages | length > 4 %}Долгий разговор. {% endif %}" + vocabularies.SAIGA2,
    ],
    ids=["the system prompt in the first question", "capitals", "repeats the question", "depends on the length"],
)
def test_a_template_that_is_not_its_turns_in_a_row_is_refused(text):
    with pytest.raises(SaigaError, match=r"llama-server --jinja"):
        ChatFormat.of(text, {"bos_token": "<s>"}, "<end_of_turn>" if "end_of_turn" in text else "</s>")


def test_blanks_that_a_template_takes_off_are_told():
    chat = ChatFormat.of(vocabularies.LLAMA3, {"bos_token": "<b>"}, "<|eot_id|>")
    made = modelfile.modelfile("m.gguf", chat, stops=[], sampling=Sampling(), choice=SMALL, system_prompt=None)
    assert chat.is_trimmed and "send none" in made


def saigas_chat():
    return ChatFormat.of(template.with_tools(vocabularies.SAIGA2), {}, "</s>")


def test_the_modelfile_has_what_the_model_was_trained_with():
    spec = MODELS["saiga2_7b"]
    made = modelfile.modelfile(
        "model.gguf",
        saigas_chat(),
        stops=["</s>"],
        sampling=spec.sampling,
        choice=SMALL,
        system_prompt=spec.system_prompt,
    )
    assert re.findall(r"^(FROM .*|SYSTEM .*|PARAMETER .*)$", made, re.MULTILINE) == [
        "FROM ./model.gguf",
        f'SYSTEM """{spec.system_prompt}"""',
        'PARAMETER stop "</s>"',
        "PARAMETER temperature 0.2",
        "PARAMETER top_p 0.9",
        "PARAMETER top_k 30",
        "PARAMETER repeat_penalty 1.1",
        "PARAMETER num_ctx 2048",
    ]
    assert f'TEMPLATE """{modelfile.go_template(saigas_chat())}"""' in made


@pytest.mark.parametrize("prompt", ["Ты\u00a0— кот", 'Ты """кот"""', "Ты\tкот", "a\u200bb"])
def test_a_system_prompt_that_a_modelfile_cannot_hold_is_refused(prompt):
    with pytest.raises(SaigaError, match="which a Modelfile of Ollama cannot hold"):
        modelfile.modelfile("m", saigas_chat(), stops=[], sampling=Sampling(), choice=SMALL, system_prompt=prompt)


def test_the_first_text_of_a_call_is_what_ollama_looks_for():
    """It searches answers for the first text after `.ToolCalls` up to a brace."""
    branch = modelfile.go_template(saigas_chat()).partition(".ToolCalls }}")[2]
    first = next(text for text in re.split(r"\{\{.*?\}\}", branch) if text.strip())
    assert first.strip() == "<tool_call>"


def test_braces_of_a_template_stay_braces(tmp_path):
    made = vocabularies.SAIGA2.replace("'<s>bot\\n'", "'<s>{{bot}}{'")
    chat = ChatFormat.of(made, {}, "</s>")
    (text,) = go_engine.rendered(modelfile.go_template(chat), CONVERSATIONS[1:2], tmp_path / "go")
    assert text == template.render(TALK, made, add_generation_prompt=True)
    assert "<s>{{bot}}{" in text


def test_the_parts_are_those_of_the_template():
    chat = saigas_chat()
    for conversation in CONVERSATIONS:
        messages, tools = conversation["messages"], conversation.get("tools")
        expected = template.render(
            messages, template.with_tools(vocabularies.SAIGA2), tools=tools, add_generation_prompt=True
        )
        assert chat.prompt(messages, tools) == expected
    assert ChatFormat.of(vocabularies.LLAMA3, {"bos_token": "<b>"}, "<|eot_id|>").tools is None


def test_the_servers_command_reads_the_files_template_and_keeps_the_sampling():
    made = modelfile.llama_server("m.gguf", sampling=MODELS["saiga2_7b"].sampling, choice=LARGE)
    assert made.splitlines()[1] == (
        "llama-server -m m.gguf -c 4096 --jinja --temp 0.2 --top-p 0.9 --top-k 30 --min-p 0 --repeat-penalty 1.1 "
        f"--cache-ram {LARGE.left_mib}"
    )


def test_where_memory_is_short_the_cache_is_quantised_and_the_server_keeps_no_more_than_is_left():
    made = modelfile.llama_server("m", sampling=Sampling(), choice=SMALL)
    assert made.endswith(f"--cache-type-k q8_0 --cache-type-v q8_0 --cache-ram {SMALL.left_mib}\n")
    assert SMALL.needs.total + SMALL.left_mib * 2**20 <= 6 * 2**30
    made = modelfile.modelfile("m", saigas_chat(), stops=[], sampling=Sampling(), choice=SMALL, system_prompt=None)
    assert "OLLAMA_FLASH_ATTENTION=1 and OLLAMA_KV_CACHE_TYPE=q8_0" in made
    assert "PARAMETER num_ctx 2048" in made


def test_llama_cpp_knows_every_option_of_the_servers_command(callers_cache):
    known = llama_cpp_chain.options(llama_cpp_chain.source(callers_cache))
    made = modelfile.llama_server("m", sampling=Sampling(), choice=SMALL).splitlines()[-1].split()
    given = {word for word in made if word.startswith("-") and not word[1:].isdecimal()}
    assert len(given) >= 10 and given <= known, given - known


def test_a_model_that_fits_no_machine_is_said_not_to():
    choice = fit.chosen(LLAMA2, {"F32": 27 * 10**9}, longest=4096)
    said = (
        "# F32 with 2048 tokens of context, keys and values in q8_0: DOES NOT FIT a machine of 16 GiB; needs 27.3 GiB"
    )
    made = modelfile.modelfile("m", saigas_chat(), stops=[], sampling=Sampling(), choice=choice, system_prompt=None)
    server = modelfile.llama_server("m", sampling=Sampling(), choice=choice)
    assert said in made and server.startswith(said)
    assert server.endswith("--cache-ram 0\n")
