"""A directory into a tiny Saiga: base model, released adapter and records, the same bytes every time."""

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saigakit.demo.tiny_records import records
from saigakit.demo.tiny_vocabulary import SIZE, sentencepiece_model

if TYPE_CHECKING:
    import torch

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS = 64, 256, 2, 4, 2  # 256: a row that k-quants can take
RANK, ALPHA = 4, 8
ATTENTION = {
    "q_proj": (HIDDEN, HIDDEN),
    "k_proj": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
    "v_proj": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
    "o_proj": (HIDDEN, HIDDEN),
}  # name -> (out, in)
MLP = {"gate_proj": (INTERMEDIATE, HIDDEN), "up_proj": (INTERMEDIATE, HIDDEN), "down_proj": (HIDDEN, INTERMEDIATE)}

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": INTERMEDIATE,
    "max_position_embeddings": 1024,
    "model_type": "llama",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_HEADS,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": SIZE,
}
ADAPTER_CONFIG = {
    "base_model_name_or_path": "package:saiga_tiny",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_alpha": ALPHA,
    "lora_dropout": 0.05,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": RANK,
    "revision": None,
    "target_modules": [*ATTENTION],
    "task_type": "CAUSAL_LM",
}
# As the repositories of the released adapters have it: without `legacy`, without tokenizer.json.
TOKENIZER_CONFIG = {
    "add_bos_token": False,
    "add_eos_token": False,
    "bos_token": "<s>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "</s>",
    "model_max_length": 1024,
    "pad_token": "<unk>",
    "padding_side": "left",
    "tokenizer_class": "LlamaTokenizer",
    "unk_token": "<unk>",
}
SPECIAL_TOKENS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<unk>",
    "sep_token": "<s>",
    "unk_token": "<unk>",
}
GENERATION_CONFIG = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_new_tokens": 256,
    "no_repeat_ngram_size": 15,
    "pad_token_id": 0,
    "repetition_penalty": 1.1,
    "temperature": 0.2,
    "top_k": 40,
    "top_p": 0.9,
}


def make(directory: Path) -> Path:
    """Writes base/, adapter/ and records.jsonl into `directory`, and returns it."""
    import torch
    from safetensors.torch import save_file

    base, adapter = directory / "base", directory / "adapter"
    rows = records()
    vocabulary = sentencepiece_model(text for row in rows for text in row.values())
    for folder in (base, adapter):
        folder.mkdir(parents=True)
        (folder / "tokenizer.model").write_bytes(vocabulary)
        _write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
        _write_json(folder / "special_tokens_map.json", SPECIAL_TOKENS)
        _write_json(folder / "generation_config.json", GENERATION_CONFIG)
    generator = torch.Generator().manual_seed(1337)
    _write_json(base / "config.json", CONFIG)
    save_file(base_weights(generator), base / "model.safetensors", metadata={"format": "pt"})
    _write_json(adapter / "adapter_config.json", ADAPTER_CONFIG)
    torch.save(adapter_weights(generator), adapter / "adapter_model.bin")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (directory / "records.jsonl").write_text(lines, encoding="utf-8")
    return directory


def base_weights(generator: "torch.Generator") -> dict[str, "torch.Tensor"]:
    """Random float16 weights whose outputs are far from uniform, norms other than 1 included."""
    import torch

    def normal(*shape: int, std: float) -> "torch.Tensor":
        return (torch.randn(*shape, generator=generator) * std).to(torch.float16)

    def norm() -> "torch.Tensor":
        return (1 + 0.1 * torch.randn(HIDDEN, generator=generator)).to(torch.float16)

    weights = {"model.embed_tokens.weight": normal(SIZE, HIDDEN, std=1.0)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for block, matrices in (("self_attn", ATTENTION), ("mlp", MLP)):
            for name, shape in matrices.items():
                weights[f"{prefix}.{block}.{name}.weight"] = normal(*shape, std=1 / math.sqrt(shape[1]))
        weights[f"{prefix}.input_layernorm.weight"] = norm()
        weights[f"{prefix}.post_attention_layernorm.weight"] = norm()
    weights["model.norm.weight"] = norm()
    weights["lm_head.weight"] = normal(SIZE, HIDDEN, std=2 / math.sqrt(HIDDEN))
    return weights


def adapter_weights(generator: "torch.Generator") -> dict[str, "torch.Tensor"]:
    """LoRA A and B in float32, keys as peft wrote them in 2023; B is not zero, so that the adapter shows."""
    import torch

    weights: dict[str, torch.Tensor] = {}
    for layer in range(LAYERS):
        for name, (out, into) in ATTENTION.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{prefix}.lora_A.weight"] = torch.randn(RANK, into, generator=generator) / math.sqrt(into)
            weights[f"{prefix}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) * 0.2
    return weights


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m saigakit.demo.tiny_model DIRECTORY")
    print(make(Path(sys.argv[1])))
