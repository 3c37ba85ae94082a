"""Make the tiny Saiga: base, adapter, tokenizer and records in less than a megabyte."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

from saigakit.core.lazy import torch
from saigakit.registry import ATTENTION

# Configs as in the repositories of the released adapters (no `legacy`, no tokenizer.json), with dimensions that are
# multiples of ggml's block, 32; 60 records, of which every fourth defines nothing and has the answer `[]`; and
# tokenizer.model, which tests/support/tiny_vocabulary.py has made from these records.
_FILES = Path(__file__).parent / "tiny"
_BESIDES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


def make(directory: Path) -> Path:
    """Write base/, adapter/ and records.jsonl into `directory`."""
    from safetensors.torch import save_file

    base, adapter = directory / "base", directory / "adapter"
    config = json.loads((_FILES / "config.json").read_text(encoding="utf-8"))
    lora = json.loads((_FILES / "adapter_config.json").read_text(encoding="utf-8"))
    for folder, config_file in ((base, "config.json"), (adapter, "adapter_config.json")):
        folder.mkdir(parents=True)
        for name in (config_file, *_BESIDES):
            shutil.copyfile(_FILES / name, folder / name)
    shutil.copyfile(_FILES / "records.jsonl", directory / "records.jsonl")
    generator = torch.Generator().manual_seed(1337)
    save_file(base_weights(config, generator), base / "model.safetensors", metadata={"format": "pt"})
    torch.save(adapter_weights(config, lora, generator), adapter / "adapter_model.bin")
    return directory


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(out, in) of the matrices of a layer."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    values = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    attention = {"q_proj": (hidden, hidden), "k_proj": (values, hidden), "v_proj": (values, hidden)}
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    return {**attention, "o_proj": (hidden, hidden), **mlp}


def base_weights(config: dict[str, Any], generator: "torch.Generator") -> dict[str, "torch.Tensor"]:
    """Random float16 weights with outputs far from uniform and norms other than 1."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]

    def normal(*shape: int, std: float) -> "torch.Tensor":
        return (torch.randn(*shape, generator=generator) * std).to(torch.float16)

    def norm() -> "torch.Tensor":
        return (1 + 0.1 * torch.randn(hidden, generator=generator)).to(torch.float16)

    weights = {"model.embed_tokens.weight": normal(vocabulary, hidden, std=1.0)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, shape in _shapes(config).items():
            block = "self_attn" if name in ATTENTION else "mlp"
            weights[f"{prefix}.{block}.{name}.weight"] = normal(*shape, std=1 / math.sqrt(shape[1]))
        weights[f"{prefix}.input_layernorm.weight"] = norm()
        weights[f"{prefix}.post_attention_layernorm.weight"] = norm()
    weights["model.norm.weight"] = norm()
    weights["lm_head.weight"] = normal(vocabulary, hidden, std=2 / math.sqrt(hidden))
    return weights


def adapter_weights(
    config: dict[str, Any], lora: dict[str, Any], generator: "torch.Generator"
) -> dict[str, "torch.Tensor"]:
    """LoRA A and B in float32 with peft's keys of 2023; B is not zero, so that the adapter has an effect."""
    weights: dict[str, torch.Tensor] = {}
    for layer in range(config["num_hidden_layers"]):
        for name in lora["target_modules"]:
            out, into = _shapes(config)[name]
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{prefix}.lora_A.weight"] = torch.randn(lora["r"], into, generator=generator) / math.sqrt(into)
            weights[f"{prefix}.lora_B.weight"] = torch.randn(out, lora["r"], generator=generator) * 0.2
    return weights
