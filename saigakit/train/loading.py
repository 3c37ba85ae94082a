"""A training config into the model that learns, where its memory is enough, and a trial of it on its largest pack."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

from saigakit.config import TrainConfig
from saigakit.core import workspace
from saigakit.prompt.encoding import Example
from saigakit.registry import Lora
from saigakit.train import attention, head, packing, preflight, sharding, trial
from saigakit.train.steps import Plan
from saigakit.train.training_log import Log
from saigakit.weights import find, fold, load, memory
from saigakit.weights.load import NumberFormat
from saigakit.weights.memory import Pack, Shape

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, Trainer


def memory_needed(
    config: TrainConfig,
    shape: Shape,
    lora: Lora,
    number_format: NumberFormat,
    *,
    processes: int,
    pack: Pack | None = None,
) -> dict[str, int]:
    """Bytes of one process by what they are for; without `pack` for one document of the whole budget."""
    on_gpu = number_format != "float32"
    itemsize = 2 if on_gpu else 4
    parts = memory.training(
        shape,
        quantization=config.weights_as,
        lora=lora,
        pack_tokens=config.sequence_budget,
        itemsize=itemsize,
        checkpointing=on_gpu,
        pack=pack,
    )
    return (
        sharding.memory(parts, processes, shape.layers, itemsize * shape.embedding_parameters)
        if config.is_sharded
        else parts
    )


def adapter_dir(config: TrainConfig) -> Path:
    assert config.start_adapter is not None
    return find.adapter_dir(config.spec, config.start_adapter)


@dataclass
class Loaded:
    """The model with its adapter, the largest pack that it will see, and the memory that this was foreseen to take."""

    model: "PeftModel"
    pack: list[Example]
    foreseen: dict[str, int]

    @classmethod
    def of(cls, config: TrainConfig, plan: Plan, device: str, log: Log) -> Self:
        """Raises SaigaError where the memory is too small, before anything is loaded."""
        import torch

        gpus = workspace.gpus() if device != "cpu" else []
        number_format = preflight.machine(config, gpus)
        base_dir = find.base_dir(config.spec, config.base_source)
        lora = preflight.model(config, base_dir, None if config.start_adapter is None else adapter_dir(config))
        shape = Shape.of(base_dir)
        needed = partial(memory_needed, config, shape, lora, number_format, processes=plan.processes)
        pack, foreseen = _largest(plan, lambda pack: needed(pack=pack))
        if not log.quiet:
            preflight.fits(foreseen, gpus, plan.processes, pack="the largest pack")
        log.say(f"Loading {config.spec.base_model} …")
        base = _base(config, base_dir, getattr(torch, number_format), "cpu" if config.is_sharded else device)
        model = load.with_adapter(base, adapter_dir(config) if _is_continued(config) else None, lora)
        name = config.spec.base_model  # of a directory its name alone, not a path of this machine
        model.peft_config["default"].base_model_name_or_path = Path(name).name if Path(name).is_dir() else name
        if memory.head_in_chunks(shape, lora) and not head.use(model):
            log.say("The logits of this model are scaled or capped, so they are not made in chunks.")
        load.require_formats(model, getattr(torch, number_format))
        return cls(model, pack, foreseen)

    def try_out(self, made: "Trainer", log: Log) -> None:
        """Three steps on the largest pack: memory runs out now or never."""
        found = trial.run(
            self.model,
            packing.collate(self.pack),
            predicted=self.foreseen,
            autocast=made.accelerator.autocast,
            scaler=made.accelerator.scaler,
        )
        tokens = sum(len(row["input_ids"]) for row in self.pack)
        peak = ""
        if found.peak_bytes is not None:
            peak = f", {found.peak_bytes / 1e9:.1f} GB at the peak, {sum(self.foreseen.values()) / 1e9:.1f} GB foreseen"
            if not log.file.is_file():  # a run that goes on has it in its log
                log.write(memory_predicted=sum(self.foreseen.values()), memory_peak=found.peak_bytes)
        log.say(f"Trial on the largest pack, {tokens} tokens: {1 / found.seconds_per_token:.0f} tokens/s{peak}.")


def _is_continued(config: TrainConfig) -> bool:
    return config.start_adapter is not None and not config.is_folded


def _largest(plan: Plan, needed: Callable[[Pack], dict[str, int]]) -> tuple[list[Example], dict[str, int]]:
    """The pack of the run that needs the most memory, by the bytes that it needs."""
    packs = [pack for step in range(len(plan)) for packs in plan.layout(step) for pack in packs]
    lengths, learned = plan.rows.lengths, plan.rows.learned

    def tokens(pack: Sequence[int]) -> int:
        return sum(lengths[row] for row in pack)

    def squares(pack: Sequence[int]) -> int:  # what attention keeps on a CPU
        return sum(lengths[row] ** 2 for row in pack)

    def answers(pack: Sequence[int]) -> int:  # what the logits take
        return sum(learned[row] for row in pack)

    candidates = [max(packs, key=tokens), max(packs, key=squares), max(packs, key=answers)]
    shapes = [Pack(documents=tuple(lengths[row] for row in pack), learned=answers(pack)) for pack in candidates]
    bytes_of = [needed(shape) for shape in shapes]
    largest = max(range(len(candidates)), key=lambda index: sum(bytes_of[index].values()))
    return [plan.rows[row] for row in candidates[largest]], bytes_of[largest]


def _base(config: TrainConfig, base_dir: Path, dtype: "torch.dtype", device: str) -> "PreTrainedModel":
    import torch

    nf4 = sharding.storage(dtype) if config.is_sharded else {}
    base = load.base_model(base_dir, config.weights_as, dtype, device, **nf4)
    if config.is_folded:
        fold.into(base, base_dir, adapter_dir(config))
    base.config.use_cache = False
    attention.use(base)
    head.sum_exactly(base)
    if dtype != torch.float32:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
        for parameter in base.parameters():
            if parameter.ndim == 1:  # norms, a few MB: their statistics overflow float16
                parameter.data = parameter.data.float()
    return base
