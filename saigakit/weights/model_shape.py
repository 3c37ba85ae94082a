"""Read the dimensions of a model from its config.json and count its parameters."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from saigakit.errors import SaigaError
from saigakit.registry import Lora
from saigakit.weights.base_files import read_json

_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# Defaults of transformers by model_type: published config.json files omit these settings.
_GEMMA = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma2": {**_GEMMA, "vocab_size": 256_000},
    "gemma3_text": {**_GEMMA, "vocab_size": 262_208},
    "qwen3": {"head_dim": 128},
}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The dimensions of a decoder-only model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool  # the embeddings are the language-model head too
    norms: int = 2  # per layer
    head_norms: bool = False  # queries and keys are normalised per head

    @classmethod
    def from_config(cls, base_dir: Path) -> Self:
        """Raises SaigaError if config.json is missing, damaged or describes another kind of model."""
        file = base_dir / "config.json"
        config = read_json(file)
        config = config.get("text_config", config)
        kind = str(config.get("model_type"))
        config = {**_DEFAULTS.get(kind, {}), **config}
        if missing := [name for name in _REQUIRED if name not in config]:
            raise SaigaError(f"{file} has no {', '.join(missing)}: this is not a decoder-only language model.")
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
            norms=4 if kind.startswith(("gemma2", "gemma3")) else 2,
            head_norms=kind.startswith(("qwen3", "gemma3")),
        )

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each matrix of a layer, by module name."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (queries, self.hidden),
            "k_proj": (keys, self.hidden),
            "v_proj": (keys, self.hidden),
            "o_proj": (self.hidden, queries),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }

    @property
    def linear_parameters(self) -> int:
        return self.layers * sum(out * into for out, into in self.linear.values())

    @property
    def embedding_parameters(self) -> int:
        """Embeddings and language-model head, counted once if they are tied."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    def adapter_parameters(self, lora: Lora) -> int:
        """LoRA matrices of all layers, DoRA magnitudes and fully trained modules."""
        targets = [self.linear[name] for name in lora.target_modules if name in self.linear]
        per_layer = sum(lora.rank * (out + into) + (out if lora.dora else 0) for out, into in targets)
        return self.layers * per_layer + len(lora.modules_to_save) * self.vocabulary * self.hidden
