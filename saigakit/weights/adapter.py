"""Read a LoRA adapter and add its update to a weight, some rows at a time and in float32."""

import importlib.util
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from saigakit.core.lazy import np, peft, torch
from saigakit.errors import SaigaError
from saigakit.weights.base_files import damaged, read_json
from saigakit.weights.names import Names, without_wrappers
from saigakit.weights.tensors import Array, Shape, Shards, open_adapter

CONFIG = "adapter_config.json"
# How a tensor's name ends after its module; some versions of peft leave in the adapter's name, `.default`.
_PARTS = {
    "A": r"lora_A(\.default)?\.weight",
    "B": r"lora_B(\.default)?\.weight",
    "bias": r"lora_B(\.default)?\.bias",
    "embedding_A": r"lora_embedding_A(\.default)?",
    "embedding_B": r"lora_embedding_B(\.default)?",
    "magnitude": r"lora_magnitude_vector(\.default)?(\.weight)?",
    "trained": r"modules_to_save(\.default)?\.(weight|bias)",
    "tokens": r"token_adapter\.trainable_tokens_delta(\.default)?",
    "copy": r"((token_adapter\.)?base_layer\.|original_module\.)?(weight|bias)",
}
_NAME = re.compile(
    r"base_model\.model\.(?P<module>.+?)\.(?:" + "|".join(f"(?P<{part}>{end})" for part, end in _PARTS.items()) + ")"
)
# Settings of adapter_config.json that do not affect merging, or that are handled here; no others reach peft.
_SUPPORTED = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config", "merge_weights",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "trainable_token_indices", "use_dora", "use_rslora",
    "velora_config",
}  # fmt: skip
_INITS_KEEPING_BASE = (True, False, None, "gaussian", "eva", "orthogonal")  # others change the base weights too
# BLAS may round differently when it multiplies other rows: with fixed blocks, rows read alone are bit-equal.
_BLOCK = 128
_CACHED = 4  # matrices that every block of rows needs completely


