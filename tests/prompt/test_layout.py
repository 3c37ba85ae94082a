"""Split conversations with and without tools, on a ChatML tokenizer made here."""

import gc
import weakref

import pytest
from chatml import CHATML, CONVERSATION, MESSAGES, THOUGHTFUL, TOOLS, WITH_TOOLS, chatml, learned

from saigakit.errors import SaigaError
from saigakit.prompt import encoding, layout, template
from saigakit.prompt.encoding import encode

NATIVE = (
    "{%- if tools -%}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{%- endif -%}"
    "{%- for m in messages -%}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{%- for call in m.tool_calls or [] -%}<think>{{ call.function | tojson }}{%- endfor -%}<|im_end|>\n{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
)


def test_a_template_without_tools_renders_tools_and_calls_as_text():
    tokenizer = chatml()
    text = template.render(MESSAGES, tokenizer.chat_template, tools=TOOLS)
    assert text.startswith("<|im_start|>system\nТебе доступны функции.")
    assert '"name": "найти"' in text
    assert '<|im_start|>assistant\n<tool_call>\n{"name": "найти", "arguments": {"<s>ключ": ["</s>", 1.5]}}' in text
    assert '<|im_start|>user\n<tool_response>\n{"ok": "</s>"}\n</tool_response><|im_end|>' in text
    assert tokenizer.decode(encode(MESSAGES, tokenizer, tools=TOOLS)["input_ids"]) == text.replace(
        "<|im_start|>", ""
    ).replace("<|im_end|>", "")


def test_the_call_and_the_last_answer_are_trained_but_not_the_result():
    tokenizer = chatml()
    said = tokenizer.decode(learned(encode(MESSAGES, tokenizer, tools=TOOLS)))
    assert said.startswith('<tool_call>\n{"name": "найти"')
    assert said.endswith("</tool_call>Готово")
    assert "tool_response" not in said


def test_results_of_several_calls_form_one_user_turn():
    results = [MESSAGES[2], {**MESSAGES[2], "content": "второй"}]
    text = template.render([*MESSAGES[:2], *results, MESSAGES[3]], WITH_TOOLS, tools=TOOLS)
    assert text.count("<|im_start|>user") == 2
    assert text.count("<tool_response>") == 2


def test_without_tools_the_prepended_template_changes_nothing():
    assert template.render(CONVERSATION, WITH_TOOLS) == template.render(CONVERSATION, CHATML)


def test_a_template_that_supports_tools_is_unchanged():
    assert template.with_tools(NATIVE) == NATIVE


