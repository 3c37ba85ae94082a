"""A LoRA adapter's files into updates of named weights: what it adds, scales or replaces, by rows and in float32."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from saigakit.errors import SaigaError
from saigakit.weights import blas
from saigakit.weights.tensors import Shape, Shards, damaged

if TYPE_CHECKING:
    from saigakit.weights.tensors import Array

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# What a tensor's name ends in, after its module's; `.default` is the adapter's name, which some versions leave in.
_PARTS = {
    "A": r"lora_A(\.default)?\.weight",
    "B": r"lora_B(\.default)?\.weight",
    "bias": r"lora_B(\.default)?\.bias",
    "embedding_A": r"lora_embedding_A(\.default)?",
    "embedding_B": r"lora_embedding_B(\.default)?",
    "magnitude": r"lora_magnitude_vector(\.default)?(\.weight)?",
    "trained": r"modules_to_save(\.default)?\.(weight|bias)",
    "copy": r"(base_layer\.)?(weight|bias)",
}
_NAME = re.compile(
    r"base_model\.model\.(?P<module>.+?)\.(?:" + "|".join(f"(?P<{part}>{end})" for part, end in _PARTS.items()) + ")"
)
# Settings of adapter_config.json that do not change how a weight is merged, or that are read here.
_KNOWN = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
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
    "lora_bias",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "merge_weights",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
    "velora_config",
}
_NAMED = {"fan_in_fan_out": "transposed layers (fan_in_fan_out)"}
_KEEPS_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")  # other starts change the base weights too
# BLAS may round a product of other rows differently: always the same blocks, so that rows equal those of the whole.
_BLOCK = 128
_KEPT = 4  # matrices in memory that every block of rows needs whole


@dataclass(frozen=True)
class Update:
    """scale * B @ A; of embeddings its transpose. With DoRA the sum's lengths are then set to `magnitude`."""

    a: str
    b: str
    scale: float
    magnitude: str | None = None
    of_embeddings: bool = False


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on disk; all by the name of the tensor of the base that it changes."""

    directory: Path
    trained_on: str | None
    weights: Shards
    updates: Mapping[str, Update]
    biases: Mapping[str, tuple[str, float]] = field(default_factory=dict)  # stored name and scale, to be added
    trained: Mapping[str, str] = field(default_factory=dict)  # whole tensors in place of the base's
    copies: Mapping[str, str] = field(default_factory=dict)  # the base's own, stored beside LoRA on embeddings or head
    keeps_tied: bool = False  # embeddings and head were trained as one
    ranks: slice = field(default_factory=lambda: slice(None))  # the part of A's rows and B's columns that counts
    _last: "dict[str, Array]" = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, directory: Path) -> Self:
        """Raises SaigaError where it is damaged, or of a kind that cannot be merged."""
        config = _read_config(directory / "adapter_config.json")
        _require_known(directory, config)
        file = directory / "adapter_model.safetensors"
        weights = Shards([file if file.is_file() else directory / "adapter_model.bin"])
        updates: dict[str, Update] = {}
        biases: dict[str, tuple[str, float]] = {}
        trained: dict[str, str] = {}
        copies: dict[str, str] = {}
        for module, parts in _modules(directory, weights).items():
            for name in parts.pop("whole", ()):
                is_trained = ".modules_to_save." in name or _is_saved(config, module)
                (trained if is_trained else copies)[f"{module}.{name.rpartition('.')[2]}"] = name
            if not parts:
                continue
            made = _update(directory, weights, module, parts, config)
            updates[f"{module}.weight"] = made
            if "bias" in parts:
                biases[f"{module}.bias"] = (parts["bias"], made.scale)
        tied = bool(config.get("ensure_weight_tying"))
        return cls(directory, config.get("base_model_name_or_path"), weights, updates, biases, trained, copies, tied)

    def changed(self) -> dict[str, Shape]:
        """The tensors of the base that it changes, and the shapes that they must have."""
        shapes = {name: self.shape(name) for name in self.updates}
        stored = self.weights.stored
        shapes |= {name: stored[there].shape for name, (there, _) in self.biases.items()}
        return shapes | {name: stored[there].shape for name, there in {**self.trained, **self.copies}.items()}

    def beyond_lora(self) -> str | None:
        """Names what it has beyond scale * B @ A, which can be neither weighted nor added to another adapter."""
        if any(update.magnitude for update in self.updates.values()):
            return "DoRA (use_dora)"
        if self.trained:
            return f"whole trained modules (modules_to_save): {', '.join(sorted(self.trained))}"
        if self.copies:
            return f"a whole copy of {', '.join(sorted(self.copies))}"
        return None

    def require_linear_lora(self, purpose: str) -> None:
        """Raises SaigaError where it is more than LoRA on the weights of linear layers."""
        beyond = self.beyond_lora() or ("LoRA biases (lora_bias)" if self.biases else None)
        if beyond is None and any(update.of_embeddings for update in self.updates.values()):
            beyond = "LoRA on embeddings"
        if beyond is not None:
            raise SaigaError(f"{self.directory} uses {beyond}; {purpose} takes plain LoRA on linear layers alone.")

    def split(self, rank: int) -> tuple[Self, Self]:
        """Of plain LoRA on linear layers: its first `rank` ranks, and the others."""
        self.require_linear_lora("a split by rank")
        first, rest = (replace(self, ranks=ranks, _last={}) for ranks in (slice(rank), slice(rank, None)))
        return first, rest

    def shape(self, name: str) -> Shape:
        """Of the weight that the update fits."""
        update = self.updates[name]
        shape = (self.weights.stored[update.b].shape[0], self.weights.stored[update.a].shape[1])
        return shape[::-1] if update.of_embeddings else shape

    def add(self, into: "Array", name: str, rows: slice | None = None, weight: float = 1.0) -> None:
        """Adds weight * scale * B @ A, or these rows of it: bit for bit the same as in the whole."""
        import numpy as np

        count, columns = self.shape(name)
        first, stop, _ = (rows or slice(None)).indices(count)
        start, end = first // _BLOCK * _BLOCK, min(-(-stop // _BLOCK) * _BLOCK, count)
        left, right = self._factors(self.updates[name], slice(start, end))
        if weight != 1:
            left = left * weight
        for block in range(start, end, _BLOCK):
            last = min(block + _BLOCK, end)
            of_block = left[block - start : last - start]
            if first <= block and last <= stop:
                blas.add_product(of_block, right, into[block - first : last - first])
                continue
            whole = np.zeros((last - block, columns), np.float32)
            blas.add_product(of_block, right, whole)
            low, high = max(first, block), min(last, stop)
            into[low - first : high - first] += whole[low - block : high - block]

    def _factors(self, update: Update, rows: slice) -> "tuple[Array, Array]":
        """The second one is scaled."""
        import numpy as np

        if not update.of_embeddings:
            b = self.weights.read(update.b, rows)[:, self.ranks]
            return b, self._kept(update.a, lambda a: a[self.ranks] * update.scale)
        by_tokens = self._kept(update.a, lambda a: np.ascontiguousarray(a.T))
        return by_tokens[rows], self._kept(update.b, lambda b: np.ascontiguousarray(b.T) * update.scale)

    def _kept(self, name: str, made_of: "Callable[[Array], Array]") -> "Array":
        """What is made of a stored matrix, and kept while the blocks of rows that need it are read."""
        made = self._last.get(name)
        if made is None:
            made = self._last[name] = made_of(self.weights.read(name))
            for old in list(self._last)[:-_KEPT]:
                self._last.pop(old, None)
        return made


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(file, str(error)) from None
    if not isinstance(config, dict):
        raise damaged(file, "not a JSON object")
    return config


def _require_known(directory: Path, config: Mapping[str, Any]) -> None:
    if (kind := config.get("peft_type")) != "LORA":
        raise SaigaError(f"{directory} is an adapter of type {kind}, and only LORA can be merged.")
    if config.get("init_lora_weights", True) not in _KEEPS_THE_BASE:
        raise SaigaError(
            f"{directory} was started with init_lora_weights={config['init_lora_weights']!r}, which changes the base "
            "weights too, so it cannot be merged. Convert it to plain LoRA with peft first."
        )
    used = [key for key, value in config.items() if key not in _KNOWN and value not in (None, False, "none", [], {})]
    if used:
        names = ", ".join(_NAMED.get(key, key) for key in used)
        raise SaigaError(
            f"{directory} uses {names}, which saigakit cannot merge: use LoRA, rsLoRA or DoRA, or merge it with peft."
        )


def _modules(directory: Path, weights: Shards) -> dict[str, dict[str, Any]]:
    """Module to its parts: the names of A and B and what else it has; `whole` is a list."""
    found: dict[str, dict[str, Any]] = {}
    has_matrices = False
    for name in weights.stored:
        match = _NAME.fullmatch(name)
        if match is None:
            raise SaigaError(f"{directory} holds {name}, which is no tensor of a LoRA adapter that saigakit can merge.")
        part = next(part for part in _PARTS if match[part])
        parts = found.setdefault(match["module"], {})
        if part in ("trained", "copy"):
            parts.setdefault("whole", []).append(name)
        else:
            parts[part] = name
            has_matrices = True
    if not has_matrices:
        raise SaigaError(f"{directory} holds no LoRA matrices: it is damaged or not an adapter.")
    return found


def _update(
    directory: Path, weights: Shards, module: str, parts: Mapping[str, str], config: Mapping[str, Any]
) -> Update:
    prefix = "embedding_" if any(part.startswith("embedding_") for part in parts) else ""
    a, b = (parts.get(f"{prefix}{letter}", "") for letter in "AB")
    shapes = [weights.stored[name].shape for name in (a, b) if name]
    if [len(shape) for shape in shapes] != [2, 2] or shapes[0][0] != shapes[1][1]:
        raise SaigaError(f"{directory} is damaged: A and B of {module} do not fit ({shapes}). Fetch it again.")
    magnitude = parts.get("magnitude")
    if bool(config.get("use_dora")) != (magnitude is not None):
        raise SaigaError(
            f"{directory} is damaged: use_dora={config.get('use_dora')!r} in its adapter_config.json, and {module} has "
            f"{'no' if magnitude is None else 'a'} lora_magnitude_vector. Fetch it again."
        )
    if magnitude is not None and weights.stored[magnitude].shape != (shapes[1][0],):
        raise SaigaError(f"{directory} is damaged: the lora_magnitude_vector of {module} does not fit. Fetch it again.")
    return Update(a, b, _scale(directory, config, module, shapes[0][0]), magnitude, bool(prefix))


def _is_saved(config: Mapping[str, Any], module: str) -> bool:
    """Whether modules_to_save names it, by its end or in full."""
    return any(module == name or module.endswith(f".{name}") for name in config.get("modules_to_save") or ())


def _scale(directory: Path, config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rsLoRA; alpha_pattern's keys match the end of a module's name."""
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise damaged(directory / "adapter_config.json", f"alpha_pattern {patterns!r} is not a JSON object")
    alpha = next((patterns[key] for key in patterns if _matches(directory, key, module)), config.get("lora_alpha"))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise SaigaError(
            f"{directory / 'adapter_config.json'} has the lora_alpha {alpha!r} for {module}, which is no number: "
            "fetch the adapter again, or write there what it was trained with."
        )
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _matches(directory: Path, pattern: str, module: str) -> bool:
    try:
        return re.fullmatch(rf"(.*\.)?({pattern})", module) is not None
    except re.error as error:
        raise SaigaError(
            f"{directory / 'adapter_config.json'} has {pattern!r} in alpha_pattern, which is no regular expression "
            f"({error}): fetch the adapter again, or write the module's name there."
        ) from None
