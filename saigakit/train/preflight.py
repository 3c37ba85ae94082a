"""A run's settings against the machine and the model's files: what cannot work is refused before weights load."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from saigakit.config import TrainConfig
from saigakit.core import install, workspace
from saigakit.core.workspace import Gpu
from saigakit.errors import SaigaError
from saigakit.registry import Lora
from saigakit.weights import fold, load, memory, tensors
from saigakit.weights.load import NumberFormat
from saigakit.weights.model_shape import ModelShape

_WEIGHT_BYTES = 4  # of a trained parameter
_FILES = 12  # times the adapter: it, the best one, a checkpoint (it and AdamW's two moments) and the next, or its copy
_BESIDES = 10 * 10**6  # bytes of log, curve and configs
_WHOLE = ("embed_tokens", "lm_head")  # what modules_to_save may name


def machine(config: TrainConfig, gpus: Sequence[Gpu]) -> NumberFormat:
    """Before anything is fetched: the number format that training will compute in.

    Raises SaigaError for a GPU that is too old or overflows with this model, for fewer GPUs than processes, and for a
    package that peft refuses.
    """
    install.require_no_old_torchao()
    if gpus and (config.processes or 1) > len(gpus):
        raise SaigaError(
            f"processes={config.processes}, and {len(gpus)} GPU{'s are' if len(gpus) > 1 else ' is'} here; "
            f"each process needs one of its own. Use processes={len(gpus)}, or None for one on each."
        )
    return load.number_format(config.spec, gpus[: config.processes])


def sharding(config: TrainConfig, gpus: Sequence[Gpu], machines: int) -> None:
    """Raises SaigaError where the base cannot be in parts over several GPUs: sharding="fsdp"."""
    if not config.is_sharded:
        return
    if not gpus or min(config.processes or len(gpus), len(gpus)) * machines < 2:
        raise SaigaError(
            f"sharding='fsdp' puts parts of the base on several GPUs, and here {'is' if len(gpus) == 1 else 'are'} "
            f"{len(gpus) or 'none'} for {config.processes or max(1, len(gpus))} processes. Leave sharding out."
        )
    if config.weights_as == "int8":
        raise SaigaError(
            "sharding='fsdp' cannot split int8 weights, whose bytes are no floats. Use quantization='nf4' or 'none'."
        )


def sharded_lora(config: TrainConfig, lora: Lora) -> None:
    """Raises SaigaError where `lora`, new or continued, is more than matrices beside the base's."""
    if config.is_sharded and (lora.modules_to_save or lora.dora):
        raise SaigaError(
            "sharding='fsdp' keeps the LoRA alone whole on each GPU, and DoRA and modules_to_save need the base's own "
            "matrices. Leave them out of lora, or give another adapter."
        )


def sharded_loading(config: TrainConfig, shape: ModelShape, processes: int) -> None:
    """Raises SaigaError where the RAM is too small: each process of this machine loads the whole base there."""
    if config.is_sharded:
        whole = memory.weight_bytes(shape, config.weights_as, itemsize=2)
        remedy = "Use fewer processes on this machine, quantization='nf4' or a smaller model."
        workspace.require_memory(whole * processes, f"Loading the base in each of {processes} processes", remedy)


def process(visible_gpus: int, processes: int, number_format: NumberFormat) -> None:
    """In a child, where torch counts the GPUs. Raises SaigaError where the parent, which asked nvidia-smi, saw others.

    One process that sees several would double loss and gradients.
    """
    if not visible_gpus and number_format != "float32":
        raise SaigaError(
            "torch sees no GPU, and nvidia-smi lists one. Install a torch that is built for CUDA, or set "
            "CUDA_VISIBLE_DEVICES to nothing to train on the CPU."
        )
    if processes == 1 and visible_gpus > 1:
        raise SaigaError(
            f"One process sees {visible_gpus} GPUs, and would give a quantised model twice its loss. Set "
            "CUDA_VISIBLE_DEVICES=0 before torch is imported, or start training through train_adapter, which does."
        )


