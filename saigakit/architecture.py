"""A base model's config.json into its GGUF form: tensor names, the order of rows, what the file says of the model."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from saigakit.errors import SaigaError
from saigakit.memory import Shape as ModelShape

if TYPE_CHECKING:
    import gguf

    from saigakit.shards import Array, Shape

# GGUF name to Hugging Face's, of what every layer has.
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ROPE_FREQS = "rope_freqs.weight"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One of llama.cpp's architectures."""

    name: str
    interleaved_rope: bool  # a pair that turns together lies side by side, not half a head apart
    extra: Mapping[str, str]  # of a layer, beyond _LAYER


_LLAMA = Kind(name="llama", interleaved_rope=True, extra={})
_QWEN3 = Kind(
    name="qwen3",
    interleaved_rope=False,
    extra={"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"},
)
KINDS = {"LlamaForCausalLM": _LLAMA, "MistralForCausalLM": _LLAMA, "Qwen3ForCausalLM": _QWEN3}


@dataclass(frozen=True)
class Architecture:
    """A model that can be exported."""

    kind: Kind
    shape: ModelShape
    config: Mapping[str, Any]

    @classmethod
    def of(cls, base_dir: Path) -> Self:
        """Raises SaigaError that lists the known architectures, or names the setting that has no GGUF form."""
        shape = ModelShape.of(base_dir)
        config = json.loads((base_dir / "config.json").read_text(encoding="utf-8"))
        named = (config.get("architectures") or ["none"])[0]
        if named not in KINDS:
            raise SaigaError(
                f"{base_dir} is a {named}, which saigakit cannot export to GGUF; known are {', '.join(KINDS)}."
            )
        made = cls(KINDS[named], shape, config)
        for key, value, possible in (
            ("quantization_config", bool(config.get("quantization_config")), (False,)),
            ("hidden_act", config.get("hidden_act", "silu"), ("silu",)),
            ("rope_type", made._rope_type, ("default", "llama3")),
        ):
            if value not in possible:
                raise SaigaError(
                    f"{base_dir}/config.json has {key}={value!r}, and saigakit can export {possible[0]!r} alone: "
                    "give the original float16, bfloat16 or float32 model of a kind that it knows."
                )
        return made

    @property
    def _rope(self) -> Mapping[str, Any]:
        """transformers 5 writes rope_parameters, before it rope_scaling."""
        return self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}

    @property
    def _rope_type(self) -> str:
        return str(self._rope.get("rope_type") or self._rope.get("type") or "default")

    @property
    def _rope_theta(self) -> float:
        return float(self._rope.get("rope_theta") or self.config.get("rope_theta") or 10000.0)

    def sources(self, names: Iterable[str]) -> dict[str, str]:
        """GGUF name to the name in the base, of every tensor of the file; what the base has beyond is left out.

        Raises SaigaError where the base lacks one, or has one that would be lost.
        """
        there = set(names)
        layer = {**_LAYER, **self.kind.extra}
        wanted = {f"{new}.weight": f"{old}.weight" for new, old in _WHOLE.items()}
        for index in range(self.shape.layers):
            prefixes = (f"blk.{index}.", f"model.layers.{index}.")
            wanted |= {f"{prefixes[0]}{new}.weight": f"{prefixes[1]}{old}.weight" for new, old in layer.items()}
        if self.shape.tied:
            del wanted["output.weight"]
            there.discard("lm_head.weight")
        biases = {new.replace(".weight", ".bias"): old.replace(".weight", ".bias") for new, old in wanted.items()}
        wanted |= {new: old for new, old in biases.items() if old in there}
        if absent := [old for old in wanted.values() if old not in there]:
            raise SaigaError(f"The base has no {absent[0]} ({len(absent)} tensors are missing): a shard is not there.")
        there = {name for name in there - set(wanted.values()) if not name.endswith(".rotary_emb.inv_freq")}
        if there:
            raise SaigaError(f"The base has {min(there)}, which a {self.kind.name} GGUF has no place for.")
        return wanted

    def require_shapes(self, sources: Mapping[str, str], shapes: Mapping[str, "Shape"]) -> None:
        """Raises SaigaError where a matrix is not of the size that config.json announces."""
        linear = self.shape.linear
        for name, source in sources.items():
            module = source.split(".")[-2]
            wanted = linear.get(module, (self.shape.vocabulary, self.shape.hidden))
            if name.endswith(".weight") and "norm" not in module and shapes[source] != wanted:
                raise SaigaError(
                    f"{source} of the base has the shape {list(shapes[source])}, and its config.json says "
                    f"{list(wanted)}: files of two models were mixed, or the vocabulary was resized."
                )

    def reordered(self, name: str, tensor: "Array") -> "Array":
        """Rows of the query and key matrices as llama.cpp's rotation wants them."""
        heads = {"attn_q": self.shape.heads, "attn_k": self.shape.kv_heads}.get(name.split(".")[-2])
        if heads is None or not self.kind.interleaved_rope:
            return tensor
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape)

    def computed(self) -> dict[str, "Array"]:
        """Tensors that no shard holds: Llama 3's frequency factors, 1 for short waves and `factor` for long ones."""
        import torch

        if self._rope_type != "llama3":
            return {}
        low, high, factor, original = (
            self._rope[key]
            for key in ("low_freq_factor", "high_freq_factor", "factor", "original_max_position_embeddings")
        )
        exponents = torch.arange(0, self.shape.head_dim, 2, dtype=torch.float32) / self.shape.head_dim
        waves = 2 * math.pi / (1.0 / self._rope_theta**exponents)
        smooth = (original / waves - low) / (high - low)
        factors = 1 / ((1 - smooth) / factor + smooth)
        factors[waves < original / high] = 1.0
        factors[waves > original / low] = factor
        made: Array = factors.numpy()
        return {_ROPE_FREQS: made}

    def describe(self, writer: "gguf.GGUFWriter") -> None:
        """The keys that llama.cpp's own converter writes."""
        shape, config = self.shape, self.config
        writer.add_block_count(shape.layers)
        writer.add_context_length(config.get("max_position_embeddings", 2048))  # transformers' default, as below
        writer.add_embedding_length(shape.hidden)
        writer.add_feed_forward_length(shape.intermediate)
        writer.add_head_count(shape.heads)
        writer.add_head_count_kv(shape.kv_heads)
        writer.add_rope_freq_base(self._rope_theta)
        writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
        writer.add_key_length(shape.head_dim)
        writer.add_value_length(shape.head_dim)
        writer.add_vocab_size(shape.vocabulary)
        writer.add_rope_dimension_count(shape.head_dim)
