"""Resolve what a training reads, once, and hand it to the child processes as one JSON file."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from saigakit.config import TrainConfig
from saigakit.registry import Lora
from saigakit.train import preflight
from saigakit.weights import find, memory
from saigakit.weights.load import NumberFormat
from saigakit.weights.memory import Pack, Shape

_FILE = "job.json"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training with its model and adapter resolved. Parent and children share it; each machine makes its own."""

    config: TrainConfig
    base_dir: Path
    adapter_dir: Path | None  # of the adapter to start with
    lora: Lora  # that is trained: the continued adapter's or the new one
    shape: Shape
    number_format: NumberFormat

    @classmethod
    def of(cls, config: TrainConfig, number_format: NumberFormat) -> Self:
        """Find or fetch model and adapter. Raises SaigaError where they are missing or do not fit `config`."""
        base_dir = find.base_dir(config.spec, config.base_source)
        adapter_dir = None if config.start_adapter is None else find.adapter_dir(config.spec, config.start_adapter)
        return cls(
            config=config,
            base_dir=base_dir,
            adapter_dir=adapter_dir,
            lora=preflight.model(config, base_dir, adapter_dir),
            shape=Shape.of(base_dir),
            number_format=number_format,
        )

    def memory_needed(self, *, processes: int, pack: Pack | None = None) -> dict[str, int]:
        """Bytes of one process by what they are for; without `pack` for one document of the whole budget."""
        on_gpu = self.number_format != "float32"
        itemsize = 2 if on_gpu else 4
        parts = memory.training(
            self.shape,
            quantization=self.config.weights_as,
            lora=self.lora,
            pack_tokens=self.config.sequence_budget,
            itemsize=itemsize,
            checkpointing=on_gpu,
            pack=pack,
        )
        if not self.config.is_sharded:
            return parts
        return sharded(parts, processes, self.shape.layers, itemsize * self.shape.embedding_parameters)

    def write(self, directory: Path) -> Path:
        file = directory / _FILE
        file.write_text(json.dumps(asdict(self), ensure_ascii=False, indent=2, default=str), encoding="utf-8")
        return file

    @classmethod
    def read(cls, file: Path) -> Self:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        adapter_dir = content["adapter_dir"]
        return cls(
            config=TrainConfig.from_json(content["config"], file),
            base_dir=Path(content["base_dir"]),
            adapter_dir=None if adapter_dir is None else Path(adapter_dir),
            lora=Lora.from_json(content["lora"]),
            shape=Shape(**content["shape"]),
            number_format=content["number_format"],
        )


def sharded(parts: dict[str, int], processes: int, layers: int, embeddings: int) -> dict[str, int]:
    """What `parts` are for one of so many processes with FSDP, in bytes.

    Its part of the weights, and what it gathers: two layers, and the `embeddings` with the head, which accelerate puts
    into one unit with what is left over.
    """
    whole = parts["weights"]
    return {**parts, "weights": whole // processes + 2 * (whole - embeddings) // layers + embeddings}
