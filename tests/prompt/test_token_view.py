"""Show pieces with their ids, special tokens and trained tokens."""

import pytest
import tokenizers

from saigakit.prompt import encoding, token_view

DIALOGUE = [
    {"role": "user", "content": "Что такое </s> и <b>? 🙂"},
    {"role": "assistant", "content": "Конец."},
    {"role": "user", "content": "Точно?"},
    {"role": "assistant", "content": "Да."},
]


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return encoding.load_tokenizer("saiga_tiny")


def test_shows_the_ids_and_the_trained_tokens_of_training(tokenizer):
    example = encoding.encode(DIALOGUE, tokenizer)
    shown = token_view.show({"messages": DIALOGUE}, tokenizer).pieces
    assert [token_id for piece in shown for token_id in piece.ids] == example["input_ids"]
    learned = [piece.is_trained for piece in shown for _ in piece.ids]
    assert learned == [label != encoding.IGNORE_INDEX for label in example["labels"]]


def test_only_special_tokens_of_the_template_are_shown_as_special(tokenizer):
    shown = token_view.show({"messages": DIALOGUE}, tokenizer).pieces
    special = [piece.text for piece in shown if piece.is_special]
    assert special == ["<s>", "</s>"] * 4
    assert "</s>" in "".join(piece.text for piece in shown if not piece.is_special)


def test_a_character_of_several_tokens_is_one_piece(tokenizer):
    smile = next(piece for piece in token_view.show({"messages": DIALOGUE}, tokenizer).pieces if "🙂" in piece.text)
    assert (smile.text, len(smile.ids)) == ("🙂", 4)


def test_a_byte_level_tokenizer_is_shown_in_cyrillic():
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw = tokenizers.Tokenizer(models.BPE({character: index for index, character in enumerate(sorted(alphabet))}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    byte_level = encoding.FastTokenizer(raw, chat_template, {})
    shown = token_view.show({"messages": DIALOGUE}, byte_level).pieces
    text = "".join(piece.text for piece in shown)
    assert text == "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in DIALOGUE).strip(" ")
    assert ("Ч", 2) in [(piece.text, len(piece.ids)) for piece in shown]


def test_a_replacement_character_in_a_text_hides_nothing(tokenizer):
    dialogue = [{"role": "user", "content": "\ufffd\ufffd конец"}, DIALOGUE[1]]
    shown = token_view.show({"messages": dialogue}, tokenizer).pieces
    assert max(len(piece.ids) for piece in shown) == 4
    assert "\ufffd\ufffd конец" in "".join(piece.text for piece in shown)
    assert [i for piece in shown for i in piece.ids] == encoding.encode(dialogue, tokenizer)["input_ids"]


def test_the_terminal_shows_pieces_with_ids_and_stars_after_trained_ones(tokenizer):
    lines = str(token_view.show({"messages": [{"role": "user", "content": "Да"}, DIALOGUE[1]]}, tokenizer)).splitlines()
    start, end, user = tokenizer.special_tokens["<s>"], tokenizer.special_tokens["</s>"], tokenizer.encode_text("user")
    assert lines[0] == f"<s>[{start}] ␣user[{user[0]}] ⏎[13]"
    assert f"</s>[{end}]* " in lines[3]
    assert "*" not in "".join(lines[:3])
    assert lines[-1].startswith("* обучается · trained: ")


def test_the_notebook_escapes_texts_and_has_a_bilingual_legend(tokenizer):
    page = token_view.show({"messages": DIALOGUE}, tokenizer)._repr_html_()
    assert "&lt;s&gt;" in page
    assert "<s>" not in page
    assert "<b>" not in page
    for words in ("обучается · trained", "спецтокен · special token", "только контекст · context only"):
        assert page.count(words) == 1


def test_only_long_untrained_stretches_of_marked_texts_are_shortened(tokenizer):
    messages = [{"role": "user", "content": "а" * 2000}, {"role": "assistant", "content": "<b>" + "в" * 2000}]
    marked = token_view.mark([{"messages": messages}], tokenizer)
    assert f"⟦<b>{'в' * 2000}</s>⟧" in str(marked)
    assert "а" * 500 not in str(marked)
    assert " … " in str(marked)
    assert f"&lt;b&gt;{'в' * 2000}&lt;/s&gt;</span>" in marked._repr_html_()


def test_a_conversation_is_shown_with_its_tools(tokenizer):
    tools = [{"type": "function", "function": {"name": "найти"}}]
    shown = str(token_view.mark([{"messages": DIALOGUE, "tools": tools}], tokenizer))
    assert '"name": "найти"' in shown
