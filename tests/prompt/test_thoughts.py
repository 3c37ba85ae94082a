"""Train the thought before an answer, as a text that cannot become a special token."""

import random
from itertools import groupby

import pytest
from chatml import CALL, CHATML, CONVERSATION, TOOLS, WITH_TOOLS, chatml_bpe, learned
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from saigakit.errors import SaigaError
from saigakit.prompt import encoding, template, thoughts
from saigakit.prompt.encoding import FastTokenizer, encode

# As Qwen3 does: a thought is kept after the last question, and dropped before it; the last answer always has one, even
# if it is empty; a thought in a content is found by its end tag.
QWEN3 = r"""
{%- if tools %}
    {{- '<|im_start|>system\n<tools>' }}
    {%- for tool in tools %}{{- '\n' + tool | tojson }}{%- endfor %}
    {{- '\n</tools><|im_end|>\n' }}
{%- endif %}
{%- set last = namespace(question=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set last.question = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > last.question and (loop.last or thought) %}
            {{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '\n' if content or not loop.first else '' }}
            {{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}{{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>tool\n<tool_response>\n' + content + '\n</tool_response><|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
ANSWER = {"role": "assistant", "reasoning_content": "Здороваются.", "content": "Здравствуй!"}
ONE = [*CONVERSATION[:2], ANSWER]
TWO = [
    *ONE,
    {"role": "user", "content": "Сколько?"},
    {"role": "assistant", "reasoning_content": "Считаю.", "content": "Два"},
]
CALLING = [
    {"role": "user", "content": "Найди"},
    {"role": "assistant", "reasoning_content": "Нужна функция.", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "нашлось", "tool_call_id": "abc123456"},
    {"role": "assistant", "reasoning_content": "Есть.", "content": "Готово"},
]


def bpe():
    tokenizer = chatml_bpe()
    plain = ("</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])
    return tokenizer


@pytest.fixture(scope="module")
def qwen3() -> FastTokenizer:
    return FastTokenizer(bpe(), QWEN3, {})


@pytest.fixture(scope="module")
def plain() -> FastTokenizer:
    """Its template knows neither thoughts nor tools."""
    return FastTokenizer(bpe(), WITH_TOOLS, {})


def spelled(ids, tokenizer) -> str:
    """With special tokens."""
    names = {number: text for text, number in tokenizer.special_tokens.items()}
    runs = groupby(ids, key=names.get)
    return "".join(name * len(list(run)) if name else tokenizer.decode(list(run)) for name, run in runs)


def rows(messages, tokenizer, tools=None):
    ((*made,),) = encoding.encode_rows([{"messages": messages, "tools": tools}], tokenizer)
    return made


def raw_ids(messages, chat_template, count, tools=None):
    """transformers' ids of the prompt for the last of `count` messages, and of that message."""
    theirs = PreTrainedTokenizerFast(tokenizer_object=bpe(), chat_template=chat_template)
    render = theirs.apply_chat_template
    prompt = render(messages[: count - 1], tools=tools, add_generation_prompt=True, tokenize=False)
    whole = render(messages[:count], tools=tools, tokenize=False)
    assert whole.startswith(prompt)
    return [i for text in (prompt, whole.removeprefix(prompt)) for i in theirs.encode(text, add_special_tokens=False)]


def test_the_thought_and_the_answer_are_trained_but_not_their_header(qwen3):
    (row,) = rows(ONE, qwen3)
    assert spelled(learned(row), qwen3) == "<think>\nЗдороваются.\n</think>\n\nЗдравствуй!<|im_end|>"
    assert spelled(row["input_ids"], qwen3).endswith("<|im_start|>assistant\n" + spelled(learned(row), qwen3) + "\n")
    assert row["input_ids"] == raw_ids(ONE, QWEN3, 3)


def test_each_answer_is_a_row_with_its_own_thought_and_without_those_before(qwen3):
    first, last = rows(TWO, qwen3)
    assert first == encode(ONE, qwen3)
    assert spelled(learned(last), qwen3) == "<think>\nСчитаю.\n</think>\n\nДва<|im_end|>"
    assert "Здороваются" not in qwen3.decode(last["input_ids"])
    assert last["input_ids"] == raw_ids(TWO, QWEN3, 5)
    prompt = encode(TWO[:4], qwen3, add_generation_prompt=True)["input_ids"]
    assert last["input_ids"][: len(prompt)] == prompt


def test_the_thoughts_before_and_after_a_call_are_trained_together(qwen3):
    (row,) = rows(CALLING, qwen3, TOOLS)
    assert spelled(learned(row), qwen3) == (
        '<think>\nНужна функция.\n</think>\n\n<tool_call>\n{"name": "найти", "arguments": {"<s>ключ": ["</s>", 1.5]}}\n'
        "</tool_call><|im_end|><think>\nЕсть.\n</think>\n\nГотово<|im_end|>"
    )
    assert row["input_ids"] == raw_ids(CALLING, QWEN3, 4, TOOLS)
    *_, last = rows([*CALLING, *TWO[3:]], qwen3, TOOLS)
    assert "Нужна функция" not in qwen3.decode(last["input_ids"])


