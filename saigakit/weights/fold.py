"""Fold a released adapter into its base before training a new LoRA, and combine both into one adapter."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saigakit.core.files import replacing, write_text
from saigakit.core.lazy import np, safetensors, torch, transformers
from saigakit.errors import SaigaError
from saigakit.weights.adapter import Adapter
from saigakit.weights.merge import Merged
from saigakit.weights.tensors import Array


def require_foldable(base_dir: Path, adapter_dir: Path) -> None:
    """Raises SaigaError if the adapter has more than plain LoRA or another base; reads only headers."""
    try:
        Merged.open(base_dir, adapter_dir).adapters[0][0].require_linear_lora("folding")
    except SaigaError as error:
        raise SaigaError(
            f"{error} To continue training it unfolded, use adapter='released'; adapter=None (YAML: null) omits it."
        ) from None


def fold_adapter(model: "transformers.PreTrainedModel", base_dir: Path, adapter_dir: Path) -> None:
    """Add the adapter to `model`; each matrix is read again, so that it is quantised once, from the float32 sum."""
    merged = Merged.open(base_dir, adapter_dir)
    adapter = merged.adapters[0][0]
    adapter.require_linear_lora("folding")
    for name in adapter.updates:
        module = model.get_submodule(name.removesuffix(".weight"))
        with torch.no_grad():
            module.weight = _weight_like(module, torch.from_numpy(merged.read(name)), model.dtype)


def _weight_like(module: Any, matrix: "torch.Tensor", dtype: "torch.dtype") -> "torch.nn.Parameter":  # noqa: ANN401
    """`matrix` in the quantisation, number format and device of the module's weight."""
    from bitsandbytes.nn.modules import Int8Params, Params4bit

    old = module.weight
    settings: dict[str, Any] = {"has_fp16_weights": False}
    if isinstance(old, Params4bit):
        names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        settings = {name: getattr(old, name) for name in names} | {"module": module}
    elif not isinstance(old, Int8Params):
        return torch.nn.Parameter(matrix.to(old.device, old.dtype), requires_grad=False)
    new: torch.nn.Parameter = type(old)(matrix.to(dtype), requires_grad=False, **settings).to(old.device)
    return new  # moving it has quantised it


def combine(released_dir: Path, new_dir: Path, out_dir: Path) -> Path:
    """Write the released adapter and the new one, trained on the folded base, as one adapter of the original base.

    A = [A1; A2] and B = [s1 B1, s2 B2] in float32; a module that one adapter does not change gets zeros.
    """
    from safetensors.numpy import save_file

    file, config_file = out_dir / "adapter_model.safetensors", out_dir / "adapter_config.json"
    if file.exists() or config_file.exists():
        raise SaigaError(f"{out_dir} already contains an adapter; give another output_dir.")
    adapters = [Adapter.open(directory) for directory in (released_dir, new_dir)]
    for adapter in adapters:
        adapter.require_linear_lora("folding")
    ranks = [adapter.rank for adapter in adapters]
    names = sorted({name.removesuffix(".weight") for adapter in adapters for name in adapter.updates})
    matrices: dict[str, Array] = {}
    for name in names:
        a, b = _concatenated(adapters, ranks, f"{name}.weight")
        matrices |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    config = json.loads((new_dir / "adapter_config.json").read_text(encoding="utf-8"))
    config |= {"r": sum(ranks), "lora_alpha": sum(ranks), "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    config |= {"target_modules": sorted({name.rpartition(".")[2] for name in names})}
    out_dir.mkdir(parents=True, exist_ok=True)
    with replacing(file) as partial:
        try:
            save_file(matrices, partial, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:  # as Python's functions would raise it, for `replacing`
            raise OSError(str(error)) from None
        write_text(config_file, json.dumps(config, ensure_ascii=False, indent=2))
    return out_dir


def _concatenated(adapters: Sequence[Adapter], ranks: Sequence[int], name: str) -> tuple[Array, Array]:
    out, into = next(adapter.shape(name) for adapter in adapters if name in adapter.updates)
    a, b = np.zeros((sum(ranks), into), np.float32), np.zeros((out, sum(ranks)), np.float32)
    for adapter, start in zip(adapters, (0, ranks[0]), strict=True):
        if name in adapter.updates:
            update = adapter.updates[name]
            rows = slice(start, start + adapter.weights.stored[update.a].shape[0])
            a[rows], b[:, rows] = adapter.weights.read(update.a), update.scale * adapter.weights.read(update.b)
    return a, b
