"""Load a base model in the number format of the hardware, quantise it and attach a LoRA adapter."""

import logging
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Literal

from saigakit.core import install, workspace
from saigakit.core.lazy import peft, safetensors, torch, transformers
from saigakit.core.workspace import Gpu
from saigakit.errors import SaigaError
from saigakit.registry import MODELS, Lora, ModelSpec, Quantization
from saigakit.weights import adapter, base_files, find, tensors
from saigakit.weights.model_shape import ModelShape

NumberFormat = Literal["float16", "bfloat16", "float32"]
# Peft's names of the fields of Lora.
_IN_PEFT = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "rslora": "use_rslora", "dora": "use_dora"}
_WORTHWHILE_SPEEDUP = 1.2  # below it float32 products stay exact
_LARGEST_ON_CPU_B = 1.0  # billions of parameters, on Kaggle's 4 cores
_FIRST_BF16 = (8, 0)  # older GPUs emulate bfloat16 although torch reports it as supported


def number_format(spec: ModelSpec, gpus: Sequence[Gpu]) -> NumberFormat:
    """Raises SaigaError for a GPU that torch has no kernels for, and for a model that overflows float16 on it."""
    if not gpus:
        return "float32"
    oldest = min(gpus, key=lambda gpu: gpu.capability)
    name = f"{oldest.name} (sm_{oldest.capability[0]}{oldest.capability[1]})"
    if oldest.capability < (7, 5):
        raise SaigaError(
            f"{name} is too old: torch has no kernels for it. On Kaggle choose the accelerator GPU T4 x2; "
            "elsewhere set CUDA_VISIBLE_DEVICES to an empty string to use the CPU."
        )
    if oldest.capability >= _FIRST_BF16:
        return "bfloat16"
    if not spec.float16_safe:
        raise SaigaError(
            f"{spec.name} cannot run on {name}, which computes only in float16: the activations of this model "
            "overflow float16 (NaN). Use a GPU of sm_80 or later, or another model, for example saiga_nemo_12b."
        )
    return "float16"


def require_accelerator(spec: ModelSpec, base_source: str | None, gpus: Sequence[Gpu]) -> None:
    """Raise SaigaError, before weights are downloaded, if GPUs do not work or Kaggle's CPU would get a large base."""
    if gpus:
        install.require_cuda(gpus)
    elif workspace.on_kaggle():
        size_b = spec.parameters_b
        if spec.name not in MODELS:  # config.json comes with the tokenizer, without weights
            shape = ModelShape.from_config(find.tokenizer_dir(spec, base_source))
            size_b = (shape.linear_parameters + shape.embedding_parameters) / 1e9
        if size_b > _LARGEST_ON_CPU_B:
            raise SaigaError(
                f"{spec.name} has {size_b:.1f} billion parameters, and this session has no GPU. In the notebook's "
                "settings choose the accelerator GPU T4 x2."
            )


def base_model(
    base_dir: Path, quantization: Quantization, dtype: "torch.dtype", device: "torch.device | str", **nf4: object
) -> "transformers.PreTrainedModel":
    """`nf4`: further options of BitsAndBytesConfig. Raises SaigaError for damaged files and unknown architectures."""
    config = {
        "none": None,
        "int8": transformers.BitsAndBytesConfig(load_in_8bit=True),
        "nf4": transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            **nf4,
        ),
    }[quantization]
    base_files.require_safe(base_dir)
    try:
        model: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(
            base_dir, dtype=dtype, device_map={"": device}, quantization_config=config, trust_remote_code=False
        )
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise SaigaError(
            f"The base model in {base_dir} cannot be loaded: {error}. Download or attach it again."
        ) from None
    for module in model.modules():
        # On a CPU with AVX512-BF16 a forward pass in eval mode would repack the weights for good, without autograd.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  # torch's Module does not declare it
    return model


def with_adapter(model: "transformers.PreTrainedModel", adapter_dir: Path | None, lora: Lora) -> "peft.PeftModel":
    """Attach a new LoRA, or continue `adapter_dir` with its own settings. Raises SaigaError if the base is another."""
    _without_tensor_parallel()
    if adapter_dir is None:
        settings = peft.LoraConfig(
            **{theirs: getattr(lora, ours) for ours, theirs in _IN_PEFT.items()},
            target_modules=list(lora.target_modules),
            modules_to_save=list(lora.modules_to_save) or None,
            task_type="CAUSAL_LM",
        )
        return _trained_in_float32(peft.get_peft_model(model, settings))
    adapter.read_config(adapter_dir)  # refuses what could make peft run code
    try:
        adapted = peft.PeftModel.from_pretrained(model, str(adapter_dir), is_trainable=True)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise SaigaError(_other_base(adapter_dir, str(model.config.name_or_path), reason)) from None
    # peft ignores matrices of layers that the base does not have. True would ask the Hub for the base.
    used = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if differing := used ^ set(adapter_shapes(adapter_dir)):
        raise SaigaError(_other_base(adapter_dir, str(model.config.name_or_path), f"{min(differing)} does not fit"))
    return _trained_in_float32(adapted)


