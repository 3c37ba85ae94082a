"""Compare llama.cpp's tokenizer with that of training on every kind of vocabulary."""

import json
import random
import shutil
from contextlib import closing
from pathlib import Path

import pytest
import small_models
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from saigakit import export, infer
from saigakit.errors import SaigaError
from saigakit.prompt import encoding
from saigakit.prompt.backends import TOKENIZER_JSON_KEY

LLAMA2 = Path(__file__).parents[3] / "shared" / "tokenizers" / "llama-2.model"
CONVERSATION = [
    {"role": "system", "content": "Ты — Сайга."},
    {"role": "user", "content": "Сколько будет 12345 + 678?\n\n\tОтвет: </s> <s>"},
    {"role": "assistant", "content": "13 023 🙂"},
    {"role": "user", "content": "Ещё раз…"},
]
CHATML = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
PIECES = (
    *("Привет", "мир", "ёлка", "съешь", "Я", "THE", "Quick", "don't", "I'LL", "return x", "2e-4", "007", "12345"),
    *(" ", " ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", ",", ".", "—", "«»", "№", "₽", "🙂", "漢字", "\u00a0", "/"),
    *("</s>", "<s>", "<unk>", "<0x0A>", "[INST]", "bot\n", "<|im_end|>", "!!!", "://"),
)
# As the tokenizer.json files of Llama 3, Qwen 2 and 3, and Mistral Nemo have them.
SPLITS = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "tekken": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}

TAKES_WORDS = ("llama-bpe", "tekken")  # with "ignore_merges" in the files of Llama 3 and Mistral Nemo, not in Qwen's
RUSSIAN = (
    "Терминологический словарь: определение понятия",
    "клавиатура, калавишный инструмент и за\u0301мок",
    "Наименьшее общее кратное чисел 12 и 12345",
    "съешь ещё этих мягких\nфранцузских булок, да выпей чаю; новая клавиатура",
)


def texts(count=300):
    rng = random.Random(5)
    return ["".join(rng.choices(PIECES, k=rng.randint(1, 14))) for _ in range(count)]


def splitter(name):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name not in SPLITS)
    if name in SPLITS:
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLITS[name]), "isolated"), byte_level])
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    return byte_level