def model(config: TrainConfig, base_dir: Path, adapter_dir: Path | None) -> Lora:
    """When the files are there: the adapter that will be trained, the continued one's own settings or the new one's.

    Raises SaigaError for weights that are incomplete, an adapter of another base, settings of a new LoRA beside an
    adapter that is continued, and modules that this base does not have.
    """
    stored = tensors.open_base(base_dir).stored
    if any("language_model." in name for name in stored):
        raise SaigaError(
            f"{base_dir} reads images too, and the adapter would be of that part as well, which no GGUF has. Give a "
            "version of its text model alone, whose layers begin with 'model.layers'."
        )
    lora = config.new_lora
    if adapter_dir is not None:
        load.require_fitting(adapter_dir, base_dir)
        lora = _beside(config, base_dir, adapter_dir)
    _require_modules(lora, stored, base_dir)
    _require_context(config, base_dir)
    return lora


def _beside(config: TrainConfig, base_dir: Path, adapter_dir: Path) -> Lora:
    """What is trained where there is an adapter already: itself, or the new LoRA beside the folded one."""
    released = load.lora_of(adapter_dir)
    if config.is_folded:
        fold.require_foldable(base_dir, adapter_dir)
        if config.new_lora.dora or config.new_lora.modules_to_save:
            raise SaigaError(
                f"adapter={config.adapter!r} makes one plain LoRA of two, and lora has dora or modules_to_save. Leave "
                "them out, or use adapter='released' to continue the released one, or None for a new LoRA alone."
            )
        return config.new_lora
    if config.lora is not None and _sorted(config.lora) != _sorted(released):
        raise SaigaError(
            f"lora is given, and adapter={config.adapter!r} continues {adapter_dir}, which keeps its own (rank "
            f"{released.rank}, alpha {released.alpha}, {', '.join(released.target_modules)}). Leave lora out, or use "
            "adapter=None for a new one."
        )
    return released


def _require_context(config: TrainConfig, base_dir: Path) -> None:
    """For models that are not in the registry, which config has looked at."""
    content = json.loads((base_dir / "config.json").read_text(encoding="utf-8"))
    most = content.get("text_config", content).get("max_position_embeddings")
    if isinstance(most, int) and config.sequence_budget > most:
        raise SaigaError(
            f"max_seq_length={config.sequence_budget} is over the context length of {base_dir}, {most} tokens "
            "(max_position_embeddings)."
        )


def _sorted(lora: Lora) -> Lora:
    return replace(lora, target_modules=tuple(sorted(lora.target_modules)))


def _require_modules(lora: Lora, stored: Iterable[str], base_dir: Path) -> None:
    names = [name.removesuffix(".weight") for name in stored if name.endswith(".weight")]
    linear = {name.rpartition(".")[2] for name in names if ".layers." in name and "norm" not in name}
    if unknown := sorted(set(lora.target_modules) - linear):
        raise SaigaError(
            f"lora.target_modules names {', '.join(unknown)}, and the layers of {base_dir} have "
            f"{', '.join(sorted(linear))}."
        )
    if strange := sorted(set(lora.modules_to_save) - set(_WHOLE)):
        raise SaigaError(f"lora.modules_to_save names {', '.join(strange)}; use {' or '.join(map(repr, _WHOLE))}.")
    if lora.modules_to_save and ModelShape.from_config(base_dir).tied:
        raise SaigaError(
            f"lora.modules_to_save={lora.modules_to_save}: {base_dir} uses its embeddings as its head (tied), and one "
            "alone cannot be trained. Leave modules_to_save out."
        )


def disk(directory: Path, shape: ModelShape, lora: Lora) -> None:
    """Raises SaigaError where the adapter and two of its checkpoints will not fit."""
    adapter = shape.adapter_parameters(lora) * _WEIGHT_BYTES
    workspace.require_disk(directory, _FILES * adapter + _BESIDES, "The adapter with its checkpoints")


def fits(parts: dict[str, int], gpus: Sequence[Gpu], processes: int, *, pack: str) -> None:
    """Says what training needs. Raises SaigaError with that number and the one that is there.

    `parts` is what TrainingStep.memory gave for a pack, which `pack` names.
    """
    remedy = "Use a smaller max_seq_length, quantization='nf4' or a smaller model."
    total, words = sum(parts.values()), memory.format_parts(parts)
    print(f"Memory for {pack}: about {total / 1e9:.1f} GB for each process ({words}).", flush=True)
    for gpu in gpus:
        if gpu.free < total:
            raise SaigaError(
                f"Training needs about {total / 1e9:.1f} GB on {gpu.name} ({words}), and {gpu.free / 1e9:.1f} GB of "
                f"its {gpu.memory / 1e9:.1f} GB are free. {remedy}"
            )
    if not gpus:
        workspace.require_memory(total * processes, f"Training ({words})", remedy)
