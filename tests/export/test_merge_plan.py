"""The tokenizer and template that trainers save next to an adapter are those of the GGUF."""

import shutil

import gguf
import pytest
import small_models
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaTokenizer

from saigakit import export
from saigakit.errors import SaigaError
from saigakit.export import other_formats
from saigakit.export.gguf_export import Export
from saigakit.export.merge_plan import MergePlan

OTHER = small_models.SAIGA2.replace("bot", "assistant")


@pytest.fixture
def base(tiny, tmp_path):
    """With 32 rows of padding after the 768 tokens of the tokenizer."""
    return small_models.base(tmp_path / "base", tiny / "base", vocab_size=800)


def adapter(directory, base_dir, *, rows=None, tokens=(), chat_template=None):
    """As a trainer saves it: peft's files, then the tokenizer's."""
    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    if rows is not None:
        model.resize_token_embeddings(rows)
    settings = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    get_peft_model(model, LoraConfig(**settings)).save_pretrained(directory)
    tokenizer = LlamaTokenizer.from_pretrained(base_dir)  # AutoTokenizer of Kaggle's transformers 5.0 misreads it
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    tokenizer.save_pretrained(directory)
    if chat_template is not None:
        (directory / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    return directory


def read_tokens(file):
    return gguf.GGUFReader(file).fields["tokenizer.ggml.tokens"].contents()


def exported(base_dir, adapter_dir, tmp_path, **settings):
    output = tmp_path / "x.gguf"
    export.to_gguf(model=str(base_dir), adapter=adapter_dir, output=output, quant_type="Q8_0", **settings)
    return output


def test_tokens_in_the_padding_of_the_vocabulary_keep_their_names(base, tmp_path):
    trained = adapter(tmp_path / "adapter", base, tokens=["<think>", "</think>"])
    tokens = read_tokens(exported(base, trained, tmp_path))
    first = tokens.index("<think>")
    assert tokens[first + 1] == "</think>" and tokens[first + 2] == f"[PAD{first + 2}]"
    assert read_tokens(exported(base, None, tmp_path / "plain"))[first] == f"[PAD{first}]"


def test_the_template_of_the_training_is_in_the_gguf_and_in_safetensors(base, tmp_path):
    trained = adapter(tmp_path / "adapter", base, chat_template=OTHER)
    plan = MergePlan.of(str(base), trained)
    assert "<s>assistant" in Export.of(plan, ["Q8_0"]).tokenizer.chat_template
    made = other_formats.to_safetensors(plan, tmp_path / "merged")
    assert "<s>assistant" in (made / "chat_template.jinja").read_text(encoding="utf-8")


def test_a_template_in_the_configuration_of_a_tokenizer_is_used_too(base, tmp_path):
    """Where trainers before 2025 saved it."""
    trained = adapter(tmp_path / "adapter", base)
    (trained / "chat_template.jinja").unlink()
    small_models.edit_json(trained / "tokenizer_config.json", chat_template=OTHER)
    assert "<s>assistant" in MergePlan.of(str(base), trained).read_tokenizer().chat_template
    chosen = MergePlan.of(str(base), trained, chat_template="saiga2").read_tokenizer()
    assert "<s>assistant" not in chosen.chat_template


@pytest.mark.parametrize("name", ["", "nosuch"])
def test_an_unknown_template_is_no_fault_of_the_tokenizer(base, tmp_path, name):
    trained = adapter(tmp_path / "adapter", base)
    with pytest.raises(SaigaError, match=rf"^chat_template='{name}' is unknown\. Give .*existing file\.$"):
        MergePlan.of(str(base), trained, chat_template=name).read_tokenizer()


def test_new_tokens_of_a_resized_vocabulary_are_exported(base, tmp_path):
    trained = adapter(tmp_path / "adapter", base, rows=810, tokens=["<tool>"])
    tokens = read_tokens(exported(base, trained, tmp_path))
    assert len(tokens) == 810 and "<tool>" in tokens
    made = other_formats.to_safetensors(MergePlan.of(str(base), trained), tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(made)
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == 810


def test_a_resized_vocabulary_needs_its_tokenizer(base, tmp_path):
    trained = adapter(tmp_path / "adapter", base, rows=810)
    (trained / "tokenizer.json").unlink()
    with pytest.raises(SaigaError, match=r"with 810 tokens instead of the base's 800.*--tokenizer DIR"):
        exported(base, trained, tmp_path)
    assert len(read_tokens(exported(base, trained, tmp_path, tokenizer=base))) == 810


def test_a_tokenizer_that_cannot_be_used_is_named_with_the_remedy(base, tmp_path):
    trained = adapter(tmp_path / "adapter", base)
    (trained / "chat_template.jinja").unlink()
    with pytest.raises(SaigaError, match=rf"{trained} has no chat template.*--tokenizer"):
        MergePlan.of(str(base), trained).read_tokenizer()
    assert MergePlan.of(str(base), trained, tokenizer=base).read_tokenizer()


def test_a_tokenizer_of_kaggles_transformers_that_loses_blanks_is_refused(base, tmp_path):
    trained = adapter(tmp_path / "adapter", base)
    small_models.as_transformers_5_0_saves_it(trained, base / "tokenizer.model")
    with pytest.raises(SaigaError, match=rf"{trained} reads a blank as '<unk>'.*train again.*as --tokenizer"):
        exported(base, trained, tmp_path)
    exact = [exported(base, trained, tmp_path, tokenizer=base), exported(base, None, tmp_path / "plain")]
    assert read_tokens(exact[0]) == read_tokens(exact[1])


def test_adapters_with_different_tokenizers_are_not_added_up(base, tmp_path):
    one, two = adapter(tmp_path / "one", base), adapter(tmp_path / "two", base, chat_template=OTHER)
    plan = MergePlan.of(str(base), [(one, 0.5), (two, 0.5)])
    with pytest.raises(SaigaError, match=rf"{one} and {two} have different tokenizers or templates"):
        plan.read_tokenizer()
    assert MergePlan.of(str(base), [(one, 0.5), (one, 0.5)]).tokenizer_dir == one


def test_the_registrys_template_gives_way_to_that_of_the_training(tiny, tmp_path):
    trained = tmp_path / "adapter"
    shutil.copytree(tiny / "adapter", trained)
    assert "<s>assistant" not in MergePlan.of("saiga_tiny", trained).read_tokenizer().chat_template
    shutil.copy(tiny / "base" / "tokenizer.model", trained / "tokenizer.model")
    (trained / "chat_template.jinja").write_text(OTHER, encoding="utf-8")
    assert "<s>assistant" in MergePlan.of("saiga_tiny", trained).read_tokenizer().chat_template
