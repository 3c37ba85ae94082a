"""Resolve the inputs of a training, and check them before any weights are loaded."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from saigakit import registry
from saigakit.config import TrainConfig, sequence_budget
from saigakit.core import install, manifest, workspace
from saigakit.core.launch import Nodes
from saigakit.core.workspace import Gpu
from saigakit.data import report, sources
from saigakit.errors import SaigaError
from saigakit.prompt import template
from saigakit.registry import Lora
from saigakit.train.checkpoints import Store
from saigakit.weights import find, fold, load, memory, tensors
from saigakit.weights.load import NumberFormat
from saigakit.weights.memory import Pack, TrainingStep
from saigakit.weights.merge import Merged
from saigakit.weights.model_shape import ModelShape

JOB_FILE = "job.json"  # a Job, written for the child
RESULT_FILE = "result.json"  # written by the child: how the run ended, for the manifest
_ADAPTERS_ON_DISK = 12  # adapter, best adapter, and two checkpoints, each with AdamW's two moments, or their copies
_TRAINABLE_WHOLE = ("embed_tokens", "lm_head")  # allowed in modules_to_save


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training with all of its inputs resolved on this machine; child processes read it from a file."""

    config: TrainConfig
    train_file: Path
    eval_file: Path | None
    replay_files: tuple[Path, ...]
    base_dir: Path
    tokenizer_dir: Path
    adapter_dir: Path | None  # the adapter to start from
    chat_template: str | None = None  # that 01_format was given
    lora: Lora  # the adapter to train: the continued one's own settings, or new ones
    shape: ModelShape
    number_format: NumberFormat
    processes: int = 1  # on this machine
    started: float = field(default_factory=workspace.session_start)  # max_hours count from here
    store: Store | None = None  # set once the inputs are hashed

    @classmethod
    def of(cls, config: TrainConfig, number_format: NumberFormat, processes: int = 1) -> Self:
        """Find or download every input. Raises SaigaError if one is missing or does not fit `config`."""
        run_dir = Path(config.output_dir).parent
        train_file = workspace.find_input(config.train_file, run_dir=run_dir)
        eval_file = workspace.find_input(config.eval_file, run_dir=run_dir) if config.eval_file else None
        config = _with_formatted_length(config, train_file.parent)
        base_dir = find.base_dir(config.spec, config.base_source)
        adapter_dir = None if config.start_adapter is None else find.adapter_dir(config.spec, config.start_adapter)
        return cls(
            config=config,
            train_file=train_file,
            eval_file=eval_file,
            replay_files=tuple(sources.records_files(config.replay_file, run_dir) if config.replay_file else ()),
            base_dir=base_dir,
            tokenizer_dir=find.tokenizer_dir(config.spec, config.base_source),
            adapter_dir=adapter_dir,
            chat_template=template.formatted_template(train_file.parent),
            lora=check_model(config, base_dir, adapter_dir),
            shape=ModelShape.from_config(base_dir),
            number_format=number_format,
            processes=processes,
        )

    def write(self, directory: Path) -> Path:
        file = directory / JOB_FILE
        file.write_text(json.dumps(asdict(self), ensure_ascii=False, default=str), encoding="utf-8")
        return file

    @classmethod
    def read(cls, file: Path) -> Self:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        paths = ("train_file", "eval_file", "base_dir", "tokenizer_dir", "adapter_dir")
        resolved = {name: Path(content[name]) for name in paths if content[name] is not None} | {
            "config": TrainConfig.from_json(content["config"], str(file)),
            "replay_files": tuple(map(Path, content["replay_files"])),
            "lora": Lora.from_json(content["lora"]),
            "shape": ModelShape(**content["shape"]),
            "store": Store(Path(content["store"]["directory"]), content["store"]["identity"]),
        }
        return cls(**content | resolved)

    def memory_needed(self, *, processes: int, pack: Pack | None = None) -> dict[str, int]:
        """Estimate the bytes of one of `processes`, by purpose; without `pack` for one document of maximum length."""
        on_gpu = self.number_format != "float32"
        itemsize = 2 if on_gpu else 4
        parts = TrainingStep(
            shape=self.shape,
            lora=self.lora,
            pack=pack or Pack.one_document(self.config.sequence_budget),
            quantization=self.config.weights_as,
            itemsize=itemsize,
            checkpointing=on_gpu,
        ).memory()
        if not self.config.is_sharded:
            return parts
        return memory_when_sharded(parts, processes, self.shape.layers, itemsize * self.shape.embedding_parameters)


