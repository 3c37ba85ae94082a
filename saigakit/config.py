"""Training parameters into a frozen, checked TrainConfig: JSON on disk, read by the child process."""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

from saigakit import registry
from saigakit.errors import SaigaError
from saigakit.registry import Lora, ModelSpec, Quantization


def sequence_budget(spec: ModelSpec, max_seq_length: int | None) -> int:
    """Tokens of the longest conversation and of one pack; without a `max_seq_length`, what the registry says.

    Raises SaigaError if it is no count or exceeds the context length of the model.
    """
    _require_count("max_seq_length", max_seq_length)
    if max_seq_length is not None and max_seq_length > spec.context_length:
        raise SaigaError(
            f"max_seq_length={max_seq_length} is over the context length of {spec.name}, {spec.context_length} tokens."
        )
    return max_seq_length or spec.max_seq_length


def require_name(parameter: str, value: object, *, is_optional: bool = False) -> None:
    """Raises SaigaError if the value is not text, as a path without quotes in YAML or a cell."""
    if not isinstance(value, str) and not (is_optional and value is None):
        raise SaigaError(f"{parameter}={value!r} is a {type(value).__name__}; give a path or a name in quotes.")


def _require_count(parameter: str, value: object) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise SaigaError(f"{parameter}={value!r} must be a whole number of at least 1.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything a training run depends on. None means: what the model's registry row says.

    `adapter`: "folded" adds the released adapter to the base and trains a new LoRA on all linear layers beside it,
    which are one adapter in the end; "released" continues it as it is; "auto" means "folded" where the model has one,
    since that learned better (benchmarks/continue_or_fold.py), and a new LoRA where it has none; a path or Hub id
    continues that one; None starts a new LoRA.
    """

    model: str
    train_file: str
    output_dir: str
    eval_file: str | None = None
    base_source: str | None = None
    adapter: str | None = "auto"
    quantization: Quantization | None = None
    lora: Lora | None = None
    learning_rate: float | None = None
    epochs: float = 2.0
    batch_size: int = 16  # conversations per optimizer step, over all processes
    max_seq_length: int | None = None  # tokens; also the budget of one pack
    eval_steps: int | None = None  # optimizer steps between two evaluations; None: five in the run
    early_stopping: int | None = None  # evaluations without a better held-out loss; None: all steps are made
    neftune_alpha: float | None = None  # noise on the embeddings of training, arXiv:2310.05914; 5 is usual
    replay_file: str | None = None  # general dialogues, mixed in against forgetting
    replay_fraction: float = 0.05  # of the conversations of an epoch, where there is a replay_file
    max_hours: float = 10.5  # Kaggle kills a session at 12 h and keeps nothing of a killed one
    save_minutes: float = 30.0  # between two checkpoints
    save_steps: int | None = None  # optimizer steps between two checkpoints, instead of minutes
    resume_from: str | None = None  # a stage of an earlier session that ended by max_hours, or its attached copy
    processes: int | None = None  # None: one per GPU, one on a CPU
    # "fsdp": the base in parts over the GPUs, for one that none of them holds.
    sharding: Literal["none", "fsdp"] = "none"
    seed: int = 42

    def __post_init__(self) -> None:
        spec = registry.find(self.model)
        if self.adapter in ("released", "folded") and spec.released_adapter is None:
            raise SaigaError(
                f"adapter={self.adapter!r}: {spec.name} has no released adapter; use adapter=None for a new LoRA."
            )
        for name in ("learning_rate", "epochs", "max_hours", "save_minutes", "neftune_alpha", "replay_fraction"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise SaigaError(
                    f"{name}={value!r} is a {type(value).__name__}, not a number. "
                    "In YAML write 2.0e-4: without the dot, 2e-4 is read as text."
                )
            if not 0 < value < math.inf:  # so that NaN is refused too
                raise SaigaError(f"{name}={value!r} must be above 0.")
        for name in ("batch_size", "eval_steps", "early_stopping", "save_steps", "processes"):
            _require_count(name, getattr(self, name))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise SaigaError(f"seed={self.seed!r} must be a whole number from 0 to {2**32 - 1}.")
        for name in ("train_file", "output_dir", "eval_file", "replay_file", "resume_from", "base_source", "adapter"):
            require_name(name, getattr(self, name), is_optional=name not in ("train_file", "output_dir"))
        if self.lora is not None:
            _require_lora(self.lora)
        if self.replay_fraction >= 1:
            raise SaigaError(f"replay_fraction={self.replay_fraction!r} must be below 1: it is a share of an epoch.")
        if self.quantization not in (None, "nf4", "int8", "none"):
            raise SaigaError(f"quantization={self.quantization!r}: use 'nf4', 'int8' or 'none'.")
        if self.sharding not in ("none", "fsdp"):
            raise SaigaError(f"sharding={self.sharding!r}: use 'none' or 'fsdp'.")
        sequence_budget(spec, self.max_seq_length)

    @property
    def spec(self) -> ModelSpec:
        return registry.find(self.model)

    @property
    def sequence_budget(self) -> int:
        """Tokens of the longest conversation and of one pack."""
        return sequence_budget(self.spec, self.max_seq_length)

    @property
    def weights_as(self) -> Quantization:
        return self.quantization or self.spec.quantization

    @property
    def is_sharded(self) -> bool:
        return self.sharding == "fsdp"

    @property
    def is_folded(self) -> bool:
        """The released adapter goes into the base, and a new LoRA beside it learns."""
        return self.adapter in ("auto", "folded") and self.spec.released_adapter is not None

    @property
    def new_lora(self) -> Lora:
        return self.lora or self.spec.lora

    @property
    def peak_learning_rate(self) -> float:
        return self.learning_rate or self.spec.learning_rate

    @property
    def start_adapter(self) -> str | None:
        """The adapter to begin with, None for a new LoRA alone; "auto", "released" and "folded" resolved."""
        return self.spec.released_adapter if self.adapter in ("auto", "released", "folded") else self.adapter

    @property
    def start(self) -> dict[str, Any]:
        """What training begins with, whatever word says it: a part of a run's identity."""
        return {"adapter": self.start_adapter, "folded": self.is_folded}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def write(self, file: Path) -> Path:
        file.write_text(json.dumps(self.to_json(), ensure_ascii=False, indent=2), encoding="utf-8")
        return file

    @classmethod
    def read(cls, file: Path) -> Self:
        return cls.of_json(json.loads(file.read_text(encoding="utf-8")), file)

    @classmethod
    def of_json(cls, values: dict[str, Any], file: Path) -> Self:
        """`file`: where they are from, for the message of SaigaError."""
        unknown = set(values) - {item.name for item in fields(cls)}
        if unknown:
            raise SaigaError(f"{file}: unknown settings {', '.join(sorted(unknown))}.")
        if values.get("lora"):
            values = values | {"lora": lora_of_json(values["lora"])}
        return cls(**values)


def lora_of_json(values: dict[str, Any]) -> Lora:
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return Lora(**values | lists)


def _require_lora(lora: object) -> None:
    if not isinstance(lora, Lora):
        raise SaigaError(f"lora={lora!r}: give a Lora, for example Lora(rank=32) of `from saigakit import Lora`.")
    for name in ("rank", "alpha"):
        value = getattr(lora, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SaigaError(f"lora.{name}={value!r} must be a whole number of at least 1.")
    if isinstance(lora.dropout, bool) or not isinstance(lora.dropout, int | float) or not 0 <= lora.dropout < 1:
        raise SaigaError(f"lora.dropout={lora.dropout!r} must be a number from 0 to below 1.")
    for name, least in (("target_modules", 1), ("modules_to_save", 0)):
        names = getattr(lora, name)
        if (
            not isinstance(names, tuple | list)
            or len(names) < least
            or not all(isinstance(each, str) for each in names)
        ):
            raise SaigaError(f"lora.{name}={names!r} must be a list of names, such as ['q_proj', 'v_proj'].")
