"""Check the settings of a training run and store them as JSON."""

import json
import math
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self, TypeGuard, get_args

from saigakit import registry
from saigakit.errors import SaigaError, suggestion
from saigakit.registry import Lora, ModelSpec, Quantization


def sequence_budget(spec: ModelSpec, max_seq_length: int | None) -> int:
    """Maximum tokens of a conversation and of a pack; None takes the model's default.

    Raises SaigaError if it is not a count or exceeds the model's context length.
    """
    if max_seq_length is None:
        return spec.max_seq_length
    require_count("max_seq_length", max_seq_length)
    if max_seq_length > spec.context_length:
        raise SaigaError(
            f"max_seq_length={max_seq_length} is over the context length of {spec.name}, {spec.context_length} tokens; "
            "use that or less."
        )
    return max_seq_length


def require_name(parameter: str, value: object, *, is_optional: bool = False) -> None:
    """Raise SaigaError if `value` is not text, such as a number without quotes in YAML."""
    if not isinstance(value, str) and not (is_optional and value is None):
        given = f"{parameter} is not set" if value is None else f"{parameter}={value!r} is not text"
        raise SaigaError(f"{given}; give a path or a name in quotes.")


def require_count(parameter: str, value: object, *, least: int = 1) -> None:
    if type(value) is not int or value < least:  # isinstance would accept True
        raise SaigaError(f"{parameter}={value!r} must be a whole number of at least {least}.")


