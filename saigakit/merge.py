"""A base model's shards and a LoRA adapter into merged float32 tensors, one at a time."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from saigakit import shards
from saigakit.errors import SaigaError
from saigakit.shards import Shape, Shards, damaged

if TYPE_CHECKING:
    from saigakit.shards import Array

_MATRIX = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<letter>[AB])(\.default)?\.weight")
# Settings of adapter_config.json under which the merged weight is still W + scale * B @ A.
_HARMLESS = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "merge_weights",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
    "velora_config",
}
_NAMED = {
    "bias": "trained biases (bias)",
    "fan_in_fan_out": "transposed layers (fan_in_fan_out)",
    "lora_bias": "LoRA biases (lora_bias)",
    "modules_to_save": "whole trained modules (modules_to_save)",
    "use_dora": "DoRA (use_dora)",
}
_KEEPS_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")  # other starts change the base weights too


@dataclass(frozen=True)
class Update:
    """What LoRA adds to one weight: scale * B @ A."""

    a: str
    b: str
    scale: float


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on disk; the updates by the name of the weight that they change."""

    directory: Path
    trained_on: str | None
    weights: Shards
    updates: Mapping[str, Update]

    @classmethod
    def of(cls, directory: Path) -> Self:
        """Raises SaigaError where it is damaged or more than LoRA on linear layers."""
        config = _read_config(directory / "adapter_config.json")
        _require_plain_lora(directory, config)
        file = directory / "adapter_model.safetensors"
        weights = Shards([file if file.is_file() else directory / "adapter_model.bin"])
        updates = {
            f"{module}.weight": Update(a, b, _scale(config, module, weights.stored[a].shape[0]))
            for module, (a, b) in _pairs(directory, weights).items()
        }
        return cls(directory, config.get("base_model_name_or_path"), weights, updates)

    def shape(self, name: str) -> Shape:
        """Of the weight that the update fits."""
        update = self.updates[name]
        return (self.weights.stored[update.b].shape[0], self.weights.stored[update.a].shape[1])

    def delta(self, name: str) -> "Array":
        update = self.updates[name]
        # By numpy: torch's float32 products may run in bf16 where the process asked for speed.
        product: Array = self.weights.read(update.b) @ self.weights.read(update.a)
        product *= update.scale
        return product


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(file, str(error)) from None
    if not isinstance(config, dict):
        raise damaged(file, "not a JSON object")
    return config


def _require_plain_lora(directory: Path, config: Mapping[str, Any]) -> None:
    if (kind := config.get("peft_type")) != "LORA":
        raise SaigaError(f"{directory} is an adapter of type {kind}, and only LORA can be merged.")
    if config.get("init_lora_weights", True) not in _KEEPS_THE_BASE:
        raise SaigaError(
            f"{directory} was started with init_lora_weights={config['init_lora_weights']!r}, which changes the base "
            "weights too, so it cannot be merged. Convert it to plain LoRA with peft first."
        )
    used = [key for key, value in config.items() if key not in _HARMLESS and value not in (None, False, "none", [], {})]
    if used:
        names = ", ".join(_NAMED.get(key, key) for key in used)
        raise SaigaError(
            f"{directory} uses {names}, which saigakit cannot merge yet: only plain LoRA on linear layers."
        )


def _pairs(directory: Path, weights: Shards) -> dict[str, tuple[str, str]]:
    """Module to the names of its A and B."""
    found: dict[str, dict[str, str]] = {}
    for name in weights.stored:
        match = _MATRIX.fullmatch(name)
        if match is None:
            raise SaigaError(
                f"{directory} holds {name}, which is no LoRA matrix of a linear layer: saigakit cannot merge it yet."
            )
        found.setdefault(match["module"], {})[match["letter"]] = name
    if not found:
        raise SaigaError(f"{directory} holds no LoRA matrices: it is damaged or not an adapter.")
    for module, names in found.items():
        shapes = [weights.stored[names[letter]].shape for letter in "AB" if letter in names]
        if len(shapes) != 2 or [len(shape) for shape in shapes] != [2, 2] or shapes[0][0] != shapes[1][1]:
            raise SaigaError(f"{directory} is damaged: A and B of {module} do not fit ({shapes}). Fetch it again.")
    return {module: (names["A"], names["B"]) for module, names in found.items()}


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rsLoRA; alpha_pattern's keys match the end of a module's name."""
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    matching = (alpha for key, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module))
    alpha = next(matching, config["lora_alpha"])
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


@dataclass(frozen=True)
class Merged:
    """Base and adapter that fit each other; a tensor is computed when it is read."""

    base: Shards
    adapter: Adapter | None

    @classmethod
    def of(cls, base_dir: Path, adapter_dir: Path | None) -> Self:
        """Reads headers alone. Raises SaigaError for damaged files and for the adapter of another base."""
        base = shards.of_base(base_dir)
        adapter = None if adapter_dir is None else Adapter.of(adapter_dir)
        if adapter is not None:
            _require_fit(base_dir, base, adapter)
        return cls(base, adapter)

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: stored.shape for name, stored in self.base.stored.items()}

    def is_adapted(self, name: str) -> bool:
        return self.adapter is not None and name in self.adapter.updates

    def read(self, name: str) -> "Array":
        """The merged tensor in float32. Raises SaigaError where it is not finite."""
        import numpy as np

        tensor = self.base.read(name)
        if self.adapter is not None and name in self.adapter.updates:
            merged = self.adapter.delta(name)
            merged += tensor  # in this order: the base may be a view of its file
            tensor = merged
        if not np.isfinite(tensor).all():
            where = f" and {self.adapter.directory}" if self.adapter and self.is_adapted(name) else ""
            raise SaigaError(
                f"{name} holds NaN or infinity after merging {self.base.stored[name].file}{where}: the training "
                "diverged or a file is damaged. Nothing was made; check the curve of 02_train or fetch the files again."
            )
        return tensor


def _require_fit(base_dir: Path, base: Shards, adapter: Adapter) -> None:
    hint = (
        f"The adapter was trained on {adapter.trained_on}. Give the adapter that belongs to `model` and base_source, "
        "or adapter=None."
    )
    for name in adapter.updates:
        wanted = adapter.shape(name)
        if name not in base.stored:
            raise SaigaError(
                f"{adapter.directory} changes {name} {list(wanted)}, and the base {base_dir} has no such tensor: "
                f"it is the adapter of another base. {hint}"
            )
        if (there := base.stored[name].shape) != wanted:
            raise SaigaError(
                f"{adapter.directory} changes {name} of shape {list(wanted)}, and in the base {base_dir} its shape is "
                f"{list(there)}: it is the adapter of another base. {hint}"
            )
