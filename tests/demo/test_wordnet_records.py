import json
import re
import sqlite3
from contextlib import closing
from itertools import chain

import pytest

from saigakit.demo import packages, wordnet_records
from saigakit.demo.wordnet_records import INSTRUCTION, SEEN, UNSEEN
from saigakit.errors import SaigaError

SYLLABLES = ("ва", "го", "ди", "же", "зу", "ки", "лё", "мы", "но", "пя", "ра", "си")


def synset(lemma, text):
    return lemma, f"{lemma}~ru~{lemma}~ru~{text}~1~2#другой~ru~другой~ru~второе значение слова~3~4"


def word(number):
    """A word for a number that never occurs in the sentences."""
    return "щ" + "".join(SYLLABLES[number // 12**place % 12] for place in range(3))


@pytest.fixture
def wordnet(tmp_path, monkeypatch):
    """A function that makes a small WordNet in the format of the packaged one."""

    def make(rows):
        file = tmp_path / "wordnet.db"
        with closing(sqlite3.connect(file)) as database:
            database.execute("CREATE TABLE synsets (synset_id INTEGER, lemma TEXT, definition TEXT)")
            numbered = [(index, lemma, text) for index, (lemma, text) in enumerate(rows)]
            database.executemany("INSERT INTO synsets VALUES (?, ?, ?)", numbered)
            database.commit()
        monkeypatch.setattr(packages, "package_file", lambda wanted: file)

    return make


@pytest.fixture
def thousand(wordnet):
    """1500 pairs; each of the first 900 definitions contains the term of another pair."""
    wordnet(
        synset(word(i), f"вещь {word(i)[1:]} {word(i + 500) if i < 900 else 'годная'} из дерева") for i in range(1500)
    )


@pytest.fixture(scope="module")
def packaged(callers_cache):
    """The (term, definition) pairs of the real WordNet."""
    try:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("SAIGAKIT_CACHE", str(callers_cache))
            return wordnet_records.definitions()
    except SaigaError as error:
        pytest.skip(f"the packaged WordNet is not available here: {error}")


def written(directory, **counts):
    return [
        [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").split("\n") if line]
        for file in wordnet_records.write_records(directory, **counts)
    ]


def parts(messages):
    return messages[1]["content"], json.loads(messages[2]["content"])


@pytest.mark.parametrize(
    ("text", "definition"),
    [
        ("{{разг.|ru}}, {{устар.}} [[кусок]] [[ткань|ткани]] {{пример|Вот {{выдел|он}}.}}", "кусок ткани"),
        ("сто́ящий ''очень'' дорого<sup>2</sup>, ценный.", "стоящий очень дорого2, ценный"),
        ("{{наречие|смелый}}; без страха и сомнений; смело", "без страха и сомнений"),
        ("{{разг.}}-{{сниж.}} кормить кого-либо досыта", "кормить кого-либо досыта"),
        ("место {{семантика|синонимы=-}} {{пример|}}", "место"),
    ],
)
def test_a_definition_is_the_first_sense_without_labels_and_markup(text, definition):
    assert wordnet_records._plain(synset("слово", text)[1]) == definition


@pytest.mark.parametrize(
    ("lemma", "text"),
    [
        ("ход", "перемещение фигуры на доске"),  # a term of three letters
        ("Москва", "столица большой северной страны"),
        ("дом", "здание"),
        ("ткань", "изделие"),  # too short
        ("ткань", "изделие из нитей, которое получают на ткацком станке"),  # too long
        ("бегун", "бегун на длинные дистанции"),  # the term itself
        ("беслановка", "жительница города {{=|Беслан}} и окрестностей"),  # a template in the middle
        ("автор", "и создатель какой-либо вещи"),  # continues something
        ("залив", "большое скопление такой жидкости"),  # refers to another sense
        ("ломать", "о чём-либо твёрдом, прочном"),
        ("пахтать", "действие по глаголу пахтать"),
        ("бежать", "быстро двигаться куда-л"),  # cut off
        ("хлорит", "соль кислоты HClO"),
        ("скобка", "знак (обычно круглый) при письме"),
        ("грубость", "{{груб.|ru}} слово для брани вслух"),
        ("шибко", "{{прост.|ru}} очень сильно и быстро"),
    ],
)
def test_an_unclean_pair_is_left_out(wordnet, lemma, text):
    wordnet([synset(lemma, text), synset("ступня", "нижняя часть ноги человека")])
    assert wordnet_records.definitions() == [("ступня", "нижняя часть ноги человека")]


def test_terms_and_definitions_are_unique(wordnet):
    wordnet(
        [
            synset("ступня", "нижняя часть ноги человека"),
            synset("ступня", "подошва обуви или лапы"),
            synset("стопа", "нижняя часть ноги человека"),
        ]
    )
    assert wordnet_records.definitions() == [("ступня", "нижняя часть ноги человека")]


def test_a_coarse_word_is_left_out_in_all_its_senses(wordnet):
    wordnet([synset("рыло", "передняя часть головы животного"), synset("рыло", "{{вульг.|ru}} лицо")])
    assert wordnet_records.definitions() == []


@pytest.mark.parametrize(
    "text",
    [
        "{{помета|разг., вульг.}} часть животного",
        "{{зоол.|ru}}, {{комп. жарг.|ru}} часть животного",
        "часть животного, [[половой|половые]] органы",
        "проститу́тка",
    ],
)
def test_a_label_or_a_stem_in_any_sense_makes_a_term_coarse(wordnet, text):
    wordnet([synset("рыло", "передняя часть головы животного"), synset("рыло", text)])
    assert wordnet_records.definitions() == []


@pytest.mark.parametrize(
    ("term", "definition"),
    [
        ("лексика", "совокупность слов языка"),
        ("половодье", "разлив реки при таянии снега"),
        ("пустырь", "место, где легко заблудиться"),
        ("громкость", "сила негромкого звука"),
        ("вода", "прозрачная бесцветная жидкость"),
        ("секстет", "ансамбль из шести музыкантов"),
    ],
)
def test_a_word_that_only_contains_a_coarse_stem_is_kept(wordnet, term, definition):
    wordnet([synset(term, definition)])
    assert wordnet_records.definitions() == [(term, definition)]


def test_examples_do_not_make_a_term_coarse(wordnet):
    wordnet([synset("ступня", "нижняя часть ноги человека {{пример|Он {{выдел|голый}}.|Дурак}}")])
    assert wordnet_records.definitions() == [("ступня", "нижняя часть ноги человека")]


def test_every_record_consists_of_instruction_text_and_items(thousand, tmp_path):
    for messages in chain(*written(tmp_path, train=60, held_out=20)):
        assert [message["role"] for message in messages] == ["system", "user", "assistant"]
        assert messages[0]["content"] == INSTRUCTION
        assert all(set(item) == {"term", "definition"} for item in parts(messages)[1])


def test_items_are_quoted_verbatim_in_the_order_of_the_text(thousand, tmp_path):
    for text, items in map(parts, chain(*written(tmp_path, train=300, held_out=60))):
        end = 0
        for item in items:
            term = re.search(rf"(?<![А-Яа-яё]){item['term']}(?![А-Яа-яё])", text[end:])
            assert term is not None, (text, item)
            found = text.index(item["definition"], end + term.end())
            assert text[found + len(item["definition"])] == "."
            end = found + len(item["definition"])


def test_the_first_text_of_each_file_is_one_plain_definition(thousand, tmp_path):
    for rows in written(tmp_path, train=40, held_out=20):
        text, [item] = parts(rows[0])
        assert text == f"{item['term']} — это {item['definition']}."


def test_a_quarter_of_the_texts_defines_nothing(thousand, tmp_path):
    for rows in written(tmp_path, train=200, held_out=80):
        assert sum(items == [] for _, items in map(parts, rows)) == len(rows) / 4


def test_no_text_is_written_twice(thousand, tmp_path):
    texts = [text for text, _ in map(parts, chain(*written(tmp_path, train=400, held_out=80)))]
    assert len(set(texts)) == len(texts) == 480


def held_out_terms(rows):
    found = set()
    for text, items in map(parts, rows):
        found |= {item["term"].lower() for item in items}
        found |= set(re.findall(r"(?:Слово «|упоминается )([а-яё]+)", text))
    return found


def test_no_term_of_an_evaluation_text_occurs_in_training(thousand, tmp_path):
    train, held_out = written(tmp_path, train=400, held_out=80)
    words = set(re.findall(r"[а-яё]+", " ".join(text for text, _ in map(parts, train)).lower()))
    assert held_out_terms(held_out)
    assert not held_out_terms(held_out) & words


def shape(pattern):
    return re.sub(r"\\{[Ttd]\\}", "[А-Яа-яё, -]+", re.escape(pattern))


def test_half_of_the_evaluation_texts_have_unseen_phrasings_and_fillers(thousand, tmp_path):
    train, held_out = written(tmp_path, train=200, held_out=80)
    unseen = re.compile("|".join(shape(pattern) for pattern in (*UNSEEN.phrasings, *UNSEEN.fillers)))
    seen = re.compile("|".join(shape(pattern) for pattern in (*SEEN.phrasings[3:], *SEEN.fillers)))
    assert not any(unseen.search(text) for text, _ in map(parts, train))
    assert all(unseen.search(text) and not seen.search(text) for text, _ in map(parts, held_out[40:]))


def test_the_same_seed_writes_the_same_bytes(thousand, tmp_path):
    first = wordnet_records.write_records(tmp_path / "a", train=40, held_out=8)
    second = wordnet_records.write_records(tmp_path / "b", train=40, held_out=8)
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]
    other = wordnet_records.write_records(tmp_path / "c", train=40, held_out=8, seed=8)
    assert other[0].read_bytes() != first[0].read_bytes()


def test_too_many_records_are_refused_and_nothing_is_written(thousand, tmp_path):
    with pytest.raises(SaigaError, match="ask for fewer"):
        wordnet_records.write_records(tmp_path / "records", train=5000)
    assert not (tmp_path / "records").exists()


def test_the_packaged_wordnet_gives_thousands_of_pairs_in_plain_russian(packaged):
    assert 4_000 <= len(packaged) <= 11_000
    assert all(re.fullmatch(r"[а-яё]{4,14}", term) for term, _ in packaged)
    assert all(re.fullmatch(r"[а-яё, -]{1,30}", definition) for _, definition in packaged)
    assert len({definition for _, definition in packaged}) == len(packaged)


def test_the_first_texts_each_define_a_plain_noun(packaged, tmp_path, monkeypatch):
    monkeypatch.setattr(wordnet_records, "definitions", lambda: packaged)
    train, held_out = written(tmp_path)
    assert (len(train), len(held_out)) == (640, 200)
    assert train[0][1]["content"] == "Весы — это прибор для измерения массы."
    assert held_out[0][1]["content"] == "Биология — это наука о живой природе."


def test_the_packaged_pairs_contain_no_coarse_word(packaged):
    coarse = re.compile(r"\b\w*(?:хуй|пизд|дерьм|жоп|проститу|сексуал|порногр|оргазм|наркоти|идиот)")
    assert [pair for pair in packaged if coarse.search(" ".join(pair))] == []
