"""Bytes known from shapes, against what the real libraries hold."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from saigakit import memory
from saigakit.errors import SaigaError
from saigakit.models import MODELS, Lora

LLAMA2_7B = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
}


def shape_of(directory, config):
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return memory.Shape.of(directory)


@pytest.mark.parametrize("tied", [False, True])
def test_the_counted_parameters_are_those_of_the_model_but_for_its_norms(tmp_path, tied):
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
    shape = memory.Shape.of(tmp_path)
    counted = shape.linear_parameters + shape.embedding_parameters
    model = LlamaForCausalLM(config)
    assert counted == sum(p.numel() for p in model.parameters() if p.ndim == 2)
    assert memory.weights(shape, "none", 4) == counted * 4


def test_an_adapters_parameters_are_those_that_peft_makes(tmp_path, tiny):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    lora = Lora(rank=3)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny / "base", dtype=torch.float32),
        LoraConfig(r=3, target_modules=list(lora.target_modules)),
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert memory.Shape.of(tiny / "base").adapter_parameters(lora) == trained


def test_on_a_t4_saiga2_7b_fits_in_nf4_and_13b_does_not_fit_unquantised(tmp_path):
    def needed(config, quantization):
        return memory.training(
            shape_of(tmp_path, config),
            quantization=quantization,
            lora=MODELS["saiga2_7b"].lora,
            pack_tokens=MODELS["saiga2_7b"].max_seq_length,
            itemsize=2,
            checkpointing=True,
        )

    t4 = 15_360 * 1024**2
    llama2_13b = LLAMA2_7B | {"hidden_size": 5120, "num_hidden_layers": 40, "intermediate_size": 13824}
    assert sum(needed(LLAMA2_7B, "nf4").values()) < t4 < sum(needed(llama2_13b, "none").values())
    assert needed(LLAMA2_7B, "nf4")["weights"] == pytest.approx(3.9e9, rel=0.1)  # 3.3 GB, and 0.5 GB of embeddings


def test_keys_and_values_of_llama_2_take_512_kib_per_token(tmp_path):
    shape = shape_of(tmp_path, LLAMA2_7B)
    assert memory.inference(shape, "none", 2, tokens=3)["keys and values"] == 3 * 512 * 1024


def test_a_broken_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(SaigaError, match=r"config\.json cannot be read"):
        memory.Shape.of(tmp_path)


def test_another_kind_of_model_is_refused(tmp_path):
    with pytest.raises(SaigaError, match="no num_hidden_layers, vocab_size"):
        shape_of(tmp_path, {"hidden_size": 8, "num_attention_heads": 2})


def test_sizes_are_said_in_gigabytes():
    assert memory.in_words({"weights": 3_900_000_000, "logits": 10}) == "weights 3.9 GB"
    assert memory.in_words({"weights": 4_000_000}) == "4 MB in all"
