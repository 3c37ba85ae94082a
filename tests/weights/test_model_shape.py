import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from saigakit.errors import SaigaError
from saigakit.registry import Lora
from saigakit.weights import load, memory
from saigakit.weights.model_shape import ModelShape


@pytest.mark.parametrize("tied", [False, True])
def test_counts_the_parameters_of_the_real_model_except_for_its_norms(tmp_path, tied):
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    config.save_pretrained(tmp_path)
    shape = ModelShape.from_config(tmp_path)
    counted = shape.linear_parameters + shape.embedding_parameters
    model = LlamaForCausalLM(config)
    assert counted == sum(p.numel() for p in model.parameters() if p.ndim == 2)
    assert memory.weight_bytes(shape, "none", 4) == counted * 4


@pytest.mark.parametrize(
    "lora", [Lora(rank=3), Lora(rank=3, dora=True), Lora(rank=3, modules_to_save=("embed_tokens", "lm_head"))]
)
def test_counts_the_adapter_parameters_that_peft_creates(tiny, lora):
    model = load.with_adapter(load.base_model(tiny / "base", "none", torch.float32, "cpu"), None, lora)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert ModelShape.from_config(tiny / "base").adapter_parameters(lora) == trained


def test_names_a_damaged_config(tmp_path):
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(SaigaError, match=r"config\.json is missing or damaged"):
        ModelShape.from_config(tmp_path)


def test_refuses_another_kind_of_model(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 8, "num_attention_heads": 2}', encoding="utf-8")
    with pytest.raises(SaigaError, match="no num_hidden_layers, vocab_size"):
        ModelShape.from_config(tmp_path)