def resolve(config: TrainConfig, nodes: Nodes | None) -> Job:
    """Find every input of a training and check machine, model, memory and disk."""
    gpus = workspace.gpus()
    number_format = check_machine(config, gpus)
    gpus = gpus[: config.processes]
    load.require_accelerator(config.spec, config.base_source, gpus)
    machines = 1 if nodes is None else nodes.count
    check_sharding(config, gpus, machines)
    job = Job.of(config, number_format, config.processes or len(gpus) or 1)
    needed = job.memory_needed(processes=job.processes * machines)
    check_memory(needed, gpus, job.processes, pack="a conversation of max_seq_length tokens")
    check_sharded_loading(config, job.shape, job.processes)
    check_disk(Path(config.output_dir), job.shape, job.lora)
    return job


def _with_formatted_length(config: TrainConfig, directory: Path) -> TrainConfig:
    """Take max_seq_length from 01_format if it made the records. Raises SaigaError if they are for another model."""
    if not (directory / manifest.NAME).is_file():
        return config
    formatted = manifest.require_stage(directory, report.STAGE, model=config.model)
    return replace(config, max_seq_length=config.max_seq_length or formatted["parameters"]["max_seq_length"])


def memory_when_sharded(parts: dict[str, int], processes: int, layers: int, embeddings: int) -> dict[str, int]:
    """`parts` with a share of the weights, two gathered layers, and `embeddings` and head, which are one FSDP unit."""
    weights = parts["weights"]
    return {**parts, "weights": weights // processes + 2 * (weights - embeddings) // layers + embeddings}


def check_machine(config: TrainConfig, gpus: Sequence[Gpu]) -> NumberFormat:
    """Check GPUs and packages before anything is downloaded, and return the number format for training."""
    install.require_no_old_torchao()
    if gpus and (config.processes or 1) > len(gpus):
        available = "1 GPU is" if len(gpus) == 1 else f"{len(gpus)} GPUs are"
        raise SaigaError(
            f"processes={config.processes}, but only {available} available, and each process needs its own. Use "
            f"processes={len(gpus)}, or None for one per GPU."
        )
    return load.number_format(config.spec, gpus[: config.processes])


def check_sharding(config: TrainConfig, gpus: Sequence[Gpu], machines: int) -> None:
    if not config.is_sharded:
        return
    processes = config.processes or max(1, len(gpus))
    if min(processes, len(gpus)) * machines < 2:
        raise SaigaError(
            f"sharding='fsdp' splits the base over at least two GPUs (GPUs: {len(gpus)}, processes: {processes}). "
            "Leave sharding out."
        )
    if config.weights_as == "int8":
        raise SaigaError("sharding='fsdp' cannot split int8 weights. Use quantization='nf4' or 'none'.")


def check_sharded_lora(config: TrainConfig, lora: Lora) -> None:
    if config.is_sharded and (lora.modules_to_save or lora.dora):
        raise SaigaError(
            "sharding='fsdp' does not work with DoRA and modules_to_save, which need complete matrices of the base on "
            "each GPU. Leave them out of lora, or use another adapter."
        )


def check_sharded_loading(config: TrainConfig, shape: ModelShape, processes: int) -> None:
    """Check the RAM: with FSDP each process of this machine first loads the complete base into it."""
    if config.is_sharded:
        base = memory.weight_bytes(shape, config.weights_as, itemsize=2)
        remedy = "Use fewer processes on this machine, quantization='nf4' or a smaller model."
        workspace.require_memory(base * processes, f"Loading the base in each of {processes} processes", remedy)


def check_visible_gpus(visible_gpus: int, processes: int, number_format: NumberFormat) -> None:
    """Check in a child that torch sees the GPUs that nvidia-smi lists, and only one of them in a single process."""
    if not visible_gpus and number_format != "float32":
        raise SaigaError(
            "torch sees no GPU, although nvidia-smi lists one. Install a CUDA build of torch, or set "
            "CUDA_VISIBLE_DEVICES to nothing to train on the CPU."
        )
    if processes == 1 and visible_gpus > 1:
        raise SaigaError(
            f"One process sees {visible_gpus} GPUs, which would double the loss of a quantised model. Set "
            "CUDA_VISIBLE_DEVICES=0 before torch is imported, or call train_adapter, which sets it."
        )


def check_model(config: TrainConfig, base_dir: Path, adapter_dir: Path | None) -> Lora:
    """Check base, adapter and `lora`, and return the settings of the adapter that will be trained."""
    stored = tensors.open_base(base_dir).stored
    if any("language_model." in name for name in stored):
        raise SaigaError(
            f"{base_dir} is a vision-language model, and a GGUF holds only its text model. Use a checkpoint of the "
            "text model alone, whose layers begin with 'model.layers'."
        )
    lora = config.new_lora if adapter_dir is None else _lora_with_adapter(config, base_dir, adapter_dir)
    _check_modules(lora, stored, base_dir)
    check_sharded_lora(config, lora)
    downloaded = registry.with_context(replace(config.spec, base_model=str(base_dir)))
    sequence_budget(downloaded, config.sequence_budget)  # raises SaigaError over its context length
    return lora


def _lora_with_adapter(config: TrainConfig, base_dir: Path, adapter_dir: Path) -> Lora:
    """The settings of the continued adapter, or of the new LoRA next to a folded one."""
    Merged.open(base_dir, adapter_dir)  # an adapter that cannot be merged is not trained
    released = load.lora_of(adapter_dir)
    if config.is_folded:
        fold.require_foldable(base_dir, adapter_dir)
        if config.new_lora.dora or config.new_lora.modules_to_save:
            raise SaigaError(
                f"adapter={config.adapter!r} combines two adapters into one plain LoRA, so lora cannot have dora or "
                "modules_to_save. Leave them out, or use adapter='released' to continue the released adapter, or None "
                "for a new LoRA alone."
            )
        return config.new_lora
    if config.lora is not None and _sorted(config.lora) != _sorted(released):
        raise SaigaError(
            f"lora has no effect with adapter={config.adapter!r}: {adapter_dir} keeps its own settings (rank "
            f"{released.rank}, alpha {released.alpha}, {', '.join(released.target_modules)}). Leave lora out, or use "
            "adapter=None (in YAML null) for a new LoRA."
        )
    return released


def _sorted(lora: Lora) -> Lora:
    return replace(lora, target_modules=tuple(sorted(lora.target_modules)))


def _check_modules(lora: Lora, stored: Iterable[str], base_dir: Path) -> None:
    names = [name.removesuffix(".weight") for name in stored if name.endswith(".weight")]
    linear = {name.rpartition(".")[2] for name in names if ".layers." in name and "norm" not in name}
    if unknown := sorted(set(lora.target_modules) - linear):
        raise SaigaError(
            f"lora.target_modules: {base_dir} has no linear layers {', '.join(unknown)}; it has "
            f"{', '.join(sorted(linear))}."
        )
    if unknown := sorted(set(lora.modules_to_save) - set(_TRAINABLE_WHOLE)):
        allowed = " and ".join(map(repr, _TRAINABLE_WHOLE))
        raise SaigaError(f"lora.modules_to_save cannot include {', '.join(unknown)}, only {allowed}.")
    if lora.modules_to_save and ModelShape.from_config(base_dir).tied:
        raise SaigaError(
            f"lora.modules_to_save={lora.modules_to_save}: the embeddings and the head of {base_dir} are tied, so "
            "neither can be trained alone. Leave modules_to_save out."
        )


def check_disk(directory: Path, shape: ModelShape, lora: Lora) -> None:
    adapter = 4 * shape.adapter_parameters(lora)  # float32
    other_files = 10 * 10**6  # log, curve and configs
    workspace.require_disk(directory, _ADAPTERS_ON_DISK * adapter + other_files, "The adapter with its checkpoints")


def check_memory(parts: dict[str, int], gpus: Sequence[Gpu], processes: int, *, pack: str) -> None:
    """Print the memory estimate for `pack` and raise SaigaError if it exceeds what is free."""
    remedy = "Use a smaller max_seq_length, quantization='nf4' or a smaller model."
    total, words = sum(parts.values()), memory.format_parts(parts)
    print(f"Estimated memory per process for {pack}: {total / 1e9:.1f} GB ({words}).", flush=True)
    for gpu in gpus:
        workspace.require_memory(total, f"Training ({words})", remedy, gpu)
    if not gpus:
        workspace.require_memory(total * processes, f"Training ({words})", remedy)
