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


def bpe_dir(tiny, directory, pre_tokenizer, vocab_size=764):
    """A model with byte-level BPE: 764 tokens and four special ones, one of which is not flagged as special."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
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


def require_same(gguf_file, tokenizer):
    """Ids of ordinary texts and of a complete prompt."""
    with closing(infer.load(gguf_file, n_ctx=64)) as llm:
        found = encoding.load_gguf_tokenizer(llm)
        for text in texts():
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
    base_dir = bpe_dir(tiny, tmp_path / "base", splitter(name))
    file = export.to_gguf(model=str(base_dir), adapter=None, output=tmp_path / "x.gguf")
    metadata = require_same(file, encoding.load_tokenizer(str(base_dir)))
    assert metadata["tokenizer.ggml.pre"] == name
    assert metadata["tokenizer.ggml.eos_token_id"] == "765"
    assert "tokenizer.ggml.eot_token_id" not in metadata


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
