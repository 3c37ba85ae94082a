"""A frozen base over several GPUs (FSDP) and a LoRA that is whole on each: for models that no single GPU holds.

Each process holds a part of every layer and gathers the layer when it computes it, so that all of them must make the
same number of forward and backward passes. Gradients of the LoRA are averaged here, once a step.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import Trainer, TrainingArguments

_LORA = r".*\.lora_(A|B|dropout)(\..*)?"  # modules by name


def options(layer_class: str) -> dict[str, Any]:
    """TrainingArguments of transformers, for FSDP2; `layer_class`: of a decoder layer, which is gathered as a whole."""
    return {
        "fsdp": "full_shard auto_wrap",
        "fsdp_config": {
            "version": 2,
            "reshard_after_forward": True,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": [layer_class],
            "cpu_ram_efficient_loading": False,  # accelerate cannot with 4-bit weights
            "state_dict_type": "FULL_STATE_DICT",
        },
    }


def complete(arguments: "TrainingArguments") -> None:
    """What accelerate's plugin takes and transformers does not pass on: the LoRA stays whole, and nothing is cast.

    Casting would read 4-bit weights, which are stored as floats, for numbers; autocast does what is needed.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin: dict[str, Any] = arguments.fsdp_plugin_args
    plugin |= {"ignored_modules": _LORA, "mixed_precision_policy": MixedPrecisionPolicy()}


def storage(dtype: "torch.dtype") -> "dict[str, torch.dtype]":
    """Options of BitsAndBytesConfig: 4-bit weights kept as floats of the model's type, the only ones FSDP shards."""
    return {"bnb_4bit_quant_storage": dtype}


def layer_class(model: "torch.nn.Module") -> str:
    """transformers names the class of a decoder layer."""
    names: Iterable[str] = getattr(model, "_no_split_modules", None) or ()
    return min(names)


def call_when_ready(trainer: "Trainer", act: Callable[[], None]) -> None:
    """Before the first step, when the model is in parts on the GPUs."""
    from transformers import TrainerCallback

    class Ready(TrainerCallback):
        def on_train_begin(self, *_: object, **__: object) -> None:
            act()

    trainer.add_callback(Ready())


def average_gradients(model: "torch.nn.Module") -> None:
    """Over all processes: to be called once, after the last backward pass of a step."""
    import torch

    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    together = torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])
    torch.distributed.all_reduce(together)
    together /= torch.distributed.get_world_size()
    for gradient, mean in zip(gradients, together.split([g.numel() for g in gradients if g is not None]), strict=True):
        assert gradient is not None
        gradient.copy_(mean.view_as(gradient))


def memory(parts: dict[str, int], processes: int, layers: int, embeddings: int) -> dict[str, int]:
    """What memory.training gave, for one of so many processes, in bytes.

    Its part of the weights, and what it gathers: two layers, and the `embeddings` with the head, which accelerate puts
    into one unit with what is left over.
    """
    whole = parts["weights"]
    return {**parts, "weights": whole // processes + 2 * (whole - embeddings) // layers + embeddings}