@pytest.mark.parametrize("chat_template", [QWEN3, WITH_TOOLS])
@pytest.mark.parametrize(
    "thought", ["<|im_end|>", "</think>", "а</think>\n\nб<|im_end|>\n<|im_start|>user", "<think>", "name", "{{ x }}"]
)
def test_a_special_token_in_a_thought_stays_text(chat_template, thought):
    tokenizer = FastTokenizer(bpe(), chat_template, {})
    special = set(tokenizer.special_tokens.values())

    def found(text):
        (row,) = rows([*ONE[:2], {**ANSWER, "reasoning_content": text}], tokenizer)
        assert text in spelled(learned(row), tokenizer)
        return [i for i in row["input_ids"] if i in special]

    assert found(thought) == found("слово")
    assert len(found(thought)) == 8


def test_a_template_that_does_not_know_thoughts_gets_them_in_the_content(plain):
    (row,) = rows(TWO, plain)
    assert spelled(learned(row), plain) == (
        "<think>\nЗдороваются.\n</think>\n\nЗдравствуй!<|im_end|><think>\nСчитаю.\n</think>\n\nДва<|im_end|>"
    )
    folded = thoughts.fold(TWO, CHATML)
    assert folded[2] == {"role": "assistant", "content": "<think>\nЗдороваются.\n</think>\n\nЗдравствуй!"}
    prompts = [raw_ids(folded, CHATML, count) for count in (3, 5)]
    assert row["input_ids"][: len(prompts[0])] == prompts[0]
    assert len(row["input_ids"]) == len(prompts[1])
    (called,) = rows(CALLING, plain, TOOLS)
    assert "<think>\nНужна функция.\n</think>\n\n\n<tool_call>" in spelled(learned(called), plain)


def test_an_empty_thought_is_none_to_a_template_that_does_not_know_thoughts(plain):
    assert rows([*ONE[:2], {**ANSWER, "reasoning_content": ""}], plain) == rows(CONVERSATION, plain)


@pytest.mark.parametrize("content", ["<think>\n\n</think>\n\nДа", "<think>\nДумаю.\n</think>\n\nДа"])
def test_a_thought_that_begins_a_content_is_trained_as_the_template_renders_it(qwen3, plain, content):
    messages = [*CONVERSATION[:2], {"role": "assistant", "content": content}]
    (row,) = rows(messages, qwen3)
    assert row["input_ids"] == raw_ids(messages, QWEN3, 3)
    assert spelled(learned(row), qwen3) == f"{content}<|im_end|>"
    assert spelled(learned(rows(messages, plain)[0]), plain) == f"{content}<|im_end|>"
    asked = [*messages, {"role": "user", "content": "Ещё"}]  # an answer in a chat comes back like this
    prompt = encode(asked, qwen3, add_generation_prompt=True)["input_ids"]
    assert "Думаю" not in qwen3.decode(prompt)
    assert (
        prompt
        == encode([*asked[:2], {**ANSWER, "content": "Да"}, asked[3]], qwen3, add_generation_prompt=True)["input_ids"]
    )


@pytest.mark.parametrize("content", ["Тег </think> закрывает мысль.", "<think>\nа</think>б</think>в"])
def test_the_error_names_the_text_that_the_template_reacts_to(qwen3, plain, content):
    messages = [*CONVERSATION[:2], {"role": "assistant", "content": content}]
    with pytest.raises(SaigaError, match=r"Remove .*'</think>'; the contents begin with"):
        encode(messages, qwen3)
    with pytest.raises(SaigaError, match=r"data\.jsonl:7: .*'</think>'"):
        encoding.encode_rows([{"messages": messages}], qwen3, label=lambda _: "data.jsonl:7")
    assert content in spelled(learned(encode(messages, plain)), plain)


@pytest.mark.parametrize("thought", ["Здороваются.", "name"])  # "name" is also a keyword that tools need unmasked
def test_rejects_a_template_that_leaves_out_the_thought_it_ends_with(thought):
    ignoring = CHATML.replace("message['content']", "message['content'] + ('' if message.reasoning_content else '')")
    with pytest.raises(SaigaError, match=r"leaves out messages\[2\]\.reasoning_content"):
        rows([*ONE[:2], {**ANSWER, "reasoning_content": thought}], FastTokenizer(bpe(), ignoring, {}))


@pytest.mark.parametrize(
    "message", [{**ANSWER, "reasoning_content": 1}, {"role": "user", "content": "?", "reasoning_content": "а"}]
)
def test_only_an_answer_has_a_thought_which_is_a_text(qwen3, message):
    with pytest.raises(SaigaError, match=r"Message 1 is .*an answer may have a text as reasoning_content"):
        encode([message], qwen3)


def test_random_thoughts_have_the_ids_of_transformers_and_an_untrained_answer_keeps_its_weight(qwen3):
    rng = random.Random(0)
    for _ in range(30):
        words = [" ".join(rng.choices(("Привет", "мир", "ё", "2e-4", "🙂", "x\n\ny"), k=3)) for _ in range(2)]
        messages = [*TWO[:4], {"role": "assistant", "reasoning_content": words[0], "content": words[1]}]
        first, last = rows(messages, qwen3)
        assert last["input_ids"] == raw_ids(messages, QWEN3, 5)
        messages[2] = {**messages[2], "weight": 0}
        assert rows(messages, qwen3) == [last]
        assert first == encode(ONE, qwen3)


def test_a_row_of_a_dataset_has_null_for_the_thoughts_it_lacks(qwen3):
    row = [{**message, "reasoning_content": message.get("reasoning_content")} for message in ONE]
    assert rows(row, qwen3) == rows(ONE, qwen3)
    assert template.decode_row(row, None)[0] == ONE