def bpe_dir(tiny, directory, pre_tokenizer, vocab_size=764, ignore_merges=False):
    """A model with byte-level BPE: 764 tokens and four special ones, one of which is not flagged as special."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts(2000), trainer)
    special = [AddedToken(text, special=True, normalized=False) for text in ("<|im_start|>", "<|im_end|>", "<pad>")]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    small_models.base(directory, tiny / "base")
    for name in ("tokenizer.model", "special_tokens_map.json"):
        (directory / name).unlink()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<pad>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")
    return directory


def extend(base_dir, words, *, merged):
    """Add `words` to the vocabulary of `bpe_dir`, with all merges that can make them or with none."""
    content = json.loads((base_dir / "tokenizer.json").read_text(encoding="utf-8"))
    special = {token["content"] for token in content["added_tokens"]}
    vocab = {text: index for text, index in content["model"]["vocab"].items() if text not in special}
    start = len(vocab)
    for word in sorted(set(words) - vocab.keys(), key=lambda word: (len(word), word)):
        pairs = [[word[:cut], word[cut:]] for cut in range(1, len(word)) if word[:cut] in vocab and word[cut:] in vocab]
        if pairs or not merged:
            vocab[word] = len(vocab)
            content["model"]["merges"] += pairs if merged else []
    for index, token in enumerate(content["added_tokens"], len(vocab)):
        token["id"] = index
    content["model"]["vocab"] = vocab
    (base_dir / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return range(start, len(vocab))


def require_same(gguf_file, tokenizer):
    """Ids of ordinary texts and of a complete prompt."""
    with closing(infer.load(gguf_file, n_ctx=64)) as llm:
        found = encoding.load_gguf_tokenizer(llm)
        for text in (*texts(), *RUSSIAN):
            assert found.encode_text(text) == tokenizer.encode_text(text), text
        prompts = [encoding.encode(CONVERSATION, each, add_generation_prompt=True) for each in (found, tokenizer)]
        assert prompts[0] == prompts[1]
        return llm.metadata


def test_prompts_of_the_tiny_saiga_have_the_ids_of_training(tiny, tmp_path):
    file = export.to_gguf(model="saiga_tiny", adapter=None, output=tmp_path / "x.gguf", quant_type="Q8_0")
    metadata = require_same(file, encoding.load_tokenizer("saiga_tiny"))
    assert metadata["tokenizer.ggml.add_bos_token"] == "false"
    assert {metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding", "unknown")} == set(
        "0120"[:3]
    )


def test_prompts_of_saiga_2_have_the_ids_of_training(tiny, tmp_path):
    if not LLAMA2.is_file():
        pytest.skip(f"the Llama-2 vocabulary is not at {LLAMA2}")
    base_dir = small_models.base(tmp_path / "base", tiny / "base", vocab_size=32000, hidden_size=32)
    shutil.copy(LLAMA2, base_dir / "tokenizer.model")
    source = str(base_dir)
    file = export.to_gguf(model="saiga2_7b", adapter=None, base_source=source, output=tmp_path / "x.gguf")
    require_same(file, encoding.load_tokenizer("saiga2_7b", source))


def test_sentencepiece_saved_as_json_gives_the_same_ids(tiny, tmp_path):
    base_dir = small_models.base(tmp_path / "base", tiny / "base")
    encoding.from_sentencepiece(base_dir / "tokenizer.model").save(str(base_dir / "tokenizer.json"))
    (base_dir / "tokenizer.model").unlink()
    file = export.to_gguf(model=str(base_dir), adapter=None, output=tmp_path / "x.gguf")
    require_same(file, encoding.load_tokenizer(str(base_dir)))


@pytest.mark.parametrize("name", [*SPLITS, "smollm", "gpt-2"])
def test_recognises_a_byte_level_vocabulary_and_gives_the_same_ids(tiny, tmp_path, name):
    base_dir = bpe_dir(tiny, tmp_path / "base", splitter(name), ignore_merges=name in TAKES_WORDS)
    file = export.to_gguf(model=str(base_dir), adapter=None, output=tmp_path / "x.gguf")
    metadata = require_same(file, encoding.load_tokenizer(str(base_dir)))
    assert metadata["tokenizer.ggml.pre"] == name
    assert (TOKENIZER_JSON_KEY in metadata) == (name == "tekken")
    assert metadata["tokenizer.ggml.eos_token_id"] == "765"
    assert "tokenizer.ggml.eot_token_id" not in metadata


@pytest.mark.parametrize("name", ["llama-bpe", "qwen2"])
def test_bpe_extended_by_russian_unigrams_gives_the_same_ids(tiny, tmp_path, name):
    """As Ruadapt extends cl100k, whose pattern is llama-bpe's: a unigram gets every merge that can make it."""
    base_dir = bpe_dir(tiny, tmp_path / "base", splitter(name), vocab_size=600, ignore_merges=name in TAKES_WORDS)
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = splitter(name)
    unigram.train_from_iterator(RUSSIAN * 50, trainers.UnigramTrainer(vocab_size=400, show_progress=False))
    added = extend(base_dir, unigram.get_vocab(), merged=True)
    tokenizer = encoding.load_tokenizer(str(base_dir))
    file = export.to_gguf(model=str(base_dir), adapter=None, output=tmp_path / "x.gguf")
    metadata = require_same(file, tokenizer)
    assert metadata["tokenizer.ggml.pre"] == name
    assert len({i for text in RUSSIAN for i in tokenizer.encode_text(text) if i in added}) > 30


@pytest.mark.parametrize("ignore_merges", [False, True])
@pytest.mark.parametrize("name", ["llama-bpe", "qwen2"])
def test_words_that_no_merge_makes_are_read_as_in_training_or_refused(tiny, tmp_path, name, ignore_merges):
    """llama.cpp knows `ignore_merges` by the name of the pre-tokenizer alone."""
    base_dir = bpe_dir(tiny, tmp_path / "base", splitter(name), vocab_size=600, ignore_merges=ignore_merges)
    words = ["\u0120" + word for word, _ in splitter(name).pre_tokenize_str("клавиатура")]
    (added,) = extend(base_dir, words, merged=False)
    if ignore_merges != (name in TAKES_WORDS):
        message = rf"do not make 1 of its tokens, such as '{words[0]}'.*ignore_merges for {name} differs"
        with pytest.raises(SaigaError, match=message):
            export.to_gguf(model=str(base_dir), adapter=None, output=tmp_path / "x.gguf")
        return
    tokenizer = encoding.load_tokenizer(str(base_dir))
    require_same(export.to_gguf(model=str(base_dir), adapter=None, output=tmp_path / "x.gguf"), tokenizer)
    assert (tokenizer.encode_text(" клавиатура") == [added]) == ignore_merges


