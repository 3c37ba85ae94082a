"""A base model and an adapter into a model in memory: number format by hardware, quantised, LoRA attached."""

import json
import logging
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from saigakit.core import workspace
from saigakit.core.workspace import Gpu
from saigakit.errors import SaigaError
from saigakit.registry import Lora, ModelSpec, Quantization
from saigakit.weights.memory import Shape

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

NumberFormat = Literal["float16", "bfloat16", "float32"]
_WORTHWHILE = 1.2  # times the speed, below which float32 stays exact
_FIRST_BF16 = (8, 0)  # below it torch emulates bfloat16, and says that it is supported


def number_format(spec: ModelSpec, gpus: Sequence[Gpu]) -> NumberFormat:
    """float16 on a T4 (sm_75), bfloat16 from sm_80 on, float32 on a CPU.

    Raises SaigaError for a GPU that the image's torch has no kernels for, and for a model that overflows float16.
    """
    if not gpus:
        return "float32"
    oldest = min(gpus, key=lambda gpu: gpu.capability)
    name = f"{oldest.name} (sm_{oldest.capability[0]}{oldest.capability[1]})"
    if oldest.capability < (7, 5):
        raise SaigaError(
            f"{name} is too old: torch has no kernels for it. On Kaggle choose the accelerator GPU T4 x2; "
            "elsewhere set CUDA_VISIBLE_DEVICES to nothing to use the CPU."
        )
    if oldest.capability >= _FIRST_BF16:
        return "bfloat16"
    if not spec.float16_safe:
        raise SaigaError(
            f"{spec.name} cannot be trained on {name}: it computes in float16 only, and the activations of this model "
            "overflow float16 (NaN). Use a GPU of sm_80 or later, or another model, for example saiga_nemo_12b."
        )
    return "float16"


def base_model(
    base_dir: Path, quantization: Quantization, dtype: "torch.dtype", device: "torch.device | str", **nf4: object
) -> "PreTrainedModel":
    """`nf4`: further options of BitsAndBytesConfig. Raises SaigaError for damaged files and unknown architectures."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = {
        "none": None,
        "int8": BitsAndBytesConfig(load_in_8bit=True),
        "nf4": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            **nf4,
        ),
    }
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            base_dir, dtype=dtype, device_map={"": device}, quantization_config=settings[quantization]
        )
    except (SafetensorError, OSError, ValueError) as error:
        raise SaigaError(f"The base model in {base_dir} cannot be loaded: {error}. Fetch or attach it again.") from None
    for module in model.modules():
        # On a CPU with AVX512-BF16 one forward in eval mode repacks the weights for good, without autograd.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  # not declared by torch's Module
    return model


def with_adapter(model: "PreTrainedModel", adapter_dir: Path | None, lora: Lora) -> "PeftModel":
    """The adapter continued, as its own config says, or a new one where there is none; all that trains is float32.

    Raises SaigaError for the adapter of another base.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    _without_tensor_parallel()
    if adapter_dir is None:
        settings = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=list(lora.target_modules),
            modules_to_save=list(lora.modules_to_save) or None,
            use_rslora=lora.rslora,
            use_dora=lora.dora,
            task_type="CAUSAL_LM",
        )
        return _trained_in_float32(get_peft_model(model, settings))
    try:
        adapted = PeftModel.from_pretrained(model, str(adapter_dir), is_trainable=True)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise SaigaError(_other_base(adapter_dir, str(model.config.name_or_path), reason)) from None
    _require_all_used(adapted, adapter_dir)
    return _trained_in_float32(adapted)


def _without_tensor_parallel() -> None:
    """peft 0.19, to load an adapter where processes are distributed, imports a class that transformers 5.0 lacks."""
    from peft.utils import save_and_load
    from transformers.integrations import tensor_parallel

    if not hasattr(tensor_parallel, "EmbeddingParallel"):
        save_and_load._maybe_shard_state_dict_for_tp = lambda *_: None


def _trained_in_float32(adapted: "PeftModel") -> "PeftModel":
    """peft leaves whole trained modules in the base's format, where small updates are lost."""
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def require_formats(model: "torch.nn.Module", dtype: "torch.dtype") -> None:
    """To be called when a model is ready to train on one GPU or the CPU.

    Raises TypeError where what trains is not float32 (a GradScaler cannot unscale anything else), and where a frozen
    weight is in another float format than `dtype` or float32 (bfloat16 on a T4 is emulated, and slow).
    """
    import torch

    for name, parameter in model.named_parameters():
        allowed = {torch.float32} if parameter.requires_grad else {torch.float32, dtype}
        if parameter.is_floating_point() and parameter.dtype not in allowed:
            wanted = " or ".join(sorted(str(item) for item in allowed))
            raise TypeError(f"{name} is {parameter.dtype} and must be {wanted}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TypeError("no parameter of the model is trainable")


def _require_all_used(adapted: "PeftModel", adapter_dir: Path) -> None:
    """peft ignores matrices of layers that the base does not have."""
    from peft import get_peft_model_state_dict

    there = set(adapter_shapes(adapter_dir))
    taken = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))  # True asks the Hub for the base
    if there != taken:
        reason = f"{min(there ^ taken)} does not fit"
        raise SaigaError(_other_base(adapter_dir, str(adapted.config.name_or_path), reason))