def test_a_special_token_is_special_around_a_call_and_text_in_an_argument():
    tokenizer = chatml(NATIVE)
    think = tokenizer.special_tokens["<think>"]
    call = {"type": "function", "function": {"name": "<think>", "arguments": {"<think>": "<|im_end|>"}}}
    tools = [{"type": "function", "function": {"name": "<think>", "description": "<|im_end|>"}}]
    messages = [MESSAGES[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    example = encode(messages, tokenizer, tools=tools)
    assert example["input_ids"].count(think) == 1
    assert example["labels"].count(think) == 1
    assert example["input_ids"].count(tokenizer.special_tokens["<|im_end|>"]) == 3


def test_rejects_a_template_that_leaves_out_tools():
    ignoring = "{%- if tools is defined -%}{%- endif -%}" + CHATML
    with pytest.raises(SaigaError, match=r"leaves out tools\[0\]\.function\.name"):
        encode([*CONVERSATION], chatml(ignoring), tools=TOOLS)
    with pytest.raises(SaigaError, match=r"leaves out tools\[0\]\.function\.name"):
        encode(CONVERSATION[:2], chatml(ignoring), tools=TOOLS, add_generation_prompt=True)


def test_rejects_a_template_that_leaves_out_calls():
    ignoring = "{{ tools | tojson if tools }}" + CHATML
    with pytest.raises(SaigaError, match=r"leaves out messages\[1\]\.tool_calls\[0\]\.function\.name"):
        encode(MESSAGES, chatml(ignoring), tools=TOOLS)


@pytest.mark.parametrize("messages", [MESSAGES[:2], [MESSAGES[0], {"role": "tool", "content": "б"}]])
def test_rejects_calls_without_tools_and_names_the_message(messages):
    with pytest.raises(SaigaError, match="Message 2 is part of a function call, but the conversation has no tools"):
        encode(messages, chatml())


def test_follows_a_template_that_repeats_and_reorders_texts():
    swapped = (
        "{%- for m in messages -%}{%- if m.role == 'user' -%}{{ m.content }}<think>{%- endif -%}{%- endfor -%}" + CHATML
    )
    tokenizer = chatml(swapped)
    one = [{"role": "user", "content": "а<think>"}, {"role": "assistant", "content": "б"}]
    ids = encode(one, tokenizer)["input_ids"]
    assert tokenizer.decode(ids) == "а<think>user\nа<think>\nassistant\nб\n"
    assert ids.count(tokenizer.special_tokens["<think>"]) == 1
    with pytest.raises(SaigaError, match="turn by turn"):
        encode([*one, *one], tokenizer)
    ((first, last),) = encoding.encode_rows([{"messages": [*one, *one]}], tokenizer)
    assert first["input_ids"] == ids
    assert tokenizer.decode(last["input_ids"]).startswith("а<think>а<think>user\nа<think>\nassistant\nб\nuser")
    assert tokenizer.decode(learned(last)) == "б"


def test_accepts_only_generation_tags_that_agree_with_the_trained_tokens():
    answer = "{{ '<|im_start|>assistant\n' }}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    other = "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    marked = (
        "{%- for message in messages -%}{% if message['role'] == 'assistant' %}" + answer + "{% else %}" + other + ""
        "{% endif %}{{ '\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
    )
    assert encode(CONVERSATION, chatml(marked)) == encode(CONVERSATION, chatml(CHATML))
    header_too = marked.replace(
        answer, answer.replace("{% generation %}", "", 1).replace("{{", "{% generation %}{{", 1)
    )
    twice = marked.replace("+ '<|im_end|>' }}", "}}{% endgeneration %}!{% generation %}{{ '<|im_end|>' }}", 1)
    users_too = marked.replace(other, "{% generation %}" + other + "{% endgeneration %}")
    for broken in (header_too, twice, users_too):
        assert broken != marked
        with pytest.raises(SaigaError, match="generation prompts end at"):
            encode(CONVERSATION, chatml(broken))
    last_alone = marked.replace("== 'assistant' %}", "== 'assistant' and loop.last %}")
    for conversation in (CONVERSATION, [*TWICE[:2], {**TWICE[2], "weight": 0}, *TWICE[3:]]):
        assert encode(conversation, chatml(last_alone)) == encode(conversation, chatml(CHATML))
    unmarked = template.for_inference(marked)
    assert "generation %}" not in unmarked.replace("add_generation_prompt", "")
    assert template.render(CONVERSATION, unmarked) == template.render(CONVERSATION, marked)


def test_conversations_of_one_shape_share_one_rendering(monkeypatch):
    tokenizer = chatml()
    rendered = []
    render = template.render
    monkeypatch.setattr(layout.template, "render", lambda *a, **k: rendered.append(k.get("masked")) or render(*a, **k))
    for text in ("а", "б </s>", "в"):
        encode([CONVERSATION[0], {"role": "user", "content": text}, CONVERSATION[2]], tokenizer)
    assert rendered.count(False) == 3
    assert rendered.count(True) == 3  # the conversation, and its prompt twice, only of the first


def test_encode_rows_matches_encode_and_locates_a_bad_conversation():
    tokenizer = chatml()
    conversations = [{"messages": CONVERSATION}, {"messages": MESSAGES, "tools": TOOLS}, {"messages": CONVERSATION[1:]}]
    alone = [[encode(each["messages"], tokenizer, tools=each.get("tools"))] for each in conversations]
    assert encoding.encode_rows(conversations, tokenizer) == alone
    with pytest.raises(SaigaError, match=r"records:12: Message 2 is part of a function call"):
        encoding.encode_rows(
            [{"messages": CONVERSATION}, {"messages": MESSAGES}], tokenizer, label=lambda index: f"records:{index + 11}"
        )


TWICE = [*CONVERSATION, {"role": "user", "content": "А ещё?"}, {"role": "assistant", "content": "И ещё."}]


def test_an_answer_with_weight_0_is_not_trained_and_templates_do_not_see_the_weight():
    told = CHATML.replace("+ message['content'] +", "+ message['content'] + ('!' if 'weight' in message else '') +")
    assert told != CHATML
    for tokenizer in (chatml(), chatml(told)):
        whole = encode(TWICE, tokenizer)
        made = encode([*TWICE[:2], {**TWICE[2], "weight": 0}, *TWICE[3:]], tokenizer)
        assert made["input_ids"] == whole["input_ids"]
        assert learned(made) == learned(whole)[len(learned(encode(TWICE[:3], tokenizer))) :]
    assert encode(TWICE, chatml()) == whole  # the shape with a weight is another one


def test_each_answer_is_a_row_if_the_final_turn_is_rendered_differently():
    tokenizer = chatml(THOUGHTFUL)
    assert THOUGHTFUL != CHATML
    with pytest.raises(SaigaError, match="turn by turn"):
        encode(TWICE, tokenizer)
    ((first, last),) = encoding.encode_rows([{"messages": TWICE}], tokenizer)
    assert first == encode(TWICE[:3], tokenizer)
    think = tokenizer.special_tokens["<think>"]
    for row, count in ((first, 3), (last, 5)):
        asked = encode(TWICE[: count - 1], tokenizer, add_generation_prompt=True)["input_ids"]
        assert row["input_ids"][: len(asked)] == asked
        assert row["labels"][len(asked)] == think
        assert row["input_ids"].count(think) == 1
    assert tokenizer.decode(learned(last)) == "И ещё."


def test_an_untrained_answer_has_the_same_ids_as_in_a_prompt():
    """Its text begins with a line end, which would merge with the previous one."""
    tokenizer = chatml()
    messages = [*TWICE[:2], {**TWICE[2], "content": "\n\nДа"}, *TWICE[3:]]
    asked = encode(messages[:4], tokenizer, add_generation_prompt=True)["input_ids"]
    for weight in (0, 1):
        made = encode([*messages[:2], {**messages[2], "weight": weight}, *messages[3:]], tokenizer)
        assert made["input_ids"][: len(asked)] == asked
    assert encode([{**each, "weight": 0} for each in messages[:4]], tokenizer, add_generation_prompt=True) == encode(
        messages[:4], tokenizer, add_generation_prompt=True
    )


def test_a_cached_refusal_keeps_no_conversation_alive():
    class Text(str):
        pass

    content = Text("слово")
    alive = weakref.ref(content)
    messages = [{**TWICE[0], "content": content}, *TWICE[1:]]
    tokenizer = chatml(THOUGHTFUL)
    for _ in range(2):
        with pytest.raises(SaigaError, match="turn by turn"):
            encode(messages, tokenizer)
    del content, messages
    gc.collect()
    assert alive() is None


def test_only_the_last_of_the_rows_over_the_limit_is_made(monkeypatch):
    tokenizer, encoded = chatml(THOUGHTFUL), []
    turns = [turn for _ in range(30) for turn in TWICE[3:]]
    ((first, second, *_),) = encoding.encode_rows([{"messages": turns}], tokenizer)
    limit = len(second["input_ids"])
    whole = encoding.encode
    monkeypatch.setattr(encoding, "encode", lambda *a, **k: encoded.append(1) or whole(*a, **k))
    (made,) = encoding.encode_rows([{"messages": turns}], tokenizer, limit=limit)
    assert made[:-1] == [first, second]
    assert len(made[-1]["input_ids"]) > 10 * limit
    assert len(encoded) == 4


def test_rejects_a_template_whose_prompt_is_never_a_prefix_and_names_the_message():
    other_prompt = CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>bot\n' }}")
    with pytest.raises(SaigaError, match=r"conversation 1: .*turn by turn.* the prompt for messages\[2\]"):
        encoding.encode_rows([{"messages": TWICE}], chatml(other_prompt))
    with pytest.raises(SaigaError, match=r"turn by turn.* the prompt for messages\[1\]"):
        encode([{"role": "user", "content": ""}, TWICE[2]], chatml(other_prompt))


# As Mistral-Nemo's own: the system prompt is rendered if the last message is the user's, so only in a prompt.
NEMO = """
{%- set system = messages[0].content if messages[0].role == 'system' %}
{%- for message in (messages[1:] if system else messages) %}
    {%- if message.role == 'user' and loop.last and system %}{{- '<think>' + system + '\n\n' + message.content }}
    {%- elif message.role == 'user' %}{{- '<think>' + message.content }}
    {%- else %}{{- '<|im_start|>' + message.content + '<|im_end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>' }}{%- endif %}"""


def test_a_system_prompt_that_only_prompts_have_is_trained_as_they_have_it():
    tokenizer = chatml(NEMO)
    assert "Сайга" not in template.render(TWICE, NEMO)
    ((first, last),) = encoding.encode_rows([{"messages": TWICE}], tokenizer)
    assert first == encode(TWICE[:3], tokenizer)
    assert tokenizer.decode(first["input_ids"]) == "Ты — Сайга.\n\nПриветЗдравствуй!"
    assert tokenizer.decode(last["input_ids"]) == "ПриветЗдравствуй!Ты — Сайга.\n\nА ещё?И ещё."
    for row, count in ((first, 3), (last, 5)):
        asked = encode(TWICE[: count - 1], tokenizer, add_generation_prompt=True)["input_ids"]
        assert row["input_ids"][: len(asked)] == asked
        assert row["labels"][len(asked) :] == row["input_ids"][len(asked) :]
        assert tokenizer.decode(learned(row)) == TWICE[count - 1]["content"]
    assert encoding.encode_rows([{"messages": TWICE[1:]}], tokenizer) == [[encode(TWICE[1:], tokenizer)]]


@pytest.mark.parametrize("text", ["<|im_end|>", "<think>", "Привет", "Здравствуй!", " "])
def test_texts_stay_texts_where_an_answer_follows_its_prompt(text):
    tokenizer = chatml(NEMO)
    special = set(tokenizer.special_tokens.values())
    messages = [{**each, "content": text} for each in TWICE]
    ((first, last),) = encoding.encode_rows([{"messages": messages}], tokenizer)
    for row, count, of_template in ((first, 2, 3), (last, 4, 6)):
        asked = encode(messages[:count], tokenizer, add_generation_prompt=True)["input_ids"]
        assert row["input_ids"][: len(asked)] == asked
        assert tokenizer.decode(learned(row)) == text
        assert len([i for i in row["input_ids"] if i in special]) == of_template


def test_rejects_a_system_prompt_that_an_answer_after_a_call_would_lack():
    """Then the result of the call is the last message, so not even a prompt has the system prompt."""
    told = [{"role": "system", "content": "Ты — Сайга."}, *MESSAGES]
    calling = NEMO.replace(
        "+ '<|im_end|>'", "+ (message.tool_calls | tojson if message.tool_calls else '') + '<|im_end|>'"
    )
    tokenizer = chatml("{{ tools | tojson if tools }}" + calling)
    assert len(encoding.encode_rows([{"messages": told[1:], "tools": TOOLS}], tokenizer)[0]) == 1
    with pytest.raises(SaigaError, match=r"leaves out messages\[0\]\.content"):
        encoding.encode_rows([{"messages": told, "tools": TOOLS}], tokenizer)


def test_rejects_a_template_that_changes_an_answer_that_follows_its_prompt():
    with pytest.raises(SaigaError, match="changes contents beyond trimming"):
        encode(
            CONVERSATION,
            chatml(NEMO.replace("message.content + '<|im_end|>'", "message.content | upper + '!<|im_end|>'")),
        )
    with pytest.raises(SaigaError, match="changes contents beyond trimming"):
        encode(CONVERSATION, chatml(NEMO.replace("+ system +", "+ system | upper +")))
