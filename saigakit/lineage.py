"""What an adapter's manifest says of its training into what an export must keep or refuse."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from saigakit import manifest
from saigakit.errors import SaigaError
from saigakit.merge import Into
from saigakit.models import ModelSpec

SYSTEM_PROMPT_KEY = "saigakit.system_prompt"  # in a GGUF, no key of llama.cpp's: what a conversation begins with
_WEIGHTS = (".safetensors", ".bin")
_UNTOLD_FORMAT = "float16"  # of a training that left no manifest: Saiga's adapters and a T4's are of it


@dataclass(frozen=True)
class Lineage:
    """Of the adapters that are merged; the last one that tells decides."""

    system_prompt: str | None  # that of the training records, else the model's own
    number_format: str

    @classmethod
    def of(cls, spec: ModelSpec, adapter_dirs: Sequence[Path], into: Into) -> Self:
        """Raises SaigaError for an adapter of another model, or one that has no nf4 base to be merged into."""
        system_prompt, number_format = spec.system_prompt, _UNTOLD_FORMAT
        for adapter_dir in adapter_dirs:
            if (adapter_dir / manifest.NAME).is_file():
                trained = manifest.require_stage(adapter_dir, "02_train", model=spec.name)
                system_prompt = trained.get("system_prompt") or system_prompt
                number_format = trained.get("number_format") or number_format
                _require_mergeable_into(into, adapter_dir, trained["parameters"], spec)
        return cls(system_prompt, number_format)


def _require_mergeable_into(into: Into, adapter_dir: Path, trained: Mapping[str, Any], spec: ModelSpec) -> None:
    """The dequantised base is that of a training in nf4 on the base itself."""
    if into == "original":
        return
    quantization_used = trained.get("quantization") or spec.quantization
    if quantization_used != "nf4":
        raise SaigaError(
            f"The adapter in {adapter_dir} was trained with quantization={quantization_used!r}, so there is no nf4 "
            "base to dequantise. Use merge_into='original'."
        )
    if trained.get("adapter") == "folded":
        raise SaigaError(
            f"The adapter in {adapter_dir} was trained on a folded base, which was quantised with the released adapter "
            "in it. Use merge_into='original'."
        )


def require_same_base(adapter_dir: Path, base_dir: Path, base: Mapping[str, str]) -> None:
    """Of the same weights that the adapter was trained on, where its manifest tells."""
    if not (adapter_dir / manifest.NAME).is_file():
        return
    trained_on = manifest.read(adapter_dir)["inputs"].get("base", base)
    weights = [{digest for name, digest in files.items() if name.endswith(_WEIGHTS)} for files in (trained_on, base)]
    if weights[0] != weights[1]:
        raise SaigaError(
            f"The adapter in {adapter_dir} was trained on other weights than those in {base_dir}. "
            "Give base_source as in 02_train, or train again."
        )
