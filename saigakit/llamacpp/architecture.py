"""Map a base model to its GGUF form: tensor names, the order of rows and metadata."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from saigakit.core.lazy import gguf, torch
from saigakit.errors import SaigaError
from saigakit.weights.base_files import read_json
from saigakit.weights.model_shape import ModelShape
from saigakit.weights.names import Names
from saigakit.weights.tensors import Array, Shape

# Hugging Face names by GGUF name, in every layer.
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
# In Gemma the second norm of a layer precedes the feed-forward part, and each part is followed by one too.
_NORMS_AROUND = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GLOBAL = {"token_embd": "embed_tokens", "output_norm": "norm"}
_VISION = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")
_ROPE_SETTINGS = {  # by supported rope_type, in addition to theta
    "default": (),
    "llama3": ("low_freq_factor", "high_freq_factor", "factor", "original_max_position_embeddings"),
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
}
# What llama.cpp computes with, whatever the file says: it reads betas only for other architectures.
_YARN: dict[str, Any] = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
_YARN |= dict.fromkeys(("attention_factor", "mscale", "mscale_all_dim", "extrapolation_factor"))
_QKV = ("attn_q", "attn_k", "attn_v")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One of llama.cpp's architectures."""

    name: str
    layer: Mapping[str, str] = field(default_factory=dict)  # Hugging Face names in addition to _LAYER
    interleaved_rope: bool = False  # rotated pairs are adjacent, not half a head apart
    norms_from_one: bool = False  # weights of norms are stored as differences from 1
    activation: str = "silu"
    rope_theta: float = 10000.0  # if config.json has none
    window_period: int = 0  # one layer in this many has full attention, the others a window; 0: all have it
    lost_window: int = 0  # transformers' default of a window that llama.cpp ignores
    late_window: bool = False  # only layers from max_window_layers on have it, if use_sliding_window
    wide_queries: int = 0  # with this many layers queries are scaled by hidden / heads, else by head_dim
    biases: tuple[str, ...] = _QKV  # of which llama.cpp reads a bias
    keys: Mapping[str, str] = field(default_factory=dict)  # method of GGUFWriter by setting of config.json


