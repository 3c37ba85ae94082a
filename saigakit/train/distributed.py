"""Agree among the processes of a run, and shard a model over them with FSDP."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import TrainerCallback, TrainingArguments

from saigakit.errors import SaigaError

T = TypeVar("T")


def any_process(here: Sequence[bool], args: TrainingArguments) -> list[bool]:
    """Each answer is true where it is true in some process."""
    if args.world_size == 1:
        return list(here)
    flags = torch.tensor([float(flag) for flag in here], device=args.device)
    torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]


def mean_of_processes(here: float, args: TrainingArguments) -> float:
    if args.world_size == 1:
        return here
    total = torch.tensor(here, dtype=torch.float64, device=args.device)
    torch.distributed.all_reduce(total)
    return float(total.item() / args.world_size)


def gather(here: T, args: TrainingArguments) -> list[T]:
    """What each process has, in their order; the same list in all."""
    if args.world_size == 1:
        return [here]
    there: list[T] = [here] * args.world_size
    torch.distributed.all_gather_object(there, here)
    return there


def by_first(act: Callable[[], object], args: TrainingArguments) -> None:
    """The first process acts and the others wait. Its SaigaError is raised in all, and its other errors end it."""
    problem: list[str | None] = [None]
    if args.process_index == 0:
        try:
            act()
        except SaigaError as error:
            problem = [str(error)]
    if args.world_size > 1:
        torch.distributed.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise SaigaError(problem[0])


def leave_together() -> None:
    """At the very end: one that is gone first breaks the connections of the others, and gloo aborts them."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


_LORA = r".*\.lora_(A|B|dropout)(\..*)?"  # modules by name


def fsdp_options(layer_class_name: str) -> dict[str, Any]:
    """TrainingArguments of transformers, for FSDP2; `layer_class`: of a decoder layer, which is gathered as a whole."""
    return {
        "fsdp": "full_shard auto_wrap",
        "fsdp_config": {
            "version": 2,
            "reshard_after_forward": True,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": [layer_class_name],
            "cpu_ram_efficient_loading": False,  # accelerate cannot with 4-bit weights
            "state_dict_type": "FULL_STATE_DICT",
        },
    }


def complete_fsdp_options(arguments: TrainingArguments) -> None:
    """What accelerate's plugin takes and transformers does not pass on: the LoRA stays whole, and nothing is cast.

    Casting would read 4-bit weights, which are stored as floats, for numbers; autocast does what is needed.
    """
    plugin: dict[str, Any] = arguments.fsdp_plugin_args
    plugin |= {"ignored_modules": _LORA, "mixed_precision_policy": MixedPrecisionPolicy()}


def fsdp_storage(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Options of BitsAndBytesConfig: 4-bit weights kept as floats of the model's type, the only ones FSDP shards."""
    return {"bnb_4bit_quant_storage": dtype}


def layer_class_name(model: torch.nn.Module) -> str:
    """transformers names the class of a decoder layer."""
    names: Iterable[str] = getattr(model, "_no_split_modules", None) or ()
    return min(names)


class WhenReady(TrainerCallback):
    """Acts before the first step, when the model is in parts on the GPUs."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def on_train_begin(self, *_: object, **__: object) -> None:
        self.act()


def average_gradients(model: torch.nn.Module) -> None:
    """Over all processes: to be called once, after the last backward pass of a step."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    together = torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])
    torch.distributed.all_reduce(together)
    together /= torch.distributed.get_world_size()
    for gradient, mean in zip(gradients, together.split([g.numel() for g in gradients if g is not None]), strict=True):
        assert gradient is not None
        gradient.copy_(mean.view_as(gradient))
