"""Compare the training memory that saigakit.weights.memory predicts with that of real models on a CPU.

    python benchmarks/training_memory.py            the grid: predicted, measured, ratio
    python benchmarks/training_memory.py --models   the memory that the registry's models need on a T4

Two values are measured: the tensors that autograd keeps between the forward and the backward pass, without parameters
and each storage counted once (what int8 matrices keep is not visible there); and, with the profiler, the peak of the
memory that torch's allocator hands out during one step.
"""

import argparse
import itertools
import json
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from saigakit.registry import ALL_LINEAR, ATTENTION, MODELS, Lora
from saigakit.train import layers, steps
from saigakit.weights import load
from saigakit.weights.memory import Pack, TrainingStep
from saigakit.weights.model_shape import ModelShape

CLASSES = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
NO_DROPOUT = Lora(dropout=0.0)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A random model, an adapter and one pack of documents."""

    kind: str = "llama"
    hidden: int = 256
    intermediate: int = 688
    heads: int = 8
    kv_heads: int = 8
    layers: int = 2
    vocabulary: int = 2000
    documents: tuple[int, ...] = (200, 180, 132)
    lora: Lora = NO_DROPOUT
    quantization: str = "none"
    checkpointing: bool = False
    chunked: bool = False
    autocast: bool = False  # bfloat16 and the fused kernel, as on a GPU


@dataclass(frozen=True, kw_only=True)
class Bytes:
    predicted: int
    measured: int

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured


def compare(case: Case) -> tuple[Bytes, Bytes]:
    """Return what autograd keeps, and the peak of a step."""
    model, shape = build(case)
    pack = Pack(documents=case.documents, trained=sum(size // 2 for size in case.documents))
    batch = batch_of(pack, case.vocabulary)
    step = TrainingStep(
        shape=shape,
        lora=case.lora,
        pack=pack,
        quantization=case.quantization,
        itemsize=2 if case.autocast else 4,
        checkpointing=case.checkpointing,
        chunked_head=case.chunked,
    )
    kept, parts = step.activations + step.saved_by_loss, step.memory()
    step_bytes = sum(parts[name] for name in ("activations", "logits", "working buffers"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) * 4  # gradients, allocated in the step
    return (
        Bytes(predicted=kept, measured=kept_by_autograd(model, batch, case)),
        Bytes(predicted=step_bytes + trained, measured=measure_peak(model, batch, case)),
    )


def build(case: Case) -> tuple[torch.nn.Module, ModelShape]:
    torch.manual_seed(0)
    config = CLASSES[case.kind](
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        intermediate_size=case.intermediate,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        head_dim=case.hidden // case.heads,
    )
    with tempfile.TemporaryDirectory() as directory:
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
        dtype = torch.bfloat16 if case.autocast else torch.float32
        base = load.base_model(Path(directory), case.quantization, dtype, "cpu")
        shape = ModelShape.from_config(Path(directory))
    base.config.use_cache = False
    layers.use_packed_attention(base)
    if case.autocast:
        base.set_attn_implementation("sdpa")  # fused, for a pack of one document
        for parameter in base.parameters():
            if parameter.ndim == 1:
                parameter.data = parameter.data.float()
    if case.checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    model = load.with_adapter(base, None, case.lora).train()
    if case.chunked:
        layers.use_chunked_loss(model)
    return model, shape


def batch_of(pack: Pack, vocabulary: int) -> dict[str, torch.Tensor]:
    rows = []
    for size in pack.documents:
        ids = [number * 7 % vocabulary for number in range(size)]
        rows.append({"input_ids": ids, "labels": [-100] * (size - size // 2) + ids[size - size // 2 :]})
    return steps.collate(rows)


def loss_of(model: torch.nn.Module, batch: dict[str, torch.Tensor], case: Case) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
        return model(**batch, use_cache=False).loss


class Held:
    """A saved tensor; it lives as long as the graph that saved it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def kept_by_autograd(model: torch.nn.Module, batch: dict[str, torch.Tensor], case: Case) -> int:
    frozen = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    held: weakref.WeakSet[Held] = weakref.WeakSet()

    def keep(tensor: torch.Tensor) -> Held:
        made = Held(tensor)
        held.add(made)
        return made

    with saved_tensors_hooks(keep, lambda made: made.tensor):
        loss = loss_of(model, batch, case)
    storages = {made.tensor.untyped_storage().data_ptr(): made.tensor.untyped_storage().nbytes() for made in held}
    del loss
    return sum(size for pointer, size in storages.items() if pointer not in frozen)


def measure_peak(model: torch.nn.Module, batch: dict[str, torch.Tensor], case: Case) -> int:
    """Return the bytes above those held before the step."""
    loss_of(model, batch, case).backward()
    model.zero_grad()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss_of(model, batch, case).backward()
    model.zero_grad()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(changes))


