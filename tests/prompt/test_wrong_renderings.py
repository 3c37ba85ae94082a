"""Compare the shown renderings with ids measured on the real Llama-2 vocabulary."""

import copy
from contextlib import closing
from pathlib import Path

import pytest
from transformers import LlamaTokenizer

from saigakit import export, infer
from saigakit.prompt import encoding, template, wrong_renderings
from saigakit.prompt.backends import from_sentencepiece
from saigakit.prompt.encoding import FastTokenizer, encode
from saigakit.registry import MODELS

LLAMA2 = Path(__file__).parents[3] / "shared" / "tokenizers" / "llama-2.model"
QUESTION = wrong_renderings.DIALOGUE[:2]
SAID = [30041, 29982, 813, 5212, 29977, 1779, 29889]  # "Ты — Сайга." after a line end
SAID_APART = [1703, *SAID[1:]]


@pytest.fixture(scope="module")
def llama2() -> FastTokenizer:
    if not LLAMA2.is_file():
        pytest.skip(f"the Llama-2 vocabulary is not at {LLAMA2}")
    saiga2 = template.read_chat_template(MODELS["saiga2_7b"], Path())
    return FastTokenizer(from_sentencepiece(LLAMA2), saiga2, {"bos_token": "<s>", "eos_token": "</s>"})


@pytest.fixture(scope="module")
def tiny_tokenizer(tiny) -> FastTokenizer:
    return encoding.load_tokenizer("saiga_tiny")


@pytest.fixture(scope="module")
def byte_level(smollm2) -> FastTokenizer:
    return encoding.load_tokenizer("smollm2_135m")


def ids_of(tokenizer, name) -> list[int]:
    (found,) = [each.ids for each in wrong_renderings.list_renderings(tokenizer) if name in each.name]
    return found


def row_of(tokenizer, name) -> tuple[str, ...]:
    (found,) = [row for row in wrong_renderings.compare(tokenizer).rows if name in row[0]]
    return found


def test_our_own_rendering_has_no_differences(tiny_tokenizer):
    _, shown, differences, problem = row_of(tiny_tokenizer, "saigakit")
    assert shown and (differences, problem) == ("0", "ничего · nothing")


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("saigakit", [1, 1788, 13, *SAID, 2, 29871, 13, 1, 1404, 13, 30013, 641, 7616, 2, 29871, 13, 1, 9225, 13]),
        ("second BOS", [1, 1, 1788, 13, *SAID, 2, 29871, 13, 1, 1404, 13, 30013, 641, 7616, 2, 29871, 13, 1, 9225, 13]),
        ("legacy=False", [1, 5205, 13, *SAID, 2, 13, 1, 1792, 13, 30013, 641, 7616, 2, 13, 1, 7451, 13]),
        ("interact_llamacpp", [1, 1788, 13, *SAID_APART, 2, 1, 1404, 13, 7203, 7616, 2, 1, 9225, 13]),
        ("another vocabulary", [1, 1587, 13, *SAID_APART, 2, 1, 2188, 13, 7203, 7616, 2, 1, 12435, 13]),
    ],
)
def test_each_rendering_has_the_ids_measured_on_llama_2(llama2, name, ids):
    assert ids_of(llama2, name) == ids


