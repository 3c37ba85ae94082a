"""Make the tiny Saiga: base, adapter, tokenizer and records in less than a megabyte."""

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from saigakit.core.lazy import torch
from saigakit.registry import ATTENTION

# Configs as in the repositories of the released adapters (no `legacy`, no tokenizer.json), with dimensions that are
# multiples of ggml's block, 32; and 60 records, of which every fourth defines nothing and has the answer `[]`.
_FILES = Path(__file__).parent / "tiny"
_BESIDES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
SPACE = "▁"
# Pieces of the vocabulary with and without a leading space, so that a loader that drops it gets other ids.
ROLES = ("system", "user", "bot")
_LETTERS = "абвгдеёжзийклмнопрстуфхцчшщъыьэюя"
_LATIN = "abcdefghijklmnopqrstuvwxyz"
_SIGNS = "0123456789.,:;!?-–—()[]{}<>«»„“\"'/\\|_+=*&%$#@^~`№"
ALPHABET = _LETTERS + _LETTERS.upper() + _LATIN + _LATIN.upper() + _SIGNS
_LAST = -1e9  # score of whitespace-only pieces in Llama's model, which merge last


def make(directory: Path) -> Path:
    """Write base/, adapter/ and records.jsonl into `directory`."""
    from safetensors.torch import save_file

    base, adapter = directory / "base", directory / "adapter"
    config = json.loads((_FILES / "config.json").read_text(encoding="utf-8"))
    lora = json.loads((_FILES / "adapter_config.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (_FILES / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    vocabulary = sentencepiece_model((text for row in rows for text in row.values()), config["vocab_size"])
    for folder, config_file in ((base, "config.json"), (adapter, "adapter_config.json")):
        folder.mkdir(parents=True)
        (folder / "tokenizer.model").write_bytes(vocabulary)
        for name in (config_file, *_BESIDES):
            shutil.copyfile(_FILES / name, folder / name)
    shutil.copyfile(_FILES / "records.jsonl", directory / "records.jsonl")
    generator = torch.Generator().manual_seed(1337)
    save_file(base_weights(config, generator), base / "model.safetensors", metadata={"format": "pt"})
    torch.save(adapter_weights(config, lora, generator), adapter / "adapter_model.bin")
    return directory


def sentencepiece_model(texts: Iterable[str], size: int) -> bytes:
    """A serialised ModelProto of `size` pieces; the same texts give the same bytes."""
    from sentencepiece import sentencepiece_model_pb2

    spm: Any = sentencepiece_model_pb2  # protobuf creates its classes at run time
    kind = spm.ModelProto.SentencePiece
    pieces = [("<unk>", 0.0, kind.UNKNOWN), ("<s>", 0.0, kind.CONTROL), ("</s>", 0.0, kind.CONTROL)]
    pieces += [(f"<0x{byte:02X}>", 0.0, kind.BYTE) for byte in range(256)]
    spaces = [(SPACE * length, _LAST, kind.NORMAL) for length in range(1, 17)]
    count = size - len(pieces) - len(spaces) - len(ALPHABET)
    ranked = [*_merges(texts, count), *ALPHABET]
    pieces += [(piece, float(-rank), kind.NORMAL) for rank, piece in enumerate(ranked)]
    pieces += spaces
    model = spm.ModelProto()
    for piece, score, type_ in pieces:
        model.pieces.add(piece=piece, score=score, type=type_)
    trainer = model.trainer_spec
    trainer.model_type = spm.TrainerSpec.BPE
    trainer.vocab_size, trainer.byte_fallback, trainer.split_digits = len(pieces), True, True
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def _merges(texts: Iterable[str], count: int) -> list[str]:
    """The first `count` merges of byte-pair encoding, in order."""
    frequency = Counter(SPACE + word for text in texts for word in text.split())
    frequency |= dict.fromkeys(ROLES, 2_000_000) | dict.fromkeys((SPACE + role for role in ROLES), 1_000_000)
    words = {word: list(word) for word in frequency}
    merges: list[str] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in words.items():
            for pair in pairwise(parts):
                if not any(character.isdigit() for character in "".join(pair)):
                    pairs[pair] += frequency[word]
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append("".join(best))
        words = {word: _merged(parts, best) for word, parts in words.items()}
    return merges


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


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