def grid() -> list[Case]:
    qwen = {"kind": "qwen2", "kv_heads": 2}
    shapes = [
        {},
        {"hidden": 512, "intermediate": 1376, "layers": 4, "kv_heads": 2, "documents": (256,)},
        {"hidden": 1024, "intermediate": 2816, "heads": 16, "kv_heads": 4, "kind": "mistral", "documents": (900, 124)},
        {"layers": 8, "documents": (700, 600, 500, 248), **qwen},
        {"hidden": 384, "intermediate": 1024, "layers": 6, "heads": 6, "kv_heads": 3, "kind": "qwen3"},
    ]
    loras = [Lora(target_modules=ATTENTION, dropout=0.0), Lora(target_modules=ALL_LINEAR, dropout=0.05)]
    found = [
        Case(**shape, lora=lora, quantization=quantization, checkpointing=checkpointing)
        for shape in shapes
        for lora in loras
        for quantization in ("none", "nf4")
        for checkpointing in (False, True)
    ]
    found += [Case(layers=4, quantization="int8", checkpointing=checkpointing) for checkpointing in (False, True)]
    large = {"vocabulary": 120_000, "layers": 2}
    found += [Case(**large, chunked=chunked, checkpointing=True) for chunked in (False, True)]
    found += [Case(lora=Lora(dora=True, dropout=dropout), quantization="nf4") for dropout in (0.0, 0.05)]
    half = {"autocast": True, "documents": (512,), "layers": 4}
    found += [
        Case(**half, quantization=quantization, checkpointing=checkpointing, lora=NO_DROPOUT)
        for quantization in ("none", "nf4")
        for checkpointing in (False, True)
    ]
    return found


def describe(case: Case) -> str:
    modules = "all" if len(case.lora.target_modules) == len(ALL_LINEAR) else "attention"
    extras = [name for name in ("checkpointing", "chunked", "autocast") if getattr(case, name)]
    extras += ["dora"] if case.lora.dora else []
    return (
        f"{case.kind:8} {case.hidden:5} x {case.layers} {case.heads:3}/{case.kv_heads:<2} "
        f"{sum(case.documents):5} tokens  {modules:9} {case.lora.dropout:<4} {case.quantization:4} "
        f"{' '.join(extras):22}"
    )


# From the published config.json files.
_8B = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}
MODELS_CONFIGS = {
    "saiga2_7b": {**_8B, "num_key_value_heads": 32, "num_hidden_layers": 32, "intermediate_size": 11008,
                  "vocab_size": 32000},
    "saiga2_13b": {"hidden_size": 5120, "num_attention_heads": 40, "num_hidden_layers": 40,
                   "intermediate_size": 13824, "vocab_size": 32000},
    "saiga_mistral_7b": {**_8B, "num_hidden_layers": 32, "intermediate_size": 14336, "vocab_size": 32002},
    "saiga_llama3_8b": {**_8B, "num_hidden_layers": 32, "intermediate_size": 14336, "vocab_size": 128256},
    "saiga_nemo_12b": {"hidden_size": 5120, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
                       "num_hidden_layers": 40, "intermediate_size": 14336, "vocab_size": 131072},
    "tlite_2.1_8b": {**_8B, "model_type": "qwen3", "head_dim": 128, "num_hidden_layers": 36,
                     "intermediate_size": 12288, "vocab_size": 151936},
}  # fmt: skip


def print_models_table() -> None:
    """Assume nf4, float16, activation checkpointing and one pack of the model's own max_seq_length."""
    names = ["weights", "adapter and optimizer", "activations", "logits", "working buffers", "CUDA"]
    print(f"{'GB':30} tokens {' '.join(f'{name:>21}' for name in names)}      total   T4: 16.1")
    for (name, config), trained in itertools.product(MODELS_CONFIGS.items(), (0.5, 1.0)):
        spec = MODELS[name]
        with tempfile.TemporaryDirectory() as directory:
            (Path(directory) / "config.json").write_text(json.dumps(config), encoding="utf-8")
            shape = ModelShape.from_config(Path(directory))
        tokens = spec.max_seq_length
        parts = TrainingStep(
            shape=shape,
            lora=spec.lora,
            pack=Pack(documents=(tokens,), trained=int(tokens * trained)),
            quantization="nf4",
            itemsize=2,
            checkpointing=True,
        ).memory()
        numbers = " ".join(f"{parts[part] / 1e9:21.2f}" for part in names)
        print(f"{name:18} {trained:4.0%} trained {tokens:6} {numbers} {sum(parts.values()) / 1e9:10.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", action="store_true")
    load.silence_libraries()
    if parser.parse_args().models:
        return print_models_table()
    print(f"{'':86}kept by autograd, MB          peak of a step, MB")
    print(f"{'':86}predicted  measured  ratio    predicted  measured  ratio")
    for case in grid():
        numbers = [f"{b.predicted / 1e6:9.1f} {b.measured / 1e6:9.1f} {b.ratio:6.2f}" for b in compare(case)]
        print(f"{describe(case):86}{'    '.join(numbers)}", flush=True)
    return None


if __name__ == "__main__":
    main()
