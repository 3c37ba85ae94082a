"""Load the model to train where its memory fits, and try it on its largest pack."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from peft import PeftModel
from transformers import PreTrainedModel, Trainer

from saigakit.core import workspace
from saigakit.errors import SaigaError
from saigakit.prompt.encoding import Example
from saigakit.train import distributed, layers, preflight, steps
from saigakit.train.job import Job
from saigakit.train.run_state import Log
from saigakit.train.steps import Plan
from saigakit.weights import fold, load, memory
from saigakit.weights.memory import Pack


@dataclass
class Loaded:
    """The model with its adapter, the largest pack that it will see, and the memory that this was foreseen to take."""

    job: Job
    model: PeftModel
    pack: list[Example]
    foreseen: dict[str, int]

    @classmethod
    def of(cls, job: Job, plan: Plan, device: str, log: Log) -> Self:
        """Raises SaigaError where the memory is too small, before anything is loaded."""
        config, dtype = job.config, getattr(torch, job.number_format)
        pack, foreseen = _largest_pack(plan, lambda pack: job.memory_needed(processes=plan.processes, pack=pack))
        if not log.quiet:
            gpus = workspace.gpus() if device != "cpu" else []
            preflight.fits(foreseen, gpus, plan.processes, pack="the largest pack")
        log.say(f"Loading {config.spec.base_model} …")
        base = _load_base(job, dtype, "cpu" if config.is_sharded else device)
        model = load.with_adapter(base, None if config.is_folded else job.adapter_dir, job.lora)
        name = config.spec.base_model  # of a directory its name alone, not a path of this machine
        model.peft_config["default"].base_model_name_or_path = Path(name).name if Path(name).is_dir() else name
        if memory.needs_chunked_head(job.shape, job.lora) and not layers.use_chunked_loss(model):
            log.say("The logits of this model are scaled or capped, so they are not made in chunks.")
        load.require_formats(model, dtype)
        return cls(job, model, pack, foreseen)

    def try_out(self, made: Trainer, log: Log) -> None:
        """Three steps on the largest pack: memory runs out now or never."""
        found = try_steps(
            self.model,
            steps.collate(self.pack),
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


def _largest_pack(plan: Plan, needed: Callable[[Pack], dict[str, int]]) -> tuple[list[Example], dict[str, int]]:
    """The pack of the run that needs the most memory, by the bytes that it needs."""
    packs = [pack for step in range(len(plan)) for packs in plan.layout(step) for pack in packs]
    lengths, learned = plan.lengths, plan.learned

    def tokens(pack: Sequence[int]) -> int:
        return sum(lengths[row] for row in pack)

    def squares(pack: Sequence[int]) -> int:  # what attention keeps on a CPU
        return sum(lengths[row] ** 2 for row in pack)

    def answers(pack: Sequence[int]) -> int:  # what the logits take
        return sum(learned[row] for row in pack)

    candidates = [max(packs, key=tokens), max(packs, key=squares), max(packs, key=answers)]
    shapes = [Pack(documents=tuple(lengths[row] for row in pack), trained=answers(pack)) for pack in candidates]
    bytes_of = [needed(shape) for shape in shapes]
    largest = max(range(len(candidates)), key=lambda index: sum(bytes_of[index].values()))
    return [plan.rows[row] for row in candidates[largest]], bytes_of[largest]


def _load_base(job: Job, dtype: torch.dtype, device: str) -> PreTrainedModel:
    nf4 = distributed.fsdp_storage(dtype) if job.config.is_sharded else {}
    base = load.base_model(job.base_dir, job.config.weights_as, dtype, device, **nf4)
    if job.config.is_folded:
        assert job.adapter_dir is not None
        fold.fold_adapter(base, job.base_dir, job.adapter_dir)
    base.config.use_cache = False
    layers.use_packed_attention(base)
    layers.sum_exactly(base)
    if dtype != torch.float32:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
        for parameter in base.parameters():
            if parameter.ndim == 1:  # norms, a few MB: their statistics overflow float16
                parameter.data = parameter.data.float()
    return base


_STEPS = 3  # the first one warms up, the better of the others counts
_MOMENTS = 2  # of AdamW: numbers per trained parameter, made in the first real step


@dataclass(frozen=True, kw_only=True)
class Trial:
    """`peak_bytes`: the most that torch had given out on the GPU; None on a CPU, where nobody counts."""

    seconds_per_token: float
    peak_bytes: int | None


def try_steps(
    model: torch.nn.Module,
    pack: Mapping[str, torch.Tensor],
    *,
    predicted: Mapping[str, int],
    autocast: Callable[[], AbstractContextManager[object]],
    scaler: torch.amp.GradScaler | None = None,
) -> Trial:
    """Forward and backward passes on `pack`, a batch of steps.collate, as training makes them.

    Afterwards weights, gradients, random numbers and the mode are as before, so that training is bit for bit the
    same. `predicted` is from TrainingStep.memory. Raises SaigaError where memory runs out, ValueError where the model
    already has gradients.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if any(parameter.grad is not None for parameter in trained):
        raise ValueError("the model has gradients, which a trial would drop")
    device = trained[0].device
    batch = {name: value.to(device) for name, value in pack.items()}
    tokens = batch["input_ids"].numel()
    with _untouched(model, device), _memory_is_enough(tokens, predicted, device):
        moments = [torch.zeros(_MOMENTS, *parameter.shape, device=device) for parameter in trained]
        seconds = [_try_step(model, batch, autocast, scaler) for _ in range(_STEPS)]
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        del moments
    return Trial(seconds_per_token=min(seconds[1:]) / tokens, peak_bytes=peak)


def _try_step(
    model: torch.nn.Module,
    batch: Mapping[str, torch.Tensor],
    autocast: Callable[[], AbstractContextManager[object]],
    scaler: torch.amp.GradScaler | None,
) -> float:
    """Seconds of one. Gradients stay for the next one to add to, as they do when steps are accumulated."""
    start = time.perf_counter()
    with load.fast_matmul():
        with autocast():
            loss: torch.Tensor = model(**batch, use_cache=False).loss
        (loss if scaler is None else scaler.scale(loss)).backward()
    if loss.device.type == "cuda":
        torch.cuda.synchronize(loss.device)
    return time.perf_counter() - start


@contextmanager
def _untouched(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """In training mode; then the mode, random numbers and the absence of gradients are as before."""
    on_gpu, was_training = device.type == "cuda", model.training
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        model.train()
        try:
            yield
        finally:
            model.zero_grad(set_to_none=True)
            model.train(was_training)
            if on_gpu:
                torch.cuda.empty_cache()  # training begins with memory in one piece


@contextmanager
def _memory_is_enough(tokens: int, predicted: Mapping[str, int], device: torch.device) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; a CPU's allocator has no class of its own
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        there = ""
        if device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
            held = torch.cuda.max_memory_allocated(device)
            there = f" on {torch.cuda.get_device_name(device)} of {total / 1e9:.1f} GB, {held / 1e9:.1f} GB in use"
        reason = str(error).strip().splitlines()[0][:200]
        raise SaigaError(
            f"Memory ran out in a trial step on the largest pack, {tokens} tokens{there}. Foreseen were "
            f"{sum(predicted.values()) / 1e9:.1f} GB ({memory.format_parts(predicted)}). Use a smaller "
            f"max_seq_length than {tokens}. ({reason})"
        ) from None
