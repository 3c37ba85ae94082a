"""A base model's config.json into its GGUF form: tensor names, the order of rows, what the file says of the model."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from saigakit.errors import SaigaError
from saigakit.weights.model_shape import ModelShape

if TYPE_CHECKING:
    import gguf

    from saigakit.weights.tensors import Array, Shape

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
# Gemma's second norm of a layer stands before the feed-forward part, and each part has one after it too.
_NORMS_AROUND = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_WHOLE = {"token_embd": "embed_tokens", "output_norm": "norm"}
_HEAD = "lm_head"
# Where a checkpoint has its language model: alone, or beside what sees images, saved by transformers 4 and 5.
_PREFIXES = ("model.", "language_model.model.", "model.language_model.")
_IMAGES = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")
_ROPE_FREQS = "rope_freqs.weight"
_ROPE_SETTINGS = {  # beside theta, by rope_type; others are refused
    "default": (),
    "llama3": ("low_freq_factor", "high_freq_factor", "factor", "original_max_position_embeddings"),
    "linear": ("factor",),
}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One of llama.cpp's architectures."""

    name: str
    layer: Mapping[str, str] = field(default_factory=dict)  # GGUF name to Hugging Face's, beyond _LAYER
    interleaved_rope: bool = False  # a pair that turns together lies side by side, not half a head apart
    norms_from_one: bool = False  # a norm's weight is stored as its difference from 1
    activation: str = "silu"
    rope_theta: float = 10000.0  # where config.json has none
    window_period: int = 0  # of so many layers the last sees the whole text, the others a window; 0 means all see it
    lost_window: int = 0  # transformers' default of a window that llama.cpp does not compute
    late_window: bool = False  # the last layers alone have it, from max_window_layers on, and where it is asked for
    wide_queries: int = 0  # a model of so many layers scales queries by hidden / heads, the others by head_dim
    keys: Mapping[str, str] = field(default_factory=dict)  # setting of config.json to the method of GGUFWriter


