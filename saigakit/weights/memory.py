"""A model's shapes and a run's settings into the bytes that it needs, known before anything is loaded."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from saigakit.errors import SaigaError
from saigakit.registry import ALL_LINEAR, Lora, Quantization

CacheType = Literal["f16", "q8_0"]  # of keys and values
BITS = {"nf4": 4.13, "int8": 8.0}  # of a quantised weight; nf4 with double quantisation of its block scales
ADAPTER_BYTES = 16  # per trained parameter: float32 weight, gradient and two moments of AdamW
LARGE_VOCABULARY = 100_000  # from here on the head computes its logits in chunks
CHUNK_LOGITS = 1 << 24  # numbers of one chunk: 67 MB in float32
_LOGIT_BYTES = 12  # a float32 log-probability with two gradients: of the loss, and through the softmax
_CUDA_BYTES = 600 * 10**6  # CUDA's context, its libraries and gaps between tensors: an allowance, not measured
# Modules of a layer that read the same tensor.
_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")

# What transformers takes for granted, by model_type: published files leave such settings out.
_GEMMA = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma2": {**_GEMMA, "vocab_size": 256_000},
    "gemma3_text": {**_GEMMA, "vocab_size": 262_208},
    "qwen3": {"head_dim": 128},
}


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
    norms: int = 2  # of a layer
    head_norms: bool = False  # queries and keys have norms of their own

    @classmethod
    def of(cls, base_dir: Path) -> Self:
        """Raises SaigaError where config.json is missing, broken or of another kind of model."""
        file = base_dir / "config.json"
        try:
            config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SaigaError(f"{file} cannot be read ({error}); attach the complete base model.") from None
        config = config.get("text_config", config)
        config = {**_DEFAULTS.get(str(config.get("model_type")), {}), **config}
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
            norms=4 if str(config.get("model_type")).startswith(("gemma2", "gemma3")) else 2,
            head_norms=str(config.get("model_type")).startswith(("qwen3", "gemma3")),
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
        """Of the matrices of all layers, DoRA's magnitudes and whole trained modules."""
        targets = [self.linear[name] for name in lora.target_modules if name in self.linear]
        per_layer = sum(lora.rank * (out + into) + (out if lora.dora else 0) for out, into in targets)
        return self.layers * per_layer + len(lora.modules_to_save) * self.vocabulary * self.hidden


@dataclass(frozen=True, kw_only=True)
class Pack:
    """What of a pack decides its memory: lengths are in tokens; `learned` of all tokens have a label."""

    documents: Sequence[int]
    learned: int

    @property
    def tokens(self) -> int:
        return sum(self.documents)


def head_in_chunks(shape: Shape, lora: Lora) -> bool:
    """Whether training computes its logits in chunks: for a large vocabulary whose head is not trained itself."""
    return shape.vocabulary >= LARGE_VOCABULARY and "lm_head" not in lora.modules_to_save


def weights(shape: Shape, quantization: Quantization, itemsize: int) -> int:
    """Bytes of the loaded base; the embeddings and the head stay in `itemsize` bytes per number."""
    per_number = itemsize if quantization == "none" else BITS[quantization] / 8
    return int(shape.linear_parameters * per_number + shape.embedding_parameters * itemsize)


