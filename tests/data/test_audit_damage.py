"""Find damaged texts, and no sound ones."""

import pytest

from saigakit.data import audit


def kinds(text):
    return audit.find_damage([{"role": "user", "content": "да"}, {"role": "assistant", "content": text}])


@pytest.mark.parametrize("encoding", ["cp1251", "cp1252", "latin-1"])
@pytest.mark.parametrize("text", ["Привет", "при", "Да", "Что это?", "Київ і Львів", "Ёлка", "ТЕСТ", "слово — дело"])
def test_finds_utf_8_read_in_a_wrong_encoding(text, encoding):
    assert "mojibake" in kinds(text.encode().decode(encoding, "replace"))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("РџСЂРёРІРµС‚", "mojibake"),
        ("Ð¿ÑÐ¸", "mojibake"),
        ("donâ€™t", "mojibake"),
        ("donвЂ™t", "mojibake"),
        ("слово\x96дело", "mojibake"),
        ("сло\ufffdо", "replaced"),
        ("да\x00", "control"),
        ("да\x1b[0m", "control"),
        ("мои\u0306", "decomposed"),
        ("Е\u0308лка", "decomposed"),
        ("і\u0308жак", "decomposed"),
    ],
)
def test_names_the_kind_of_damage(text, kind):
    assert kinds(text) == {kind}


@pytest.mark.parametrize(
    "text",
    [
        "Съешь ещё этих мягких французских булок, да выпей чаю… «ёлка» — № 5",
        "СССР… «СРСР» РСФСР» С’ Р–С РЁВ СЁСТРЫ",
        "СІРІСІНЬКИЙ ЇЖАК, РІЧ, СІЧ, РЄ, ґанок, об’єкт",
        "УСЁ Ў ПАРАДКУ, Беларусь, у́рок, ў, ЁСЦЬ",
        "за́мок и замо́к, +10 С°, ±5 µm, § 3 © ® ™ € 100 ‰",
        "L’été à Noël, ça va, garçon, cœur, où, naïf, Ô, «É»",
        "AÑO ESPAÑA «Ñ» SÃO NÃO MAÇÃ» Þórð MEÐ Ångström",
        "def f():\n\treturn '\\x00' if x[0] ^ ~y else \"\\ufffd\"\x0c\r\n",
        "[a-zA-ZäöüßÄÖÜàâéèêëïîôûùçÐÑÒÃ]",
        "Сјајно Рјешење, Срђан, Ђорђе",
        "日本語 한국어 😀 👩\u200d💻 С\xa0Р",
    ],
)
def test_sound_texts_are_not_damaged(text):
    assert kinds(text) == set()


def test_arguments_of_calls_are_read_too():
    call = {"function": {"name": "f", "arguments": '{"что": "РџСЂРёРІРµС‚"}'}}
    assert audit.find_damage([{"role": "assistant", "content": "", "tool_calls": [call]}]) == {"mojibake"}


def test_each_kind_has_a_warning_in_both_languages_with_count_and_places():
    found = dict.fromkeys(("mojibake", "replaced", "control", "decomposed"), (2000, ["a.jsonl:1", "a.jsonl:7"]))
    made = list(audit.damage_warnings(found))
    assert len(made) == 4
    for warning in made:
        russian, english = warning.split(" · ")
        assert "2,000" in russian and "2,000" in english and english.endswith(": a.jsonl:1, a.jsonl:7")
        assert not any("а" <= letter <= "я" for letter in english)
