"""Mask texts and fill them in after a template has changed the placeholders."""

import json

import pytest
from chatml import CALL, MESSAGES, TOOLS

from saigakit.prompt import placeholders, template


def test_only_json_schema_keywords_are_left_unmasked():
    masked = placeholders.mask(MESSAGES, TOOLS)
    left = json.dumps([masked.messages, masked.tools], ensure_ascii=False)
    assert not any(text in left for text in masked.texts)
    assert not any(text in left for text in ("</s>", "<s>", "найти", "ключ", "Ищет"))
    assert masked.tools[0]["function"]["parameters"]["type"] == "object"
    assert masked.messages[1]["tool_calls"][0]["id"] == "abc123456"
    assert masked.messages[1]["content"] == ""


def test_each_text_has_its_path():
    masked = placeholders.mask(MESSAGES, TOOLS)
    found = dict(zip(masked.paths, masked.texts, strict=True))
    assert found["messages[0].content"] == "Найди"
    assert found["tools[0].function.name"] == "найти"
    assert found["messages[1].tool_calls[0].function.arguments.<s>ключ[0]"] == "</s>"


def test_a_call_id_with_other_characters_than_letters_and_digits_is_masked():
    call = {**CALL, "id": "</s>"}
    masked = placeholders.mask([{"role": "assistant", "content": "", "tool_calls": [call]}], TOOLS)
    assert "</s>" in masked.texts
    assert masked.messages[0]["tool_calls"][0]["id"] != "</s>"


def test_conversations_have_equal_keys_only_if_their_shapes_are_equal():
    def key(*contents):
        return placeholders.mask([{"role": "user", "content": content} for content in contents], None).key

    assert key("а", "б") == key("в", "</s>")
    assert key("а", "б") != key("а", "")
    assert key("а") != key("а", "б")


def rendered(text, value):
    """Render `value` directly and through placeholders."""
    masked = placeholders.mask([{"role": "user", "content": value}], None)
    through = placeholders.make_filler(template.render(masked.messages, text, masked=True))(masked.texts)
    return template.render([{"role": "user", "content": value}], text), through


@pytest.mark.parametrize(
    "value", ['"кавычки" \\ и\nстрока', "  пробелы \t", "\u205f\U000f0000\U000f0001", "\x00\x1f\u2028"]
)
@pytest.mark.parametrize(
    "text",
    [
        "{{ messages[0].content }}",
        "[{{ messages[0].content | trim }}]",
        "[{{ messages[0].content.lstrip() }}|{{ messages[0].content.rstrip() }}]",
        "{{ messages[0].content | tojson }}",
        "{{ messages[0] | tojson(indent=2) }}",
        "{{ {'a': [messages[0].content, 'б']} | tojson | tojson }}",
        "{{ ('«' + messages[0].content + '»') | tojson | tojson | tojson }}",
        "{{ messages[0].content | trim | tojson }}",
        "{{ messages[0].content }}{{ messages[0].content }}",
    ],
)
def test_filling_in_gives_the_text_rendered_without_placeholders(text, value):
    plain, through = rendered(text, value)
    assert through == plain


def test_text_like_a_placeholder_in_json_is_unchanged_without_masking():
    value = "\u205f\U000f00000\U000f0001\u205f"
    assert template.render([{"role": "user", "content": value}], "{{ messages[0].content | tojson }}") == f'"{value}"'


def test_finds_the_placeholders_in_a_rendered_text():
    masked = placeholders.mask(MESSAGES, None)
    text = template.render(masked.messages, "{{ messages[0].content }}{{ messages[3].content | tojson }}", masked=True)
    assert {masked.paths[number] for number in placeholders.find_placeholders(text)} == {
        "messages[0].content",
        "messages[3].content",
    }
