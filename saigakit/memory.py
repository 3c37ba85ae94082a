"""A model's shapes and a run's settings into the bytes that it needs, known before anything is loaded."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from saigakit.errors import SaigaError
from saigakit.models import ALL_LINEAR, Lora, Quantization

BITS = {"nf4": 4.13, "int8": 8.0}  # of a quantised weight; nf4 with double quantisation of its block scales
ADAPTER_BYTES = 16  # per parameter: float32 weight, gradient and two moments of AdamW
_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a decoder-only model, from its config.json."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool

    @classmethod
    def of(cls, base_dir: Path) -> Self:
        """Raises SaigaError where config.json is missing, broken or of another kind of model."""
        file = base_dir / "config.json"
        try:
            config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SaigaError(f"{file} cannot be read ({error}); attach the complete base model.") from None
        config = config.get("text_config", config)
        missing = [name for name in _NEEDED if name not in config]
        if missing:
            raise SaigaError(f"{file} has no {', '.join(missing)}: this is no decoder-only language model.")
        heads = config["num_attention_heads"]
        return cls(
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            intermediate=config.get("intermediate_size") or 4 * config["hidden_size"],
            vocabulary=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", False)),
        )

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the matrices of one layer, by module name."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        sizes = {
            "q_proj": (queries, self.hidden),
            "k_proj": (keys, self.hidden),
            "v_proj": (keys, self.hidden),
            "o_proj": (self.hidden, queries),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }
        return {name: sizes[name] for name in ALL_LINEAR}

    @property
    def linear_parameters(self) -> int:
        return self.layers * sum(out * into for out, into in self.linear.values())

    @property
    def embedding_parameters(self) -> int:
        """Embeddings and language-model head, counted once where they are tied."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    def adapter_parameters(self, lora: Lora) -> int:
        targets = (self.linear[name] for name in lora.target_modules if name in self.linear)
        return self.layers * lora.rank * sum(out + into for out, into in targets)


def weights(shape: Shape, quantization: Quantization, itemsize: int) -> int:
    """Bytes of the loaded base; the embeddings and the head stay in `itemsize` bytes per number."""
    per_number = itemsize if quantization == "none" else BITS[quantization] / 8
    return int(shape.linear_parameters * per_number + shape.embedding_parameters * itemsize)


def training(
    shape: Shape, *, quantization: Quantization, lora: Lora, pack_tokens: int, itemsize: int, checkpointing: bool
) -> dict[str, int]:
    """Bytes by what they are for, for one pack of `pack_tokens`; a first estimate, meant to refuse in minute 1.

    A layer's live activations are about 26 hidden-wide and 8 intermediate-wide float32 numbers per token, measured
    on SmolLM2-135M with a LoRA on all linear layers (packs of 512 and 1024 tokens on a CPU). With activation
    checkpointing one layer is live and the others keep their input alone.
    """
    layer = pack_tokens * (26 * shape.hidden + 8 * shape.intermediate) * 4
    kept = shape.layers * pack_tokens * shape.hidden * itemsize + layer if checkpointing else shape.layers * layer
    return {
        "weights": weights(shape, quantization, itemsize),
        "adapter and optimizer": shape.adapter_parameters(lora) * ADAPTER_BYTES,
        "activations": kept,
        "logits": 3 * pack_tokens * shape.vocabulary * 4 // 2,  # float32, its softmax and gradient; half is learned
    }


def inference(shape: Shape, quantization: Quantization, itemsize: int, tokens: int) -> dict[str, int]:
    """Bytes of a model that answers, with keys and values of `tokens` tokens."""
    cache = 2 * shape.layers * shape.kv_heads * shape.head_dim * itemsize * tokens
    return {"weights": weights(shape, quantization, itemsize), "keys and values": cache}


def in_words(parts: Mapping[str, int]) -> str:
    """ "weights 3.9 GB, activations 1.2 GB"; parts under 50 MB together at the end."""
    large = [f"{name} {size / 1e9:.1f} GB" for name, size in parts.items() if size >= 5e7]
    return ", ".join(large) or f"{math.fsum(parts.values()) / 1e6:.0f} MB in all"
