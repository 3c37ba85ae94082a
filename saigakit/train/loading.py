"""Load the model to train and try it on the largest pack."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple, Self

import torch
from peft import PeftModel
from transformers import PreTrainedModel, Trainer

from saigakit.core import workspace
from saigakit.errors import SaigaError
from saigakit.prompt.encoding import Example
from saigakit.train import distributed, layers, preflight, steps
from saigakit.train.preflight import Job
from saigakit.train.run_state import Log
from saigakit.train.steps import Plan
from saigakit.weights import fold, load, memory
from saigakit.weights.memory import Pack

_TRIAL_STEPS = 3  # the first one warms up, the faster of the others counts


class Loaded(NamedTuple):
    """The model with its adapter, the largest pack of the run and the memory estimated for it, by purpose."""

    job: Job
    model: PeftModel
    pack: list[Example]
    estimated: dict[str, int]

    @classmethod
    def of(cls, job: Job, plan: Plan, device: str, log: Log) -> Self:
        """Raises SaigaError before loading if the memory is too small."""
        config, dtype = job.config, getattr(torch, job.number_format)
        pack, estimated = _largest_pack(plan, lambda pack: job.memory_needed(processes=plan.processes, pack=pack))
        if not log.quiet:
            gpus = workspace.gpus() if device != "cpu" else []
            preflight.check_memory(estimated, gpus, plan.processes, pack="the largest pack")
        name = config.spec.base_model
        log.print(f"Loading {name} …")
        base = _load_base(job, dtype, "cpu" if config.is_sharded else device)
        model = load.with_adapter(base, None if config.is_folded else job.adapter_dir, job.lora)
        # For a directory its name only, not a path on this machine.
        model.peft_config["default"].base_model_name_or_path = Path(name).name if Path(name).is_dir() else name
        if memory.needs_chunked_head(job.shape, job.lora) and not layers.use_chunked_loss(model):
            log.print("This model scales or caps its logits, so they cannot be computed in chunks.")
        load.require_formats(model, dtype)
        return cls(job, model, pack, estimated)

    def run_trial(self, trainer: Trainer, log: Log) -> None:
        """Run three steps on the largest pack, so that memory runs out now or never."""
        seconds_per_token, peak_bytes = run_trial_steps(
            self.model,
            steps.collate(self.pack),
            estimated=self.estimated,
            autocast=trainer.accelerator.autocast,
            scaler=trainer.accelerator.scaler,
        )
        tokens, total = sum(len(row["input_ids"]) for row in self.pack), sum(self.estimated.values())
        peak = ""
        if peak_bytes is not None:
            peak = f", peak memory {peak_bytes / 1e9:.1f} GB (estimated {total / 1e9:.1f} GB)"
            if not log.file.is_file():  # a resumed run has it in its log already
                log.write(memory_predicted=total, memory_peak=peak_bytes)
        log.print(f"Trial on the largest pack ({tokens:,} tokens): {1 / seconds_per_token:,.0f} tokens/s{peak}.")


def _largest_pack(plan: Plan, needed: Callable[[Pack], dict[str, int]]) -> tuple[list[Example], dict[str, int]]:
    """Find the pack of the run that needs the most memory, and the bytes that it needs."""

    def parts(rows: Sequence[int]) -> dict[str, int]:
        documents = tuple(plan.lengths[row] for row in rows)
        return needed(Pack(documents=documents, trained=sum(plan.learned[row] for row in rows)))

    packs = [pack for step in range(len(plan)) for packs in plan.layout(step) for pack in packs]
    largest = max(packs, key=lambda rows: sum(parts(rows).values()))
    return [plan.rows[row] for row in largest], parts(largest)


def _load_base(job: Job, dtype: torch.dtype, device: str) -> PreTrainedModel:
    nf4 = distributed.fsdp_storage(dtype) if job.config.is_sharded else {}
    base = load.base_model(job.base_dir, job.config.weights_as, dtype, device, **nf4)
    if job.config.is_folded:
        assert job.adapter_dir is not None
        fold.fold_adapter(base, job.base_dir, job.adapter_dir)
    base.config.use_cache = False
    layers.use_packed_attention(base)
    base.loss_function = layers.exact_loss
    if dtype != torch.float32:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
        for parameter in base.parameters():
            if parameter.ndim == 1:  # norms, a few MB: their statistics overflow float16
                parameter.data = parameter.data.float()
    return base


def run_trial_steps(
    model: torch.nn.Module,
    pack: Mapping[str, torch.Tensor],
    *,
    estimated: Mapping[str, int],
    autocast: Callable[[], AbstractContextManager[object]],
    scaler: torch.amp.GradScaler | None = None,
) -> tuple[float, int | None]:
    """Run forward and backward passes on a collated pack and restore everything, so that training is unchanged.

    Returns the seconds per token and the most bytes that torch allocated on the GPU, which it does not count on a CPU.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if any(parameter.grad is not None for parameter in trained):
        raise ValueError("the model has gradients, which a trial would discard")
    device, was_training, seconds = trained[0].device, model.training, []
    batch = {name: value.to(device) for name, value in pack.items()}
    tokens, gpus = batch["input_ids"].numel(), [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=gpus), _reporting_out_of_memory(tokens, estimated, device):
            for gpu in gpus:
                torch.cuda.reset_peak_memory_stats(gpu)
            model.train()
            # AdamW's, which exist only from the first real step on.
            moments = [torch.zeros(2, *parameter.shape, device=device) for parameter in trained]
            for _ in range(_TRIAL_STEPS):  # gradients accumulate, as they do over the packs of a real step
                start = time.perf_counter()
                with load.fast_matmul():
                    with autocast():
                        loss = model(**batch, use_cache=False).loss
                    (loss if scaler is None else scaler.scale(loss)).backward()
                for gpu in gpus:
                    torch.cuda.synchronize(gpu)
                seconds.append(time.perf_counter() - start)
            del moments
            return min(seconds[1:]) / tokens, torch.cuda.max_memory_allocated(device) if gpus else None
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
        torch.cuda.empty_cache()  # so that training starts with unfragmented memory


@contextmanager
def _reporting_out_of_memory(tokens: int, estimated: Mapping[str, int], device: torch.device) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU allocator has no class of its own
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        where = ""
        if device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
            used = torch.cuda.max_memory_allocated(device)
            where = f" on {torch.cuda.get_device_name(device)} ({used / 1e9:.1f} of {total / 1e9:.1f} GB in use)"
        reason = str(error).strip().splitlines()[0][:200]
        raise SaigaError(
            f"Memory ran out in a trial step on the largest pack, {tokens} tokens{where}. The estimate was "
            f"{sum(estimated.values()) / 1e9:.1f} GB ({memory.format_parts(estimated)}). Use a max_seq_length below "
            f"{tokens}. ({reason})"
        ) from None