_LLAMA = Kind(name="llama", interleaved_rope=True, biases=(*_QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down"))
_GEMMA2 = Kind(
    name="gemma2",
    layer=_NORMS_AROUND,
    norms_from_one=True,
    activation="gelu_pytorch_tanh",
    window_period=2,
    wide_queries=46,
    keys={
        "attn_logit_softcapping": "add_attn_logit_softcapping",
        "final_logit_softcapping": "add_final_logit_softcapping",
        "sliding_window": "add_sliding_window",
    },
)
_GEMMA3 = replace(
    _GEMMA2,
    name="gemma3",
    layer={**_NORMS_AROUND, **_HEAD_NORMS},
    rope_theta=1e6,
    window_period=6,
    wide_queries=62,
    keys={
        "final_logit_softcapping": "add_final_logit_softcapping",
        "sliding_window": "add_sliding_window",
        "rope_local_base_freq": "add_rope_freq_base_swa",
    },
)
KINDS = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": replace(_LLAMA, lost_window=4096),
    "Qwen2ForCausalLM": Kind(name="qwen2", lost_window=4096, late_window=True),
    "Qwen3ForCausalLM": Kind(name="qwen3", layer=_HEAD_NORMS, lost_window=4096, late_window=True),
    "Gemma2ForCausalLM": _GEMMA2,
    "Gemma3ForCausalLM": _GEMMA3,
    "Gemma3ForConditionalGeneration": _GEMMA3,  # only its language model
}


@dataclass(frozen=True)
class Architecture:
    """A model that can be exported."""

    kind: Kind
    shape: ModelShape
    config: Mapping[str, Any]

    @classmethod
    def from_config(cls, base_dir: Path) -> Self:
        """Raises SaigaError for an unknown architecture or a setting that has no GGUF form."""
        shape = ModelShape.from_config(base_dir)
        config = read_json(base_dir / "config.json")
        named = (config.get("architectures") or ["none"])[0]
        if named not in KINDS:
            raise SaigaError(
                f"{base_dir} is a {named}, which saigakit cannot export to GGUF; supported are {', '.join(KINDS)}."
            )
        architecture = cls(KINDS[named], shape, {**config, **config.get("text_config", {})})
        architecture._require_supported(base_dir / "config.json")
        return architecture

    def _require_supported(self, file: Path) -> None:
        """Raises SaigaError for a setting that llama.cpp computes differently or that no GGUF key expresses."""
        config, kind, shape = self.config, self.kind, self.shape
        has_wide_queries = shape.layers == kind.wide_queries
        scale = shape.hidden // shape.heads if has_wide_queries else shape.head_dim
        activation = config.get("hidden_activation") or config.get("hidden_act") or kind.activation
        for key, value, supported in (
            ("quantization_config", bool(config.get("quantization_config")), (False,)),
            ("hidden_act", activation, (kind.activation,)),
            ("rope_type", self._rope_type, tuple(_ROPE_SETTINGS)[: 3 if kind.window_period else None]),
            ("query_pre_attn_scalar", config.get("query_pre_attn_scalar") or scale, (scale,)),
            ("layer_types", "usual" if self._has_usual_windows else "unusual", ("usual",)),
        ):
            if value not in supported:
                raise SaigaError(
                    f"{file} has {key}={value!r}, but saigakit can export only {' or '.join(map(repr, supported))}. "
                    "Give the original float16, bfloat16 or float32 model of a supported kind."
                )
        rope, needed = self._rope, _ROPE_SETTINGS[self._rope_type]
        if missing := [key for key in needed if not isinstance(rope.get(key), int | float)]:
            raise SaigaError(
                f"{file}: rope_type={self._rope_type!r} needs a number for {', '.join(missing)}. Download it again."
            )
        if lost := [key for key in _YARN if self._rope_type == "yarn" and rope.get(key) not in (None, _YARN[key])]:
            raise SaigaError(
                f"{file}: rope_type='yarn' has {lost[0]}={rope[lost[0]]!r}, which llama.cpp computes differently. "
                "Give a model without it."
            )
        if window := self._lost_window:
            problem = (
                f"{file}: layers see only the last {window} tokens, which llama.cpp does not support for this kind"
            )
            if kind.late_window:
                raise SaigaError(f"{problem}. If no text is longer, write null for sliding_window and layer_types.")
            # All layers have the window, as in Mistral 7B v0.1.
            print(f"{problem}: it uses the full context, so answers to longer texts differ.", flush=True)

    @property
    def _has_usual_windows(self) -> bool:
        """Whether windows are in the layers where llama.cpp expects them in this architecture."""
        period = self.kind.window_period
        if not period:
            return True
        usual = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(self.shape.layers)]
        stated = self.config.get("sliding_window_pattern") or period
        return bool(stated == period and (self.config.get("layer_types") or usual) == usual)

    @property
    def _lost_window(self) -> int:
        """Window in tokens of layers for which llama.cpp uses the full context; 0 if there are none."""
        config, kind = self.config, self.kind
        window: int = (kind.lost_window and config.get("sliding_window", kind.lost_window)) or 0
        is_short = window < config.get("max_position_embeddings", window + 1)
        is_late = config.get("use_sliding_window") and config.get("max_window_layers", 28) < self.shape.layers
        if types := config.get("layer_types"):
            is_late = "sliding_attention" in types
        return window if is_short and (is_late or not kind.late_window) else 0

    @property
    def _rope(self) -> Mapping[str, Any]:
        """Of layers with full attention; transformers 5 writes rope_parameters, earlier versions rope_scaling."""
        found: Mapping[str, Any] = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        return found.get("full_attention") or found

    @property
    def _rope_type(self) -> str:
        return str(self._rope.get("rope_type") or self._rope.get("type") or "default")

    @property
    def _rope_theta(self) -> float:
        return float(self._rope.get("rope_theta") or self.config.get("rope_theta") or self.kind.rope_theta)

    def resized(self, vocabulary: int) -> Self:
        """With another number of tokens than config.json has."""
        shape = replace(self.shape, vocabulary=vocabulary)
        return replace(self, shape=shape, config={**self.config, "vocab_size": vocabulary})

    def source_names(self, names: Iterable[str]) -> dict[str, str]:
        """Base names by GGUF name. Raises SaigaError if the base lacks a tensor, or has one that would be lost."""
        remaining = set(names)
        spelled = Names.of(remaining)
        prefix, head = spelled.prefix, spelled.head
        wanted = {f"{new}.weight": f"{prefix}{old}.weight" for new, old in _GLOBAL.items()}
        for index in range(self.shape.layers):
            for new, old in {**_LAYER, **self.kind.layer}.items():
                wanted[f"blk.{index}.{new}.weight"] = f"{prefix}layers.{index}.{old}.weight"
        if self.shape.tied:
            remaining.discard(head)
        else:
            wanted["output.weight"] = head
        biases = {
            new.replace(".weight", ".bias"): old.replace(".weight", ".bias")
            for new, old in wanted.items()
            if new.split(".")[-2] in self.kind.biases
        }
        wanted |= {new: old for new, old in biases.items() if old in remaining}
        if missing := [old for old in wanted.values() if old not in remaining]:
            raise SaigaError(
                f"The base has no {missing[0]} ({len(missing)} tensors are missing). Add the missing shard."
            )
        if spelled != Names():
            remaining = {name for name in remaining if not _VISION.match(name)}
        remaining = {name for name in remaining - set(wanted.values()) if not name.endswith(".rotary_emb.inv_freq")}
        if remaining:
            raise SaigaError(f"The base has {min(remaining)}, which a {self.kind.name} GGUF has no place for.")
        return wanted

    def require_shapes(self, sources: Mapping[str, str], shapes: Mapping[str, Shape]) -> None:
        """Raises SaigaError if a matrix has another size than config.json implies."""
        linear = self.shape.linear
        for name, source in sources.items():
            module = source.split(".")[-2]
            wanted = linear.get(module, (self.shape.vocabulary, self.shape.hidden))
            if name.endswith(".weight") and "norm" not in module and shapes[source] != wanted:
                raise SaigaError(
                    f"{source} of the base has the shape {list(shapes[source])}, but its config.json implies "
                    f"{list(wanted)}: files of two models were mixed, or the vocabulary was resized."
                )

    def convert(self, name: str, tensor: Array) -> Array:
        """Numbers and order of rows as llama.cpp expects them."""
        if self.kind.norms_from_one and name.endswith("norm.weight"):
            return tensor + 1
        return self.reorder(name, tensor)

    def reorder(self, name: str, tensor: Array) -> Array:
        """Reorder rows of complete query and key heads for llama.cpp's rotation."""
        if not self.kind.interleaved_rope or name.split(".")[-2] not in ("attn_q", "attn_k"):
            return tensor
        halves = tensor.reshape(-1, 2, self.shape.head_dim // 2, *tensor.shape[1:])  # of each head
        return halves.swapaxes(1, 2).reshape(tensor.shape)

    def computed_tensors(self) -> dict[str, Array]:
        """Tensors that no shard contains: Llama 3's frequency factors, 1 for short waves and `factor` for long ones."""
        if self._rope_type != "llama3":
            return {}
        low, high, factor, original = (self._rope[key] for key in _ROPE_SETTINGS["llama3"])
        exponents = torch.arange(0, self.shape.head_dim, 2, dtype=torch.float32) / self.shape.head_dim
        waves = 2 * math.pi / (1.0 / self._rope_theta**exponents)
        smooth = (original / waves - low) / (high - low)
        factors = 1 / ((1 - smooth) / factor + smooth)
        factors[waves < original / high] = 1.0
        factors[waves > original / low] = factor
        return {"rope_freqs.weight": factors.numpy()}

    def write_metadata(self, writer: "gguf.GGUFWriter") -> None:
        """Write the keys that llama.cpp's own converter writes."""
        shape, config = self.shape, self.config
        writer.add_block_count(shape.layers)
        writer.add_context_length(config.get("max_position_embeddings", 2048))  # transformers' default, as below
        writer.add_embedding_length(shape.hidden)
        writer.add_feed_forward_length(shape.intermediate)
        writer.add_head_count(shape.heads)
        writer.add_head_count_kv(shape.kv_heads)
        writer.add_rope_freq_base(self._rope_theta)
        if self._rope_type in ("linear", "yarn"):
            writer.add_rope_scaling_type(gguf.RopeScalingType(self._rope_type))
            writer.add_rope_scaling_factor(self._rope["factor"])
        if self._rope_type == "yarn":
            writer.add_rope_scaling_orig_ctx_len(self._rope["original_max_position_embeddings"])
            for key in ("beta_fast", "beta_slow"):
                if self._rope.get(key) is not None:
                    getattr(writer, f"add_rope_scaling_yarn_{key}")(self._rope[key])
        writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
        writer.add_key_length(shape.head_dim)
        writer.add_value_length(shape.head_dim)
        if self.kind.interleaved_rope:
            writer.add_vocab_size(shape.vocabulary)
            writer.add_rope_dimension_count(shape.head_dim)
        local = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
        settings = {"rope_local_base_freq": local.get("rope_theta", 10000.0), **config}
        for setting, method in self.kind.keys.items():
            if settings.get(setting) is not None:
                getattr(writer, method)(settings[setting])