class Update(NamedTuple):
    """scale * B @ A, transposed for embeddings. DoRA then scales the sum's rows to the lengths in `magnitude`."""

    a: str
    b: str
    scale: float
    magnitude: str | None = None
    of_embeddings: bool = False


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on disk. Dictionaries are keyed by the base tensor that they change."""

    directory: Path
    trained_on: str | None
    weights: Shards
    keeps_tied: bool  # embeddings and head were trained as one matrix
    updates: dict[str, Update] = field(default_factory=dict)
    biases: dict[str, tuple[str, float]] = field(default_factory=dict)  # stored name and scale
    trained: dict[str, str] = field(default_factory=dict)  # tensors that replace the base's
    copies: dict[str, str] = field(default_factory=dict)  # of base tensors, saved with LoRA on embeddings or head
    tokens: dict[str, tuple[str, list[int]]] = field(default_factory=dict)  # stored rows, and which they replace
    ranks: slice = field(default_factory=lambda: slice(None))  # rows of A and columns of B in use
    _cache: dict[str, Array] = field(default_factory=dict, compare=False)

    @classmethod
    def open(cls, directory: Path, names: Names | None = None) -> Self:
        """`names`: those of the base. Raises SaigaError if it is damaged or of a kind that cannot be merged."""
        config = read_config(directory)
        weights = open_adapter(directory)
        found = cls(directory, config.get("base_model_name_or_path"), weights, bool(config.get("ensure_weight_tying")))
        matrices: dict[str, dict[str, str]] = {}  # stored names by module and part
        saved = tuple(f".{name}" for name in config.get("modules_to_save") or ())
        for name in weights.stored:
            if (match := _NAME.fullmatch(without_wrappers(name))) is None:
                raise SaigaError(f"{directory} contains {name}, which is not a LoRA tensor that saigakit can merge.")
            module, part = match["module"], next(part for part in _PARTS if match[part])
            module = names.spell(module) if names else module
            if part == "tokens":
                ids = _token_ids(directory, config, module, weights.stored[name].shape[0])
                found.tokens[f"{module}.weight"] = (name, ids)
            elif part in ("trained", "copy"):
                is_saved = f".{module}".endswith(saved) and "original_module" not in name
                is_trained = part == "trained" or is_saved
                (found.trained if is_trained else found.copies)[f"{module}.{name.rpartition('.')[2]}"] = name
            else:
                matrices.setdefault(module, {})[part] = name
        if not matrices:
            raise damaged(directory, "it contains no LoRA matrices")
        for module, parts in matrices.items():
            update = found.updates[f"{module}.weight"] = _update(directory, weights, module, parts, config)
            if "bias" in parts:
                found.biases[f"{module}.bias"] = (parts["bias"], update.scale)
        for name in found.trained:
            found.copies.pop(name, None)
        return found

    @property
    def rank(self) -> int:
        """The largest of its matrices."""
        return max(self.weights.stored[update.a].shape[0] for update in self.updates.values())

    def changed(self) -> dict[str, Shape]:
        """Base tensors that the adapter changes, with the shapes they must have."""
        shapes = {name: self.shape(name) for name in self.updates}
        stored = self.weights.stored
        shapes |= {name: stored[source].shape for name, (source, _) in self.biases.items()}
        return shapes | {name: stored[source].shape for name, source in {**self.trained, **self.copies}.items()}

    def beyond_lora(self, *kinds: Literal["dora", "trained", "tokens", "copies", "biases", "embeddings"]) -> str | None:
        """Describes the first of `kinds` that the adapter has in addition to LoRA on linear layers."""
        updates = self.updates.values()
        found = {
            "dora": any(update.magnitude for update in updates) and "DoRA (use_dora)",
            "trained": self.trained and f"fully trained modules (modules_to_save): {', '.join(sorted(self.trained))}",
            "tokens": self.tokens and "trained tokens (trainable_token_indices)",
            "copies": self.copies and f"a full copy of {', '.join(sorted(self.copies))}",
            "biases": self.biases and "LoRA biases (lora_bias)",
            "embeddings": any(update.of_embeddings for update in updates) and "LoRA on embeddings",
        }
        return next((str(found[kind]) for kind in kinds if found[kind]), None)

    def require_linear_lora(self, purpose: str) -> None:
        """Raises SaigaError if the adapter has more than LoRA on the weights of linear layers."""
        if beyond := self.beyond_lora("dora", "trained", "tokens", "copies", "biases", "embeddings"):
            raise SaigaError(f"{self.directory} uses {beyond}, but {purpose} needs plain LoRA on linear layers.")

    def split(self, rank: int) -> tuple[Self, Self]:
        """The first `rank` ranks and the remaining ones, of plain LoRA on linear layers."""
        self.require_linear_lora("splitting by rank")
        first, rest = (replace(self, ranks=ranks, _cache={}) for ranks in (slice(rank), slice(rank, None)))
        return first, rest

    def shape(self, name: str) -> Shape:
        """Shape of the weight that the update is added to."""
        update = self.updates[name]
        shape = (self.weights.stored[update.b].shape[0], self.weights.stored[update.a].shape[1])
        return shape[::-1] if update.of_embeddings else shape

    def add(self, into: Array, name: str, rows: slice | None = None, weight: float = 1.0) -> None:
        """Add weight * scale * B @ A, or these rows of it, in place; rows are bit-equal to the full product's."""
        count, columns = self.shape(name)
        first, stop, _ = (rows or slice(None)).indices(count)
        start, end = first // _BLOCK * _BLOCK, min(-(-stop // _BLOCK) * _BLOCK, count)
        left, right = self._factors(self.updates[name], slice(start, end))
        if weight != 1:
            left = left * weight
        target, b, a = torch.from_numpy(into), torch.from_numpy(left), torch.from_numpy(right)
        for block in range(start, end, _BLOCK):
            last = min(block + _BLOCK, end)
            b_block = b[block - start : last - start]
            if first <= block and last <= stop:
                target[block - first : last - first].addmm_(b_block, a)
                continue
            low, high = max(first, block), min(last, stop)
            full_block = target.new_zeros(last - block, columns).addmm_(b_block, a)
            target[low - first : high - first] += full_block[low - block : high - block]

    def _factors(self, update: Update, rows: slice) -> tuple[Array, Array]:
        """Rows of the left factor, and the scaled right one, by columns: addmm_ then takes two thirds of the time."""
        if update.of_embeddings:
            left = self._cached(update.a, lambda a: a.T)[rows]
            return left, self._cached(update.b, lambda b: (b * update.scale).T)
        left = self.weights.read(update.b, rows)[:, self.ranks]
        return left, self._cached(update.a, lambda a: np.asfortranarray(a[self.ranks] * update.scale))

    def _cached(self, name: str, transform: Callable[[Array], Array]) -> Array:
        """A stored matrix, transformed once for all the blocks of rows that need it."""
        found = self._cache.get(name)
        if found is None:
            found = self._cache[name] = transform(self.weights.read(name))
            for old in list(self._cache)[:-_CACHED]:
                self._cache.pop(old, None)
        return found