_LLAMA = Kind(name="llama", interleaved_rope=True)
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
    "Gemma3ForConditionalGeneration": _GEMMA3,  # its language model alone
}


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
        made = cls(KINDS[named], shape, {**config, **config.get("text_config", {})})
        made._require_expressible(base_dir / "config.json")
        return made

    def _require_expressible(self, file: Path) -> None:
        """Raises SaigaError for a setting that llama.cpp computes otherwise, or that no key of a GGUF says."""
        config, kind, shape = self.config, self.kind, self.shape
        heads_share = shape.layers == kind.wide_queries
        scale = shape.hidden // shape.heads if heads_share else shape.head_dim
        for key, value, possible in (
            ("quantization_config", bool(config.get("quantization_config")), (False,)),
            ("hidden_act", self._activation, (kind.activation,)),
            ("rope_type", self._rope_type, tuple(_ROPE_SETTINGS)),
            ("query_pre_attn_scalar", config.get("query_pre_attn_scalar") or scale, (scale,)),
            ("layer_types", "usual" if self._has_usual_windows else "unusual", ("usual",)),
        ):
            if value not in possible:
                raise SaigaError(
                    f"{file} has {key}={value!r}, and saigakit can export {' or '.join(map(repr, possible))} "
                    "alone: give the original float16, bfloat16 or float32 model of a kind that it knows."
                )
        rope, needed = self._rope, _ROPE_SETTINGS[self._rope_type]
        if lacking := [key for key in needed if not isinstance(rope.get(key), int | float)]:
            raise SaigaError(
                f"{file}: rope_type={self._rope_type!r} lacks the number {', '.join(lacking)}; fetch it again."
            )
        self._require_windows(file)

    def _require_windows(self, file: Path) -> None:
        """Raises SaigaError where some layers have a window; that all have it, as in Mistral 7B v0.1, is said."""
        if not (window := self._lost_window):
            return
        said = f"{file}: layers see the last {window} tokens alone, which llama.cpp cannot compute of this kind"
        if self.kind.late_window:
            raise SaigaError(f"{said}. If no text is longer, write null for sliding_window and layer_types.")
        print(f"{said}: it sees the whole text, so its answers to longer ones differ.", flush=True)

    @property
    def _activation(self) -> str:
        found = self.config.get("hidden_activation") or self.config.get("hidden_act") or self.kind.activation
        return str(found)

    @property
    def _has_usual_windows(self) -> bool:
        """llama.cpp knows by the architecture which layers see a window."""
        period = self.kind.window_period
        if not period:
            return True
        usual = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(self.shape.layers)]
        stated = self.config.get("sliding_window_pattern") or period
        return bool(stated == period and (self.config.get("layer_types") or usual) == usual)

    @property
    def _lost_window(self) -> int:
        """Tokens that layers of the base see, where llama.cpp computes with the whole text; 0 where all see that."""
        config, kind = self.config, self.kind
        window: int = (kind.lost_window and config.get("sliding_window", kind.lost_window)) or 0
        is_short = window < config.get("max_position_embeddings", window + 1)
        is_late = config.get("use_sliding_window") and config.get("max_window_layers", 28) < self.shape.layers
        if types := config.get("layer_types"):
            is_late = "sliding_attention" in types
        return window if is_short and (is_late or not kind.late_window) else 0

    def untied(self) -> Self:
        """With a head of its own beside the embeddings."""
        return replace(self, shape=replace(self.shape, tied=False))

    @property
    def _rope(self) -> Mapping[str, Any]:
        """transformers 5 writes rope_parameters, before it rope_scaling; that of layers that see the whole text."""
        found: Mapping[str, Any] = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        return found.get("full_attention") or found

    @property
    def _rope_type(self) -> str:
        return str(self._rope.get("rope_type") or self._rope.get("type") or "default")

    @property
    def _rope_theta(self) -> float:
        return float(self._rope.get("rope_theta") or self.config.get("rope_theta") or self.kind.rope_theta)

    def sources(self, names: Iterable[str]) -> dict[str, str]:
        """GGUF name to the name in the base, of every tensor of the file; what the base has beyond is left out.

        Raises SaigaError where the base lacks one, or has one that would be lost.
        """
        there = set(names)
        prefix = next((prefix for prefix in _PREFIXES if f"{prefix}embed_tokens.weight" in there), _PREFIXES[0])
        head = f"{prefix.removesuffix('model.')}{_HEAD}.weight" if prefix == _PREFIXES[1] else f"{_HEAD}.weight"
        wanted = {f"{new}.weight": f"{prefix}{old}.weight" for new, old in _WHOLE.items()}
        for index in range(self.shape.layers):
            for new, old in {**_LAYER, **self.kind.layer}.items():
                wanted[f"blk.{index}.{new}.weight"] = f"{prefix}layers.{index}.{old}.weight"
        if self.shape.tied:
            there.discard(head)
        else:
            wanted["output.weight"] = head
        biases = {new.replace(".weight", ".bias"): old.replace(".weight", ".bias") for new, old in wanted.items()}
        wanted |= {new: old for new, old in biases.items() if old in there}
        if absent := [old for old in wanted.values() if old not in there]:
            raise SaigaError(f"The base has no {absent[0]} ({len(absent)} tensors are missing): a shard is not there.")
        if prefix != _PREFIXES[0]:
            there = {name for name in there if not _IMAGES.match(name)}
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

    def converted(self, name: str, tensor: "Array") -> "Array":
        """A tensor's numbers as llama.cpp computes with them."""
        if self.kind.norms_from_one and name.endswith("norm.weight"):
            return tensor + 1
        return self.reordered(name, tensor)

    def reordered(self, name: str, tensor: "Array") -> "Array":
        """Rows of the query and key matrices, or of some whole heads, as llama.cpp's rotation wants them."""
        if not self.kind.interleaved_rope or name.split(".")[-2] not in ("attn_q", "attn_k"):
            return tensor
        halves = tensor.reshape(-1, 2, self.shape.head_dim // 2, *tensor.shape[1:])  # of each head
        return halves.swapaxes(1, 2).reshape(tensor.shape)

    def computed(self) -> dict[str, "Array"]:
        """Tensors that no shard holds: Llama 3's frequency factors, 1 for short waves and `factor` for long ones."""
        import torch

        if self._rope_type != "llama3":
            return {}
        low, high, factor, original = (self._rope[key] for key in _ROPE_SETTINGS["llama3"])
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
        import gguf

        shape, config = self.shape, self.config
        writer.add_block_count(shape.layers)
        writer.add_context_length(config.get("max_position_embeddings", 2048))  # transformers' default, as below
        writer.add_embedding_length(shape.hidden)
        writer.add_feed_forward_length(shape.intermediate)
        writer.add_head_count(shape.heads)
        writer.add_head_count_kv(shape.kv_heads)
        writer.add_rope_freq_base(self._rope_theta)
        if self._rope_type == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(self._rope["factor"])
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