def require_share(parameter: str, value: object) -> None:
    if not _is_number(value) or not 0 < value < 1:
        raise SaigaError(f"{parameter}={value!r} must be a number between 0 and 1, such as 0.05.")


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything a training run depends on. None in a field marked with "registry" takes the model's default there.

    `adapter`: "folded" adds the released adapter to the base and trains a new LoRA on all linear layers; the result is
    one adapter. "released" continues the released adapter. "auto" means "folded", which learned better
    (benchmarks/continue_or_fold.py), or a new LoRA if the model has no released adapter. A path or Hub id continues
    that adapter. None starts a new LoRA.
    """

    model: str
    train_file: str
    output_dir: str
    eval_file: str | None = None
    base_source: str | None = None
    adapter: str | None = "auto"
    quantization: Quantization | None = None  # registry
    lora: Lora | None = None  # registry
    learning_rate: float | None = None  # registry
    epochs: float = 2.0
    batch_size: int = 16  # conversations per optimizer step, over all processes
    max_seq_length: int | None = None  # registry; tokens of a conversation and of a pack
    eval_steps: int | None = None  # optimizer steps between evaluations; None: five evaluations in the run
    early_stopping: int | None = None  # evaluations without a lower evaluation loss; None: never
    neftune_alpha: float | None = None  # noise on the embeddings, arXiv:2310.05914; usually 5
    replay_file: str | None = None  # general dialogues to mix in against forgetting
    replay_fraction: float = 0.05  # of the conversations in an epoch, if there is a replay_file
    max_hours: float = 10.5  # Kaggle kills a session at 12 h and keeps nothing of it
    save_minutes: float = 30.0  # between checkpoints
    save_steps: int | None = None  # optimizer steps between checkpoints, instead of minutes
    resume_from: str | None = None  # 02_train of a session that stopped at max_hours, or an attached copy
    processes: int | None = None  # None: one per GPU, one on a CPU
    sharding: Literal["none", "fsdp"] = "none"  # "fsdp": the base split over the GPUs, if one alone cannot hold it
    seed: int = 42

    def __post_init__(self) -> None:
        spec = registry.find(self.model)
        if self.adapter in ("released", "folded") and spec.released_adapter is None:
            raise SaigaError(
                f"adapter={self.adapter!r}: {spec.name} has no released adapter; leave adapter out for a new LoRA."
            )
        left_open = {each.name for each in fields(self) if each.default is None and getattr(self, each.name) is None}
        numbers = {"learning_rate", "epochs", "max_hours", "save_minutes", "neftune_alpha", "replay_fraction"}
        for name in sorted(numbers - left_open):
            value = getattr(self, name)
            if not _is_number(value):
                raise SaigaError(
                    f"{name}={value!r} is not a number. In YAML write 2.0e-4: without the dot, 2e-4 is read as text."
                )
            if not 0 < value < math.inf:  # refuses NaN too
                raise SaigaError(f"{name}={value!r} must be above 0.")
        for name in sorted({"batch_size", "eval_steps", "early_stopping", "save_steps", "processes"} - left_open):
            require_count(name, getattr(self, name))
        if type(self.seed) is not int or self.seed not in range(2**32):
            raise SaigaError(f"seed={self.seed!r} must be a whole number from 0 to {2**32 - 1}.")
        for name in ("train_file", "output_dir", "eval_file", "replay_file", "resume_from", "base_source", "adapter"):
            require_name(name, getattr(self, name), is_optional=name not in ("train_file", "output_dir"))
        if self.lora is not None:
            _require_lora(self.lora)
        if self.replay_fraction >= 1:
            raise SaigaError(f"replay_fraction={self.replay_fraction!r} must be below 1: it is a share of an epoch.")
        if self.quantization not in (None, *get_args(Quantization)):
            raise SaigaError(f"quantization={self.quantization!r}: use 'nf4', 'int8' or 'none'.")
        if self.sharding not in ("none", "fsdp"):
            raise SaigaError(f"sharding={self.sharding!r}: use 'none' or 'fsdp'.")
        sequence_budget(spec, self.max_seq_length)

    @property
    def spec(self) -> ModelSpec:
        return registry.find(self.model)

    @property
    def sequence_budget(self) -> int:
        """Maximum tokens of a conversation and of a pack."""
        return sequence_budget(self.spec, self.max_seq_length)

    @property
    def weights_as(self) -> Quantization:
        return self.quantization or self.spec.quantization

    @property
    def is_sharded(self) -> bool:
        return self.sharding == "fsdp"

    @property
    def is_folded(self) -> bool:
        """Whether the released adapter is added to the base and a new LoRA is trained on the sum."""
        return self.adapter in ("auto", "folded") and self.spec.released_adapter is not None

    @property
    def new_lora(self) -> Lora:
        return self.lora or self.spec.lora

    @property
    def peak_learning_rate(self) -> float:
        return self.learning_rate or self.spec.learning_rate

    @property
    def start_adapter(self) -> str | None:
        """Path or Hub id of the adapter to start from; None if only a new LoRA is trained."""
        return self.spec.released_adapter if self.adapter in ("auto", "released", "folded") else self.adapter

    @property
    def start(self) -> dict[str, Any]:
        """The starting point as part of a run's identity: equal settings give equal values, however they are spelt."""
        return {"adapter": self.start_adapter, "folded": self.is_folded}

    def write(self, file: Path) -> Path:
        file.write_text(json.dumps(asdict(self), ensure_ascii=False, indent=2), encoding="utf-8")
        return file

    @classmethod
    def read(cls, file: Path) -> Self:
        return cls.from_json(json.loads(file.read_text(encoding="utf-8")), str(file))

    @classmethod
    def from_json(cls, values: dict[str, Any], source: str) -> Self:
        """Raises SaigaError for unknown and missing settings; `source` names their file."""
        is_required = {item.name: item.default is MISSING for item in fields(cls)}
        for name in [name for name in values if name not in is_required]:
            hint = suggestion(name, is_required)
            raise SaigaError(f"{source}: unknown setting {name!r}.{hint} Known settings: {', '.join(is_required)}.")
        if missing := [name for name, required in is_required.items() if required and name not in values]:
            raise SaigaError(f"{source}: {' and '.join(missing)} must be set.")
        if not isinstance(lora := values.get("lora"), dict):
            return cls(**values)
        known = [item.name for item in fields(Lora)]
        if unknown := sorted(lora.keys() - set(known)):
            raise SaigaError(f"{source}: unknown lora settings {', '.join(unknown)}. Known: {', '.join(known)}.")
        return cls(**values | {"lora": Lora.from_json(lora)})


def _require_lora(lora: object) -> None:
    if not isinstance(lora, Lora):
        raise SaigaError(f"lora={lora!r}: give a Lora, for example Lora(rank=32) of `from saigakit import Lora`.")
    require_count("lora.rank", lora.rank)
    require_count("lora.alpha", lora.alpha)
    if not _is_number(lora.dropout) or not 0 <= lora.dropout < 1:
        raise SaigaError(f"lora.dropout={lora.dropout!r} must be a number from 0 to below 1.")
    for name, names in (("target_modules", lora.target_modules), ("modules_to_save", lora.modules_to_save)):
        is_empty = name == "target_modules" and not names
        if is_empty or not isinstance(names, tuple | list) or not all(isinstance(each, str) for each in names):
            raise SaigaError(f"lora.{name}={names!r} must be a list of names, such as ['q_proj', 'v_proj'].")