@dataclass(frozen=True)
class Step:
    """Bytes that a forward pass keeps for its backward pass, added up from what autograd saves of each operation.

    A frozen matrix saves nothing, for its input's gradient needs the weight alone. `itemsize` 2 means a GPU: autocast,
    fused attention, norms in float32. Counted against real models in benchmarks/training_memory.py.
    """

    shape: Shape
    lora: Lora
    pack: Pack
    itemsize: int
    quantization: Quantization

    @property
    def _stream(self) -> int:
        """Bytes of a number between layers: an nf4 matrix answers in the format of its input, float32."""
        return 4 if self.quantization == "nf4" else self.itemsize

    @property
    def _layer(self) -> int:
        shape, width = self.shape, self.shape.head_dim
        normed = shape.norms * shape.hidden + shape.head_norms * (shape.heads + shape.kv_heads) * width
        swiglu = 3 * shape.intermediate * self._stream  # gate, its SiLU, up
        per_token = 4 * normed + swiglu + self._attention + self._adapters + self._int8_inputs(alone=False)
        probabilities = 0 if self.itemsize == 2 else 4 * shape.heads * sum(size**2 for size in self.pack.documents)
        return self.pack.tokens * per_token + probabilities + self._dora_weights

    @property
    def _attention(self) -> int:
        """Per token. Fused: queries, keys, values, their result and its logsumexp. Else scaled copies of the first."""
        queries = self.shape.heads * self.shape.head_dim
        return 4 * queries * 2 + 4 * self.shape.heads if self.itemsize == 2 else 3 * queries * 4

    @property
    def _adapters(self) -> int:
        """Per token: what goes into A, the mask of its dropout, and what goes into B."""
        total = 0
        for names in _SAME_INPUT:
            targets = [self.shape.linear[name] for name in names if name in self.lora.target_modules]
            copied = self.itemsize == 2 or self.lora.dropout > 0  # by autocast or dropout: one for each target
            mask = (1 if self.itemsize == 2 else 4) if self.lora.dropout else 0  # a CPU keeps it as float32
            for number, (out, into) in enumerate(targets):
                total += into * mask + self.lora.rank * self.itemsize
                total += into * self.itemsize if copied or number == 0 else 0
                total += out * (self._stream + self.itemsize) if self.lora.dora else 0  # with and without magnitude
        return total

    def _int8_inputs(self, *, alone: bool) -> int:
        """Per token: bitsandbytes keeps what went into an int8 matrix, out of the sight of autograd and checkpointing.

        `alone`: no LoRA keeps any of it as its own input, as under checkpointing.
        """
        if self.quantization != "int8":
            return 0
        shared = self.itemsize == 4 and not self.lora.dropout and not alone
        targets = self.lora.target_modules if shared else ()
        groups = zip(_SAME_INPUT, (4, self.itemsize) * 2, strict=True)  # norms give float32
        return sum(self.shape.linear[names[0]][1] * size for names, size in groups if not set(names) & set(targets))

    @property
    def _dora_weights(self) -> int:
        """With dropout DoRA multiplies by the dequantised matrix a second time, and autograd keeps that copy."""
        if not (self.lora.dora and self.lora.dropout and (self.quantization != "none" or self.itemsize == 2)):
            return 0
        targets = [self.shape.linear[name] for name in self.lora.target_modules if name in self.shape.linear]
        return self.itemsize * sum(out * into for out, into in targets)

    def kept(self, *, checkpointing: bool) -> int:
        """By all layers: each its input alone, with activation checkpointing."""
        shape, tokens = self.shape, self.pack.tokens
        its_input = shape.hidden * self._stream + self._int8_inputs(alone=True)
        of_a_layer = tokens * its_input if checkpointing else self._layer
        last_norm, rotations = 4 * tokens * shape.hidden, 2 * tokens * shape.head_dim * self.itemsize
        return shape.layers * of_a_layer + last_norm + rotations

    def kept_by_the_loss(self, *, chunked: bool) -> int:
        """Log-probabilities in float32, or what goes into the head."""
        return 4 * self.pack.learned * (self.shape.hidden if chunked else self.shape.vocabulary)

    def logits(self, *, chunked: bool) -> int:
        """At the highest moment of the loss, forward or backward."""
        numbers = self.pack.learned * self.shape.vocabulary
        if not chunked:
            return numbers * _LOGIT_BYTES
        return 2 * self.kept_by_the_loss(chunked=True) + min(numbers, CHUNK_LOGITS) * _LOGIT_BYTES

    def working(self, *, checkpointing: bool) -> int:
        """At the highest moment of one layer's backward pass: gradients, a dequantised matrix, the layer made anew."""
        shape, longest = self.shape, max(self.pack.documents)
        gated = self.pack.tokens * shape.intermediate * self._stream
        matrix = max(out * into for out, into in shape.linear.values()) * self.itemsize
        matrix = 0 if self.quantization == "none" else matrix
        if self.lora.dora:  # a unit matrix through both adapters, and the norm of the sum with the weight, in float32
            matrix += max(4 * (into * into + 2 * out * into) for out, into in shape.linear.values())
        # By the time of attention's gradients those of the gated part, and what it had kept, are gone.
        attended = 0 if self.itemsize == 2 else 2 * 4 * shape.heads * longest**2 - 3 * gated
        return max(3 * gated, gated + matrix, attended) + (self._layer if checkpointing else 0)


def training(
    shape: Shape,
    *,
    quantization: Quantization,
    lora: Lora,
    pack_tokens: int,
    itemsize: int,
    checkpointing: bool,
    pack: Pack | None = None,
    chunked_head: bool | None = None,
) -> dict[str, int]:
    """Bytes by what they are for, at the highest moment of a step on one pack; their sum is that of the process.

    `itemsize`: bytes of a number in matrix products, 2 on a GPU and 4 on a CPU. `pack`: the largest of the run,
    where its rows are known; else one document of `pack_tokens`, half of it learned. `chunked_head`: None means as
    `head_in_chunks` says. On a GPU autocast, fused attention and float32 norms are taken for granted.
    """
    pack = pack or Pack(documents=(pack_tokens,), learned=pack_tokens // 2)
    chunked = head_in_chunks(shape, lora) if chunked_head is None else chunked_head
    step = Step(shape, lora, pack, itemsize, quantization)
    logits = step.logits(chunked=chunked)
    parts = {
        "weights": weights(shape, quantization, itemsize),
        "adapter and optimizer": shape.adapter_parameters(lora) * ADAPTER_BYTES,
        "activations": step.kept(checkpointing=checkpointing),
        "logits": logits,
        # The logits have gone when the backward pass comes to the layers: of the two the larger counts.
        "working buffers": max(0, step.working(checkpointing=checkpointing) - logits),
    }
    return parts | ({"CUDA": _CUDA_BYTES} if itemsize == 2 else {})


def inference(shape: Shape, quantization: Quantization, itemsize: int, tokens: int) -> dict[str, int]:
    """Bytes of a model that answers, with keys and values of `tokens` tokens."""
    cache = 2 * shape.layers * shape.kv_heads * shape.head_dim * itemsize * tokens
    return {"weights": weights(shape, quantization, itemsize), "keys and values": cache}


def in_words(parts: Mapping[str, int]) -> str:
    """ "weights 3.9 GB, activations 1.2 GB"; parts under 50 MB together at the end."""
    large = [f"{name} {size / 1e9:.1f} GB" for name, size in parts.items() if size >= 5e7]
    return ", ".join(large) or f"{math.fsum(parts.values()) / 1e6:.0f} MB in all"
