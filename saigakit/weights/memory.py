"""Estimate the memory that training and inference need, before anything is loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

from saigakit.registry import Lora, Quantization
from saigakit.weights.model_shape import ModelShape

CacheType = Literal["f16", "q8_0"]  # of the KV cache
BITS = {"nf4": 4.13, "int8": 8.0}  # per quantised weight; nf4 with double quantisation of its block scales
ADAPTER_BYTES = 16  # per trained parameter: float32 weight, gradient and two moments of AdamW
LARGE_VOCABULARY = 100_000  # from here on training computes its logits in chunks
CHUNK_LOGITS = 1 << 24  # logits per chunk: 67 MB in float32
_LOGIT_BYTES = 12  # a float32 log-probability and two gradients: of the loss, and through the softmax
_CUDA_BYTES = 600 * 10**6  # CUDA context, libraries and fragmentation: an allowance, not measured
_SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


class Pack(NamedTuple):
    """A pack as far as its memory depends on it."""

    documents: Sequence[int]  # length of each in tokens
    trained: int  # tokens with a label

    @classmethod
    def one_document(cls, tokens: int) -> Self:
        """A typical pack where the rows are not known yet: half of its tokens are trained."""
        return cls(documents=(tokens,), trained=tokens // 2)

    @property
    def tokens(self) -> int:
        return sum(self.documents)


def needs_chunked_head(shape: ModelShape, lora: Lora) -> bool:
    """Whether training computes its logits in chunks: for a large vocabulary whose head is not trained itself."""
    return shape.vocabulary >= LARGE_VOCABULARY and "lm_head" not in lora.modules_to_save


def weight_bytes(shape: ModelShape, quantization: Quantization, itemsize: int) -> int:
    """Bytes of the loaded base; embeddings and head are not quantised and keep `itemsize` bytes per number."""
    per_number = itemsize if quantization == "none" else BITS[quantization] / 8
    return int(shape.linear_parameters * per_number + shape.embedding_parameters * itemsize)


@dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """Bytes of one forward and backward pass, summed over what autograd saves for each operation.

    A frozen matrix saves nothing: the gradient of its input needs only the weight. An `itemsize` of 2 implies a GPU
    with autocast, fused attention and float32 norms. Checked against real models in benchmarks/training_memory.py.
    """

    shape: ModelShape
    lora: Lora
    pack: Pack
    quantization: Quantization
    itemsize: int  # bytes of a number in matrix products: 2 on a GPU, 4 on a CPU
    checkpointing: bool
    chunked_head: bool | None = None  # None: as `needs_chunked_head` decides

    def memory(self) -> dict[str, int]:
        """Bytes by purpose at the peak of the step; they add up to those of the whole process."""
        logits = self._logits
        parts = {
            "weights": weight_bytes(self.shape, self.quantization, self.itemsize),
            "adapter and optimizer": self.shape.adapter_parameters(self.lora) * ADAPTER_BYTES,
            "activations": self.activations,
            "logits": logits,
            # The logits are freed before the backward pass reaches the layers: the larger of the two counts.
            "working buffers": max(0, self._working_buffers - logits),
        }
        return parts | ({"CUDA": _CUDA_BYTES} if self.itemsize == 2 else {})

    @property
    def activations(self) -> int:
        """Saved by all layers: with activation checkpointing only the input of each."""
        shape, tokens = self.shape, self.pack.tokens
        layer_input = shape.hidden * self._stream_itemsize + self._int8_inputs_per_token(shared_with_lora=False)
        per_layer = tokens * layer_input if self.checkpointing else self._layer
        last_norm, rotations = 4 * tokens * shape.hidden, 2 * tokens * shape.head_dim * self.itemsize
        return shape.layers * per_layer + last_norm + rotations

    @property
    def saved_by_loss(self) -> int:
        """Log-probabilities in float32 or, in chunks, the input of the head."""
        return 4 * self.pack.trained * (self.shape.hidden if self._is_chunked else self.shape.vocabulary)

    @property
    def _is_chunked(self) -> bool:
        return needs_chunked_head(self.shape, self.lora) if self.chunked_head is None else self.chunked_head

    @property
    def _logits(self) -> int:
        """At the peak of the loss, forward or backward."""
        numbers = self.pack.trained * self.shape.vocabulary
        if not self._is_chunked:
            return numbers * _LOGIT_BYTES
        return 2 * self.saved_by_loss + min(numbers, CHUNK_LOGITS) * _LOGIT_BYTES

    @property
    def _working_buffers(self) -> int:
        """At the peak of one layer's backward pass: gradients, a dequantised matrix, the recomputed layer."""
        shape, longest = self.shape, max(self.pack.documents)
        gated = self.pack.tokens * shape.intermediate * self._stream_itemsize
        matrix = max(out * into for out, into in shape.linear.values()) * self.itemsize
        matrix = 0 if self.quantization == "none" else matrix
        if self.lora.dora:  # a unit matrix through both adapters, and the norm of their sum with the weight, in float32
            matrix += max(4 * (into * into + 2 * out * into) for out, into in shape.linear.values())
        # By the time of attention's gradients, those of the gated part and what it saved are freed.
        attended = 0 if self.itemsize == 2 else 2 * 4 * shape.heads * longest**2 - 3 * gated
        return max(3 * gated, gated + matrix, attended) + (self._layer if self.checkpointing else 0)

    @property
    def _stream_itemsize(self) -> int:
        """Bytes of a number between layers: an nf4 matrix returns the format of its input, float32."""
        return 4 if self.quantization == "nf4" else self.itemsize

    @property
    def _layer(self) -> int:
        shape = self.shape
        normed = shape.norms * shape.hidden + shape.head_norms * (shape.heads + shape.kv_heads) * shape.head_dim
        swiglu = 3 * shape.intermediate * self._stream_itemsize  # gate, its SiLU, up
        int8_inputs = self._int8_inputs_per_token(shared_with_lora=True)
        per_token = 4 * normed + swiglu + self._attention_per_token + self._adapters_per_token + int8_inputs
        probabilities = 0 if self.itemsize == 2 else 4 * shape.heads * sum(size**2 for size in self.pack.documents)
        return self.pack.tokens * per_token + probabilities + self._dora_weights

    @property
    def _attention_per_token(self) -> int:
        """Fused: queries, keys, values, the result and its logsumexp. Otherwise scaled copies of queries and keys."""
        queries = self.shape.heads * self.shape.head_dim
        return 4 * queries * 2 + 4 * self.shape.heads if self.itemsize == 2 else 3 * queries * 4

    @property
    def _adapters_per_token(self) -> int:
        """The input of A, the mask of its dropout and the input of B."""
        total = 0
        for names in _SHARED_INPUT:
            targets = [self.shape.linear[name] for name in names if name in self.lora.target_modules]
            copied = self.itemsize == 2 or self.lora.dropout > 0  # by autocast or dropout: once per target
            mask = (1 if self.itemsize == 2 else 4) if self.lora.dropout else 0  # a CPU keeps it as float32
            for index, (out, into) in enumerate(targets):
                total += into * mask + self.lora.rank * self.itemsize
                total += into * self.itemsize if copied or index == 0 else 0
                total += out * (self._stream_itemsize + self.itemsize) if self.lora.dora else 0  # before and after
        return total

    def _int8_inputs_per_token(self, *, shared_with_lora: bool) -> int:
        """Inputs of int8 matrices, which bitsandbytes keeps outside of autograd, if LoRA does not keep them anyway."""
        if self.quantization != "int8":
            return 0
        is_shared = shared_with_lora and self.itemsize == 4 and not self.lora.dropout
        targets = self.lora.target_modules if is_shared else ()
        groups = zip(_SHARED_INPUT, (4, self.itemsize) * 2, strict=True)  # norms return float32
        return sum(self.shape.linear[names[0]][1] * size for names, size in groups if not set(names) & set(targets))

    @property
    def _dora_weights(self) -> int:
        """With dropout, DoRA multiplies by the dequantised matrix a second time, and autograd keeps that copy."""
        if not (self.lora.dora and self.lora.dropout and (self.quantization != "none" or self.itemsize == 2)):
            return 0
        targets = [self.shape.linear[name] for name in self.lora.target_modules if name in self.shape.linear]
        return self.itemsize * sum(out * into for out, into in targets)


def inference_memory(shape: ModelShape, quantization: Quantization, itemsize: int, tokens: int) -> dict[str, int]:
    """Bytes by purpose of a model that generates, with a KV cache of `tokens` tokens."""
    cache = 2 * shape.layers * shape.kv_heads * shape.head_dim * itemsize * tokens
    return {"weights": weight_bytes(shape, quantization, itemsize), "keys and values": cache}


def format_parts(parts: Mapping[str, int]) -> str:
    """ "weights 3.9 GB, activations 1.2 GB", leaving out parts under 50 MB."""
    large = [f"{name} {size / 1e9:.1f} GB" for name, size in parts.items() if size >= 5e7]
    return ", ".join(large) or f"{sum(parts.values()) / 1e6:.0f} MB in total"