@pytest.mark.parametrize("name", ["llama-bpe", "qwen2"])
def test_ignore_merges_does_not_matter_if_merges_make_every_token(tiny, tmp_path, name):
    base_dir = bpe_dir(tiny, tmp_path / "base", splitter(name), ignore_merges=name not in TAKES_WORDS)
    file = export.to_gguf(model=str(base_dir), adapter=None, output=tmp_path / "x.gguf")
    assert TOKENIZER_JSON_KEY not in require_same(file, encoding.load_tokenizer(str(base_dir)))


@pytest.mark.parametrize("pattern", [r"\p{N}{1,3}|\p{L}+|\s+|.", SPLITS["qwen2"].replace(r"\p{L}+", r"[\p{L}\p{M}]+")])
def test_refuses_a_pattern_that_llama_cpp_has_no_name_for(tiny, tmp_path, pattern):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    base_dir = bpe_dir(tiny, tmp_path, pre_tokenizers.Sequence([split, byte_level]))
    with pytest.raises(SaigaError, match=r"splits text in an unknown way.*Supported are the tokenizers of llama-bpe"):
        export.to_gguf(model=str(base_dir), adapter=None, output=tmp_path / "x.gguf")


def test_writes_an_end_of_turn_other_than_the_end_of_text(tiny, tmp_path):
    base_dir = bpe_dir(tiny, tmp_path / "base", splitter("qwen2"))
    small_models.edit_json(base_dir / "tokenizer_config.json", eos_token="<pad>")
    file = export.to_gguf(model=str(base_dir), adapter=None, output=tmp_path / "x.gguf")
    metadata = require_same(file, encoding.load_tokenizer(str(base_dir)))
    assert metadata["tokenizer.ggml.eos_token_id"] == "766"
    assert metadata["tokenizer.ggml.eot_token_id"] == "765"


def test_adds_no_bos_if_the_template_writes_it(tiny, tmp_path):
    base_dir = small_models.base(tmp_path / "base", tiny / "base")
    small_models.edit_json(base_dir / "tokenizer_config.json", add_bos_token=True)
    spelled = export.to_gguf(model=str(base_dir), adapter=None, output=tmp_path / "1.gguf")
    (base_dir / "chat_template.jinja").write_text(small_models.SAIGA2.replace("'<s>", "'"), encoding="utf-8")
    unspelled = export.to_gguf(model=str(base_dir), adapter=None, output=tmp_path / "2.gguf")
    for file, added in ((spelled, "false"), (unspelled, "true")):
        with closing(infer.load(file, n_ctx=64)) as llm:
            assert llm.metadata["tokenizer.ggml.add_bos_token"] == added


def test_fills_rows_beyond_the_vocabulary(tiny, tmp_path):
    base_dir = small_models.base(tmp_path / "base", tiny / "base", vocab_size=800)
    file = export.to_gguf(model=str(base_dir), adapter=None, output=tmp_path / "x.gguf")
    require_same(file, encoding.load_tokenizer(str(base_dir)))


def test_refuses_an_unknown_pre_tokenizer(tiny, tmp_path):
    base_dir = bpe_dir(tiny, tmp_path, pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), splitter("gpt-2")]))
    with pytest.raises(SaigaError, match=r"Punctuation.*Supported are the tokenizers of llama-bpe"):
        export.to_gguf(model=str(base_dir), adapter=None, output=tmp_path / "x.gguf")


def test_refuses_a_tokenizer_with_more_tokens_than_rows(tiny, tmp_path):
    base_dir = bpe_dir(tiny, tmp_path, splitter("gpt-2"), vocab_size=780)
    with pytest.raises(SaigaError, match=r"784 tokens.*768 rows"):
        export.to_gguf(model=str(base_dir), adapter=None, output=tmp_path / "x.gguf")


def test_refuses_a_tokenizer_to_which_llama_cpp_gives_other_ids(tiny, tmp_path):
    base_dir = bpe_dir(tiny, tmp_path, splitter("gpt-2"))
    content = json.loads((base_dir / "tokenizer.json").read_text(encoding="utf-8"))
    content["normalizer"] = {"type": "Lowercase"}
    (base_dir / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(SaigaError, match="cannot export this tokenizer"):
        export.to_gguf(model=str(base_dir), adapter=None, output=tmp_path / "x.gguf")