def read_config(adapter_dir: Path) -> dict[str, Any]:
    """Raises SaigaError if adapter_config.json is missing or damaged, or has settings that are not allowed."""
    file = adapter_dir / CONFIG
    config = read_json(file)
    if not isinstance(config, dict) or "peft_type" not in config:
        raise damaged(file, "it has no peft_type")
    _require_supported(adapter_dir, config)
    for key in ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"):
        found = config.get(key) or ()
        for pattern in [found] if isinstance(found, str) else map(str, found):
            choices = re.findall(r"[*+{]|(?<![(*+}])\?", pattern)  # "?" after those is lazy or the kind of a group
            if re.search(r"\)[*+{?]", pattern) or len(choices) > 6 or pattern.count("(") > 12:
                raise damaged(file, f"matching the pattern {pattern[:80]!r} in {key} may take forever")
    return config


def _require_supported(directory: Path, config: Mapping[str, Any]) -> None:
    if (kind := config["peft_type"]) != "LORA":
        raise SaigaError(f"{directory} is an adapter of type {kind}; only LORA can be merged.")
    if config.get("init_lora_weights", True) not in _INITS_KEEPING_BASE:
        raise SaigaError(
            f"{directory} was trained with init_lora_weights={config['init_lora_weights']!r}, which also changes the "
            "base weights, so it cannot be merged. Convert it to plain LoRA with peft first."
        )
    # Every config has the module that peft imports for Megatron; another one is refused.
    used = {key for key, value in config.items() if value not in (None, False, "none", [], {}, "megatron.core")}
    # Of settings that are newer than this file; none without peft, which merging does not need.
    has_defaults = used - _SUPPORTED and importlib.util.find_spec("peft") is not None
    defaults: Mapping[str, Any] = peft.LoraConfig().to_dict() if has_defaults else {}
    if unsupported := ", ".join(sorted(key for key in used - _SUPPORTED if config[key] != defaults.get(key))):
        raise SaigaError(
            f"{directory} uses {unsupported}, which saigakit cannot merge: use LoRA, rsLoRA or DoRA, or, if "
            "you trust its source, merge it with peft."
        )


def _token_ids(directory: Path, config: Mapping[str, Any], module: str, count: int) -> list[int]:
    """The tokens that trainable_token_indices names for a module: a list for all, or one by the end of its name."""
    given = config.get("trainable_token_indices")
    by_name = given if isinstance(given, dict) else {"": given}
    ids = next((by_name[name] for name in by_name if module.endswith(name)), None)
    if not isinstance(ids, list) or len(ids) != count:
        raise damaged(directory / CONFIG, f"trainable_token_indices does not name the {count} tokens of {module}")
    return ids


def _update(
    directory: Path, weights: Shards, module: str, parts: Mapping[str, str], config: Mapping[str, Any]
) -> Update:
    prefix = "embedding_" if any(part.startswith("embedding_") for part in parts) else ""
    a, b = (parts.get(f"{prefix}{letter}", "") for letter in "AB")
    shapes = [weights.stored[name].shape for name in (a, b) if name]
    if [len(shape) for shape in shapes] != [2, 2] or shapes[0][0] != shapes[1][1]:
        raise damaged(directory, f"A and B of {module} do not fit: {shapes}")
    magnitude = parts.get("magnitude")
    if bool(config.get("use_dora")) != (magnitude is not None):
        count = "no" if magnitude is None else "a"
        raise damaged(directory, f"use_dora={config.get('use_dora')!r}, but {module} has {count} lora_magnitude_vector")
    if magnitude is not None and weights.stored[magnitude].shape != (shapes[1][0],):
        raise damaged(directory, f"the lora_magnitude_vector of {module} does not fit")
    return Update(a, b, _scale(directory, config, module, shapes[0][0]), magnitude, bool(prefix))


def _scale(directory: Path, config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rsLoRA; alpha_pattern's keys match the end of a module's name."""
    file, patterns = directory / CONFIG, config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise damaged(file, f"alpha_pattern {patterns!r} is not a JSON object")
    try:
        matching = (patterns[pattern] for pattern in patterns if re.fullmatch(rf"(.*\.)?({pattern})", module))
        alpha = next(matching, config.get("lora_alpha"))
    except re.error as error:
        raise damaged(file, f"alpha_pattern {patterns!r} has a name that is no regular expression: {error}") from None
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise damaged(file, f"lora_alpha={alpha!r} for {module} is not a number")
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)