def _without_tensor_parallel() -> None:
    """To load an adapter in distributed processes, peft 0.19 imports a class that transformers 5.0 lacks."""
    from peft.utils import save_and_load
    from transformers.integrations import tensor_parallel

    if not hasattr(tensor_parallel, "EmbeddingParallel"):
        save_and_load._maybe_shard_state_dict_for_tp = lambda *_: None


def _trained_in_float32(adapted: "peft.PeftModel") -> "peft.PeftModel":
    """peft keeps fully trained modules in the base's format, where small updates are lost."""
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def require_formats(model: "torch.nn.Module", dtype: "torch.dtype") -> None:
    """Check that trained weights are float32 (for GradScaler) and frozen ones `dtype` or float32 (for a T4)."""
    for name, parameter in model.named_parameters():
        allowed = {torch.float32} if parameter.requires_grad else {torch.float32, dtype}
        if parameter.is_floating_point() and parameter.dtype not in allowed:
            wanted = " or ".join(sorted(str(item) for item in allowed))
            raise TypeError(f"{name} is {parameter.dtype}, but must be {wanted}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TypeError("no parameter of the model is trainable")


def _other_base(adapter_dir: Path, base: str, reason: str) -> str:
    trained_on = adapter.read_config(adapter_dir).get("base_model_name_or_path")
    return (
        f"The adapter in {adapter_dir} belongs to another base model than {base}, or its vocabulary was resized: "
        f"{reason}. It was trained on {trained_on}. Give the adapter that belongs to `model`, merge it first "
        "(saigakit export --format safetensors), or leave adapter out."
    )


def adapter_shapes(adapter_dir: Path) -> dict[str, tuple[int, ...]]:
    """Raises SaigaError if the adapter's file is missing or damaged."""
    return {name: stored.shape for name, stored in tensors.open_adapter(adapter_dir).stored.items()}


def lora_of(adapter_dir: Path) -> Lora:
    """The settings of an adapter on disk. Raises SaigaError if its files are missing or damaged."""
    config = adapter.read_config(adapter_dir)
    if missing := [key for key in ("r", "lora_alpha") if key not in config]:
        raise base_files.damaged(adapter_dir / adapter.CONFIG, f"it has no {missing[0]}")
    # Not from the config, which may contain a pattern.
    modules = {match[1] for name in adapter_shapes(adapter_dir) if (match := re.search(r"\.(\w+)\.lora_A\.", name))}
    settings = {"lora_dropout": 0.0, **config}
    return Lora(
        **{ours: settings[theirs] for ours, theirs in _IN_PEFT.items() if theirs in settings},
        target_modules=tuple(sorted(modules)),
        modules_to_save=tuple(config.get("modules_to_save") or ()),
    )


def silence_libraries() -> None:
    """Turn off warnings and progress bars that no user can act on."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it asks for a kernel package that is not needed
    warnings.simplefilter("ignore", FutureWarning)  # from peft's calls into transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@contextmanager
def fast_matmul() -> Iterator[None]:
    """Multiply float32 matrices in bf16 where that is faster: in forward and backward passes, not in exact work."""
    before = torch.get_float32_matmul_precision()
    if not torch.cuda.is_available() and bf16_is_faster():
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def bf16_is_faster() -> bool:
    """Measure once per process on a CPU with bf16 instructions, unless SAIGAKIT_CPU_MATMUL decides.

    AMX and AMD's AVX512-BF16 are about twice as fast; a Xeon with AVX512-BF16 but no AMX is half as fast.
    """
    asked = workspace.cpu_matmul()
    return asked == "bf16" or (asked is None and workspace.cpu_has_bf16() and _bf16_speedup() > _WORTHWHILE_SPEEDUP)


@cache
def _bf16_speedup() -> float:
    """Time of a float32 product over that in bf16, for a batch of tokens and a matrix of a small model."""
    before, left, right = torch.get_float32_matmul_precision(), torch.ones(256, 1024), torch.ones(1024, 1024)
    timings: dict[str, list[float]] = {"highest": [], "medium": []}
    try:
        for precision, seconds in [*timings.items()] * 12:  # alternating, so that other load affects both
            torch.set_float32_matmul_precision(precision)
            start = time.perf_counter()
            left @ right
            seconds.append(time.perf_counter() - start)
    finally:
        torch.set_float32_matmul_precision(before)
    return min(timings["highest"]) / min(timings["medium"])
