"""Read from an adapter's manifest what an export must preserve or refuse."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

from saigakit.core import manifest
from saigakit.errors import SaigaError
from saigakit.registry import ModelSpec
from saigakit.weights import base_files
from saigakit.weights.merge import Into

SYSTEM_PROMPT_KEY = "saigakit.system_prompt"  # in a GGUF; llama.cpp has no key for it
MergeInto = Literal["auto", Into]
_DEFAULT_FORMAT = "float16"  # without a manifest: the format of Saiga's adapters and of a T4


class Lineage(NamedTuple):
    """How the adapters to merge were trained; the last manifest decides."""

    system_prompt: str | None  # of the training records, which may have none; without a manifest the model's own
    number_format: str
    into: Into
    folded_rank: int = 0  # this many first ranks were in the base when nf4 training quantised it

    @classmethod
    def read(cls, spec: ModelSpec, adapter_dirs: Sequence[Path], into: MergeInto) -> Self:
        """Resolve "auto" to what a single adapter was trained on: the dequantised base after nf4, else the original.

        Raises SaigaError for an adapter of another model, or one without an nf4 base to merge into.
        """
        if into not in get_args(MergeInto):
            raise SaigaError(f"merge_into={into!r} is unknown; use one of {', '.join(get_args(MergeInto))}.")
        system_prompt, number_format, folded_rank = spec.system_prompt, _DEFAULT_FORMAT, 0
        problems: list[str | None] = []
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
            raise SaigaError("merge_into='dequantized' needs an adapter: quantising the base alone only degrades it.")
        if into == "dequantized" and (problem := next(filter(None, problems), None)) is not None:
            raise SaigaError(f"{problem}. Use merge_into='original'.")
        return cls(system_prompt or None, number_format, into, folded_rank)


def _without_nf4_base(adapter_dir: Path, stage: Mapping[str, Any], spec: ModelSpec, *, is_alone: bool) -> str | None:
    """Why there is no dequantised base to merge the adapter into, or None if there is one."""
    trained = stage["parameters"]
    quantization_used = trained.get("quantization") or spec.quantization
    if quantization_used != "nf4":
        return (
            f"The adapter in {adapter_dir} was trained with quantization={quantization_used!r}, so there is no nf4 "
            "base to dequantise"
        )
    if trained.get("adapter") == "folded" and not (is_alone and stage.get("training", {}).get("folded_rank")):
        return (
            f"The adapter in {adapter_dir} was trained on a folded base, quantised with the released adapter in it, "
            "which can be reconstructed only for a single adapter whose manifest has a folded_rank"
        )
    return None


def training_records(adapter_dir: Path) -> dict[str, str]:
    """SHA-256 by name of the training records; empty without a manifest."""
    return dict(_inputs(adapter_dir).get("train") or {})


def weight_hashes(hashes: Mapping[str, str]) -> set[str]:
    """From `hashes` of a base's files, those of the weights."""
    return {hashes[name] for name in base_files.weight_files(hashes)}


def require_same_base(adapter_dir: Path, base_dir: Path, hashes: Mapping[str, str] | None = None) -> None:
    """Raises SaigaError if the adapter's manifest names other base weights. `hashes`: of `base_dir`, if known."""
    trained_on = _inputs(adapter_dir).get("base")
    if trained_on is not None and weight_hashes(trained_on) != weight_hashes(hashes or base_files.hashes(base_dir)):
        raise SaigaError(
            f"The adapter in {adapter_dir} was trained on other weights than those in {base_dir}. "
            "Give the base_source of 02_train, or train again."
        )


def _inputs(adapter_dir: Path) -> Mapping[str, Any]:
    has_manifest = (adapter_dir / manifest.NAME).is_file()
    return dict(manifest.read(adapter_dir)["inputs"]) if has_manifest else {}