def test_transformers_without_legacy_gives_the_ids_shown_for_it(llama2, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(LLAMA2.read_bytes())
    text = template.render(QUESTION, llama2.chat_template, add_generation_prompt=True, variables=dict(llama2.variables))
    theirs = LlamaTokenizer.from_pretrained(tmp_path).encode(text, add_special_tokens=False)
    assert ids_of(llama2, "legacy=False") == theirs


def test_the_first_difference_is_shown_with_its_tokens_and_position(llama2):
    _, shown, differences, cost = row_of(llama2, "another vocabulary")
    assert shown == "1 <s> 1587 ния 13 \\n 1703 ▁Т 29982 ы 813 ▁—"
    assert differences == "14, с позиции · from position 2"
    assert "ния, ▁бы, ▁apart" in cost
    assert row_of(llama2, "second BOS")[2] == "1, с позиции · from position 1"
    assert row_of(llama2, "legacy=False")[2] == "5, с позиции · from position 2"


def test_the_header_of_each_role_is_shown_as_the_template_writes_it(llama2):
    assert wrong_renderings.role_ids(llama2).rows == [
        ("system", "1 1788 13", "<s> ▁system \\n"),
        ("user", "1 1404 13", "<s> ▁user \\n"),
        ("assistant", "1 9225 13", "<s> ▁bot \\n"),
    ]


@pytest.mark.parametrize("name", ["llama2", "tiny_tokenizer", "byte_level"])
def test_training_has_the_shown_headers_in_this_order(name, request):
    tokenizer = request.getfixturevalue(name)
    trained = " ".join(map(str, encode(wrong_renderings.DIALOGUE, tokenizer)["input_ids"]))
    place = -1
    for _, ids, _ in wrong_renderings.role_ids(tokenizer).rows:
        place = trained.index(ids, place + 1)


@pytest.mark.parametrize("name", ["llama2", "tiny_tokenizer", "byte_level"])
def test_the_first_rendering_is_that_of_training(name, request):
    tokenizer = request.getfixturevalue(name)
    ours = wrong_renderings.list_renderings(tokenizer)[0].ids
    assert encode(wrong_renderings.DIALOGUE, tokenizer)["input_ids"][: len(ours)] == ours


def test_a_byte_level_vocabulary_has_no_prefix_space_to_lose(byte_level):
    _, shown, differences, cost = row_of(byte_level, "legacy=False")
    assert (shown, differences, cost) == ("те же id · the same ids", "0", "ничего · nothing")


def test_role_ids_beyond_this_vocabulary_are_shown_as_numbers(tiny_tokenizer):
    _, shown, _, cost = row_of(tiny_tokenizer, "another vocabulary")
    assert shown.startswith("1 <s> 1788 13 \\n")
    assert "1788, 1404, 9225" in cost


def test_without_a_bos_there_is_no_second_bos(byte_level):
    without = copy.copy(byte_level)
    without.variables = {}
    assert [each for each in wrong_renderings.list_renderings(without) if "BOS" in each.name] == []


def test_llama_cpps_tokenizer_gives_the_same_tables(tiny_tokenizer, tmp_path):
    file = export.to_gguf(model="saiga_tiny", adapter=None, output=tmp_path / "x.gguf", quant_type="Q8_0")
    with closing(infer.load(file, n_ctx=64)) as llm:
        found = encoding.load_gguf_tokenizer(llm)
        assert str(wrong_renderings.compare(found)) == str(wrong_renderings.compare(tiny_tokenizer))
        assert str(wrong_renderings.role_ids(found)) == str(wrong_renderings.role_ids(tiny_tokenizer))


@pytest.mark.parametrize("table", [wrong_renderings.compare, wrong_renderings.role_ids])
def test_a_notebook_shows_every_row_and_escapes_special_tokens(tiny_tokenizer, table):
    page = table(tiny_tokenizer)._repr_html_()
    assert page.count("<tr>") == len(table(tiny_tokenizer).rows) + 1
    assert "&lt;s&gt;" in page
    assert "<s>" not in page


def test_a_template_without_a_system_role_has_both_tables(tiny):
    ours = encoding.load_tokenizer("saiga_tiny")
    refusing = "{%- if messages[0].role == 'system' -%}{{ raise_exception('no system') }}{%- endif -%}"
    raw = encoding.from_sentencepiece(tiny / "base" / "tokenizer.model")
    other = encoding.FastTokenizer(raw, refusing + ours.chat_template, ours.variables)
    assert [row[0] for row in wrong_renderings.role_ids(other).rows] == ["user", "assistant"]
    assert wrong_renderings.compare(other).rows
