"""What an adapter's manifest says of its training into what an export must keep or refuse."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

from saigakit.core import manifest
from saigakit.errors import SaigaError
from saigakit.registry import ModelSpec
from saigakit.weights import base_files
from saigakit.weights.merge import Into

SYSTEM_PROMPT_KEY = "saigakit.system_prompt"  # in a GGUF, no key of llama.cpp's: what a conversation begins with
MergeInto = Literal["auto", Into]
_UNTOLD_FORMAT = "float16"  # of a training that left no manifest: Saiga's adapters and a T4's are of it


@dataclass(frozen=True)
class Lineage:
    """Of the adapters that are merged; the last one that tells decides."""

    system_prompt: str | None  # that of the training records, which may have none; else the model's own
    number_format: str
    into: Into  # what the adapters are added to
    folded_rank: int = 0  # of the adapter's ranks, so many were in the base when a training in nf4 quantised it

    @property
    def merging(self) -> dict[str, Any]:
        """Settings of `Merged.of`."""
        return {"into": self.into, "number_format": self.number_format, "folded_rank": self.folded_rank}

    @classmethod
    def of(cls, spec: ModelSpec, adapter_dirs: Sequence[Path], into: MergeInto) -> Self:
        """ "auto" is what one adapter was trained on: the dequantised base after a training in nf4, else the original.

        Measured on SmolLM2-135M by benchmarks/merge_into.py. Raises SaigaError for an adapter of another model, or one
        that has no nf4 base to be merged into.
        """
        if into not in get_args(MergeInto):
            raise SaigaError(f"merge_into={into!r} is unknown; use one of {', '.join(get_args(MergeInto))}.")
        system_prompt, number_format = spec.system_prompt, _UNTOLD_FORMAT
        problems: list[str | None] = []
        folded_rank = 0
        for adapter_dir in adapter_dirs:
            if (adapter_dir / manifest.NAME).is_file():
                trained = manifest.require_stage(adapter_dir, "02_train", model=spec.name)
                if (prompt := trained.get("system_prompt")) is not None:
                    system_prompt = prompt
                number_format = trained.get("number_format") or number_format
                folded_rank = trained.get("training", {}).get("folded_rank", 0)
                problems.append(_without_nf4_base(adapter_dir, trained, spec, is_alone=len(adapter_dirs) == 1))
        if into == "auto":
            into = "dequantized" if len(adapter_dirs) == 1 and problems == [None] else "original"
        if into == "dequantized" and not adapter_dirs:
            raise SaigaError("merge_into='dequantized' needs an adapter; nf4 would only damage the base alone.")
        if into == "dequantized" and (problem := next(filter(None, problems), None)) is not None:
            raise SaigaError(f"{problem}. Use merge_into='original'.")
        return cls(system_prompt or None, number_format, into, folded_rank)


def _without_nf4_base(adapter_dir: Path, stage: Mapping[str, Any], spec: ModelSpec, *, is_alone: bool) -> str | None:
    """Why the adapter has no dequantised base to go into, which is that of a training in nf4."""
    trained = stage["parameters"]
    quantization_used = trained.get("quantization") or spec.quantization
    if quantization_used != "nf4":
        return (
            f"The adapter in {adapter_dir} was trained with quantization={quantization_used!r}, so there is no nf4 "
            "base to dequantise"
        )
    if trained.get("adapter") == "folded" and not (is_alone and stage.get("training", {}).get("folded_rank")):
        return (
            f"The adapter in {adapter_dir} was trained on a folded base, which was quantised with the released adapter "
            "in it, and that can be told apart only of one adapter whose manifest has a folded_rank"
        )
    return None


def training_records(adapter_dir: Path) -> dict[str, str]:
    """Name to SHA-256 of what an adapter was trained on; empty where no manifest tells."""
    if not (adapter_dir / manifest.NAME).is_file():
        return {}
    return dict(manifest.read(adapter_dir)["inputs"].get("train") or {})


def weights_of(base: Mapping[str, str]) -> set[str]:
    """Of the hashes of a base's files, those of the weights that are read."""
    return {base[name] for name in base_files.weights(base)}


def require_same_base(adapter_dir: Path, base_dir: Path, base: Mapping[str, str] | None = None) -> None:
    """Of the same weights that the adapter was trained on, where its manifest tells. `base`: their hashes, if known."""
    if not (adapter_dir / manifest.NAME).is_file():
        return
    if (trained_on := manifest.read(adapter_dir)["inputs"].get("base")) is None:
        return
    base = base or base_files.hashes(base_dir)
    if weights_of(trained_on) != weights_of(base):
        raise SaigaError(
            f"The adapter in {adapter_dir} was trained on other weights than those in {base_dir}. "
            "Give base_source as in 02_train, or train again."
        )