def require_fitting(adapter_dir: Path, base_dir: Path) -> None:
    """Raises SaigaError for the adapter of another base, by the shapes in its header: before anything is loaded."""
    shape = Shape.of(base_dir)
    for name, size in adapter_shapes(adapter_dir).items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")) and size != (shape.vocabulary, shape.hidden):
            raise SaigaError(_other_base(adapter_dir, str(base_dir), f"{name} {tuple(size)} does not fit"))
        found = re.search(r"\.layers\.(\d+)\.\w+\.(\w+)\.lora_([AB])\.", name)
        if found is None:  # of the head, or DoRA's magnitudes: looked at when the model is loaded
            continue
        out, into = shape.linear.get(found[2], (0, 0))
        fits = size[1] == into if found[3] == "A" else size[0] == out
        if not fits or int(found[1]) >= shape.layers:
            raise SaigaError(_other_base(adapter_dir, str(base_dir), f"{name} {tuple(size)} does not fit"))


def _other_base(adapter_dir: Path, base: str, reason: str) -> str:
    trained_on = json.loads((adapter_dir / "adapter_config.json").read_text(encoding="utf-8"))
    return (
        f"The adapter in {adapter_dir} is not one of this base model ({base}): {reason}. "
        f"It was trained on {trained_on.get('base_model_name_or_path')}. "
        "Give the adapter that belongs to `model`, or adapter=None for a new LoRA."
    )


def adapter_shapes(adapter_dir: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the adapter's matrices. Raises SaigaError where its file is missing or damaged."""
    import torch
    from safetensors import SafetensorError, safe_open

    file = adapter_dir / "adapter_model.safetensors"
    try:
        if file.is_file():
            with safe_open(file, "pt") as opened:
                return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        file = adapter_dir / "adapter_model.bin"
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return {name: tuple(tensor.shape) for name, tensor in state.items()}
    except (SafetensorError, OSError, RuntimeError, EOFError) as error:
        raise SaigaError(f"{file} is missing or damaged ({error}); fetch the adapter again.") from None


def lora_of(adapter_dir: Path) -> Lora:
    """What an adapter on disk is, in the terms of a new one: a continued one stays so.

    Raises SaigaError where its files are missing or damaged.
    """
    file = adapter_dir / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        rank, alpha = config["r"], config["lora_alpha"]
    except (OSError, ValueError, KeyError) as error:
        raise SaigaError(f"{file} is missing or damaged ({error!r}); fetch the adapter again.") from None
    # Not from the config: it may hold a pattern.
    found = {match[1] for name in adapter_shapes(adapter_dir) if (match := re.search(r"\.(\w+)\.lora_A\.", name))}
    return Lora(
        rank=rank,
        alpha=alpha,
        dropout=config.get("lora_dropout", 0.0),
        target_modules=tuple(sorted(found)),
        modules_to_save=tuple(config.get("modules_to_save") or ()),
        rslora=config.get("use_rslora", False),
        dora=config.get("use_dora", False),
    )


def quiet() -> None:
    """In a child: without what libraries say of themselves that no user can act on."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it asks for a kernel package that is not needed
    import transformers

    warnings.simplefilter("ignore", FutureWarning)  # of peft's calls into transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@contextmanager
def fast_products() -> Iterator[None]:
    """Multiply float32 matrices in bf16 on a CPU that is faster at it, and restore the precision afterwards.

    For forward and backward passes only: what must be exact, such as folding an adapter into the base, stays outside.
    """
    import torch

    before = torch.get_float32_matmul_precision()
    if not torch.cuda.is_available() and bf16_is_faster():
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def bf16_is_faster() -> bool:
    """Measured once per process on a CPU that has bf16 instructions, unless SAIGAKIT_CPU_MATMUL decides.

    AMX and AMD's AVX512-BF16 gain about a factor of two; a Xeon that has AVX512-BF16 without AMX loses one.
    """
    asked = workspace.cpu_matmul()
    return asked == "bf16" or (asked is None and workspace.cpu_has_bf16() and _bf16_speedup() > _WORTHWHILE)


@cache
def _bf16_speedup() -> float:
    """Time of a float32 product over the same in bf16, of a batch of tokens by a matrix of a small model."""
    import torch

    before, left, right = torch.get_float32_matmul_precision(), torch.ones(256, 1024), torch.ones(1024, 1024)
    seconds: dict[str, list[float]] = {"highest": [], "medium": []}
    try:
        for precision, taken in [*seconds.items()] * 12:  # taking turns, so that other load meets both
            torch.set_float32_matmul_precision(precision)
            start = time.perf_counter()
            left @ right
            taken.append(time.perf_counter() - start)
    finally:
        torch.set_float32_matmul_precision(before)
    return min(seconds["highest"]) / min(seconds["medium"])
