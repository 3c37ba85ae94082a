"""A released adapter folded into its base for a new LoRA with other modules; both together into one adapter."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saigakit.core.files import replacing, write_text
from saigakit.errors import SaigaError
from saigakit.weights.adapter import Adapter
from saigakit.weights.merge import Merged

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from saigakit.weights.tensors import Array


def require_foldable(base_dir: Path, adapter_dir: Path) -> None:
    """Raises SaigaError where the adapter is more than plain LoRA or of another base; reads headers alone."""
    try:
        Merged.of(base_dir, adapter_dir).adapters[0][0].require_linear_lora("folding")
    except SaigaError as error:
        raise SaigaError(
            f"{error} To train on top of it as it is, use adapter='released'; None starts a LoRA without it."
        ) from None


def into(model: "PreTrainedModel", base_dir: Path, adapter_dir: Path) -> None:
    """Adds the adapter to `model`, which `load.base_model` made from `base_dir`; only then a new LoRA is attached.

    Each changed matrix is read from the files again, so that a quantised one is quantised once, from the sum in
    float32. Raises SaigaError for the adapter of another base or more than plain LoRA.
    """
    import torch

    merged = Merged.of(base_dir, adapter_dir)
    adapter = merged.adapters[0][0]
    adapter.require_linear_lora("folding")
    for name in adapter.updates:
        module = model.get_submodule(name.removesuffix(".weight"))
        with torch.no_grad():
            module.weight = _in_place_of(module, torch.from_numpy(merged.read(name)), model.dtype)


def _in_place_of(module: "torch.nn.Module", matrix: "torch.Tensor", dtype: "torch.dtype") -> "torch.nn.Parameter":
    """`matrix` as the module's weight is: its quantisation, number format and device."""
    import torch
    from bitsandbytes.nn.modules import Int8Params, Params4bit

    old: Any = module.weight
    linear: Any = module
    made: Any
    if isinstance(old, Params4bit):
        made = Params4bit(
            matrix.to(dtype),
            requires_grad=False,
            blocksize=old.blocksize,
            compress_statistics=old.compress_statistics,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
            module=linear,
        )
    elif isinstance(old, Int8Params):
        made = Int8Params(matrix.to(dtype), requires_grad=False, has_fp16_weights=False)
    else:
        return torch.nn.Parameter(matrix.to(old.device, old.dtype), requires_grad=False)
    quantised: torch.nn.Parameter = made.to(old.device)  # that quantises it
    return quantised


def rank_of(released_dir: Path) -> int:
    """How many of the first ranks of what `combined` makes are the released adapter's."""
    return _rank(Adapter.of(released_dir))


def _rank(adapter: Adapter) -> int:
    return max(adapter.weights.stored[update.a].shape[0] for update in adapter.updates.values())


def combined(released_dir: Path, new_dir: Path, out_dir: Path) -> Path:
    """The released adapter and the new one, trained on the folded base, as one adapter of the original base.

    A = [A1; A2] and B = [s1 B1, s2 B2] at a scale of 1, in float32; its rank is the sum of both, with zeros where one
    of them leaves a module alone. Raises SaigaError where one is more than plain LoRA, or `out_dir` has an adapter.
    """
    from safetensors.numpy import save_file

    file, config_file = out_dir / "adapter_model.safetensors", out_dir / "adapter_config.json"
    if file.exists() or config_file.exists():
        raise SaigaError(f"{out_dir} has an adapter already; give another output_dir.")
    adapters = [Adapter.of(directory) for directory in (released_dir, new_dir)]
    for adapter in adapters:
        adapter.require_linear_lora("folding")
    ranks = list(map(_rank, adapters))
    names = sorted({name.removesuffix(".weight") for adapter in adapters for name in adapter.updates})
    matrices: dict[str, Array] = {}
    for name in names:
        a, b = _joined(adapters, ranks, f"{name}.weight")
        matrices |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    config = json.loads((new_dir / "adapter_config.json").read_text(encoding="utf-8"))
    config |= {"r": sum(ranks), "lora_alpha": sum(ranks), "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    config |= {"target_modules": sorted({name.rpartition(".")[2] for name in names})}
    out_dir.mkdir(parents=True, exist_ok=True)
    with replacing(file) as partial:
        save_file(matrices, partial, metadata={"format": "pt"})
        write_text(config_file, json.dumps(config, ensure_ascii=False, indent=2))
    return out_dir


def _joined(adapters: Sequence[Adapter], ranks: Sequence[int], name: str) -> "tuple[Array, Array]":
    import numpy as np

    out, into_size = next(adapter.shape(name) for adapter in adapters if name in adapter.updates)
    a, b = np.zeros((sum(ranks), into_size), np.float32), np.zeros((out, sum(ranks)), np.float32)
    for adapter, start in zip(adapters, (0, ranks[0]), strict=True):
        if name in adapter.updates:
            update = adapter.updates[name]
            rows = slice(start, start + adapter.weights.stored[update.a].shape[0])
            a[rows], b[:, rows] = adapter.weights.read(update.a), update.scale * adapter.weights.read(update.b)
    return a, b
