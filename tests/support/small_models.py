"""Create small random models and adapters with transformers and peft."""

import json
import shutil
from pathlib import Path

import sentencepiece
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM

from saigakit.prompt import template
from saigakit.registry import ALL_LINEAR, MODELS

SAIGA2 = template.read_chat_template(MODELS["saiga2_7b"], Path())
SIZES = {
    "vocab_size": 768,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# As Qwen's model cards tell to enter it for long texts.
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}


def base(
    directory: Path, tokenizer_dir: Path, *, kind: str = "llama", qwen3: bool = False, shards: str = "50GB", **settings
) -> Path:
    """A model with varied outputs, the tokenizer of the tiny Saiga and the template of Saiga 2.

    `kind`: transformers' model_type.
    """
    torch.manual_seed(7)
    sizes = {**SIZES, "initializer_range": 0.2, **settings}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3" if qwen3 else kind, **sizes))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.1)
    model.save_pretrained(directory, max_shard_size=shards)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(tokenizer_dir / name, directory / name)
    (directory / "chat_template.jinja").write_text(SAIGA2, encoding="utf-8")
    return directory


def adapter(directory: Path, base_dir: Path, **settings) -> Path:
    """Random matrices on all linear layers; `settings` are peft's."""
    torch.manual_seed(8)
    config = {"r": 4, "lora_alpha": 8, "target_modules": list(ALL_LINEAR), "init_lora_weights": False, **settings}
    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config)).save_pretrained(directory)
    return directory


def edit_json(file: Path, **changes) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content | changes), encoding="utf-8")


def as_transformers_5_0_saves_it(directory: Path, tokenizer_model: Path) -> None:
    """What AutoTokenizer of Kaggle's transformers 5.0.0 makes from a tokenizer.model: a blank is `<unk>`."""
    pieces = sentencepiece.SentencePieceProcessor(str(tokenizer_model))
    ids = range(pieces.get_piece_size())
    scores = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in ids]
    special = [text for i, (text, _) in enumerate(scores) if i == 0 or pieces.is_control(i)]
    tokenizer = Tokenizer(models.Unigram(scores, 0, False))
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    tokenizer.save(str(directory / "tokenizer.json"))


def cut(file: Path) -> None:
    """Truncate a file like an interrupted download."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])


def move(adapter_dir: Path, module: str) -> None:
    """Change a fully trained module, which peft initialises as a copy of the base's."""
    file = adapter_dir / "adapter_model.safetensors"
    tensors = load_file(file)
    name = f"base_model.model.{module}.weight"
    tensors[name] = tensors[name] + 0.2 * torch.rand_like(tensors[name])
    save_file(tensors, file)
