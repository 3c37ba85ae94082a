"""Three steps on the largest pack before training: what they cost, and nothing of them stays in the model."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from saigakit.errors import SaigaError
from saigakit.weights import load, memory

if TYPE_CHECKING:
    import torch

_STEPS = 3  # the first one warms up, the better of the others counts
_MOMENTS = 2  # of AdamW: numbers per trained parameter, made in the first real step


@dataclass(frozen=True, kw_only=True)
class Trial:
    """`peak_bytes`: the most that torch had given out on the GPU; None on a CPU, where nobody counts."""

    seconds_per_token: float
    peak_bytes: int | None


def run(
    model: "torch.nn.Module",
    pack: "Mapping[str, torch.Tensor]",
    *,
    predicted: Mapping[str, int],
    autocast: Callable[[], AbstractContextManager[object]],
    scaler: "torch.amp.GradScaler | None" = None,
) -> Trial:
    """Forward and backward passes on `pack`, a batch of packing.collate, as training makes them.

    Afterwards weights, gradients, random numbers and the mode are as before, so that training is bit for bit the
    same. `predicted` is what memory.training gave. Raises SaigaError where memory runs out, and ValueError where the
    model already has gradients.
    """
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if any(parameter.grad is not None for parameter in trained):
        raise ValueError("the model has gradients, which a trial would drop")
    device = trained[0].device
    batch = {name: value.to(device) for name, value in pack.items()}
    tokens = batch["input_ids"].numel()
    with _untouched(model, device), _memory_is_enough(tokens, predicted, device):
        moments = [torch.zeros(_MOMENTS, *parameter.shape, device=device) for parameter in trained]
        seconds = [_step(model, batch, autocast, scaler) for _ in range(_STEPS)]
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        del moments
    return Trial(seconds_per_token=min(seconds[1:]) / tokens, peak_bytes=peak)


def _step(
    model: "torch.nn.Module",
    batch: "Mapping[str, torch.Tensor]",
    autocast: Callable[[], AbstractContextManager[object]],
    scaler: "torch.amp.GradScaler | None",
) -> float:
    """Seconds of one. Gradients stay for the next one to add to, as they do when steps are accumulated."""
    import torch

    start = time.perf_counter()
    with load.fast_products():
        with autocast():
            loss: torch.Tensor = model(**batch, use_cache=False).loss
        (loss if scaler is None else scaler.scale(loss)).backward()
    if loss.device.type == "cuda":
        torch.cuda.synchronize(loss.device)
    return time.perf_counter() - start


@contextmanager
def _untouched(model: "torch.nn.Module", device: "torch.device") -> Iterator[None]:
    """In training mode; then the mode, random numbers and the absence of gradients are as before."""
    import torch

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
def _memory_is_enough(tokens: int, predicted: Mapping[str, int], device: "torch.device") -> Iterator[None]:
    import torch

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
            f"{sum(predicted.values()) / 1e9:.1f} GB ({memory.in_words(predicted)}). Use a smaller max_seq_length than "
            f"{tokens}. ({reason})"
        ) from None
