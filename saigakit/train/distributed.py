"""Coordinate the processes of a run, and shard a model over them with FSDP."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import TrainerCallback, TrainingArguments

from saigakit.errors import SaigaError

_LORA = r".*\.lora_(A|B|dropout)(\..*)?"  # module names


def on_first_process(act: Callable[[], object]) -> None:
    """Let the first process act while the others wait. Its SaigaError is raised in all of them."""
    problem = None
    if PartialState().process_index == 0:
        try:
            act()
        except SaigaError as error:
            problem = str(error)
    if (problem := gather_object([problem])[0]) is not None:
        raise SaigaError(problem)


def shut_down() -> None:
    """Leave the process group together: gloo aborts a process whose peers have closed their connections."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def fsdp_options(layer_class_name: str) -> dict[str, Any]:
    """TrainingArguments for FSDP2, which gathers one decoder layer of this class at a time."""
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
    """Set what transformers does not pass on to accelerate: keep the LoRA unsharded and cast nothing."""
    # 4-bit weights are stored as floats, and casting would convert their bytes as numbers. Autocast is enough.
    plugin: dict[str, Any] = arguments.fsdp_plugin_args
    plugin |= {"ignored_modules": _LORA, "mixed_precision_policy": MixedPrecisionPolicy()}


def fsdp_storage(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """BitsAndBytesConfig options: store 4-bit weights as floats of the model's type, since FSDP shards only those."""
    return {"bnb_4bit_quant_storage": dtype}


class BeforeFirstStep(TrainerCallback):
    """Acts once the model has been sharded over the GPUs."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def on_train_begin(self, *_: object, **__: object) -> None:
        self.act()


def average_gradients(model: torch.nn.Module) -> None:
    """Average over all processes, once per step after its last backward pass."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    together = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(together)
    together /= torch.distributed.get_world_size()
    for gradient, mean in zip(gradients, together.split([each.numel() for each in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
