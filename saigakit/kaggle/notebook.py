"""Prepare what Kaggle gets of a notebook: its metadata, and the notebook with its parameters."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saigakit import registry
from saigakit.config import TrainConfig, require_count, require_share, sequence_budget
from saigakit.errors import SaigaError, suggestion
from saigakit.llamacpp import quantization

METADATA = "kaggle-metadata"
KERNEL, DATASET = "kernel-metadata.json", "dataset-metadata.json"
# Kaggle's names; NvidiaTeslaT4 is the free one, and means two of them.
ACCELERATORS = ("NvidiaTeslaT4", "NvidiaL4", "NvidiaL4X1", "NvidiaTeslaA100", "NvidiaH100", "NvidiaRtxPro6000")
_ROOTS = (Path(METADATA), Path(__file__).parents[2] / METADATA)
_LONGEST_H = 11.5  # of a training, so that it is saved before a session of 12 hours ends
_LARGEST = 1_000_000  # bytes of a notebook that Kaggle accepts


def find_folder(stage: str | Path, name: str = KERNEL) -> Path:
    """The folder with metadata `name`: as given, or of kaggle-metadata here or in the repository of saigakit."""
    for folder in (Path(stage), *(root / stage for root in _ROOTS)):
        if (folder / name).is_file():
            return folder
    known = ", ".join(sorted({file.parent.name for root in _ROOTS for file in root.glob(f"*/{name}")}))
    there = f"Known: {known}." if known else f"Run this in a clone of saigakit, which has the directory {METADATA}."
    raise SaigaError(f"No {name} in {stage} or {_ROOTS[0] / stage}. {there}")


def is_dataset(name: str) -> bool:
    """Whether a folder of kaggle-metadata describes a data set rather than a notebook."""
    return name in ("wheels", "example-data") or any((root / name / DATASET).is_file() for root in (Path(), *_ROOTS))


def read_metadata(file: Path, owner: str) -> dict[str, Any]:
    """The metadata with `owner` in place of USERNAME."""
    text = file.read_text(encoding="utf-8").replace("USERNAME/", f"{owner}/")
    try:
        content: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise SaigaError(f"{file} is not JSON: {error}.") from None
    return content


def with_accelerator(content: dict[str, Any], accelerator: str | None) -> dict[str, Any]:
    """The metadata with another accelerator. Raises SaigaError for a TPU, which a pushed notebook silently lacks."""
    chosen = accelerator or content.get("machine_shape")
    if content.get("enable_tpu") or str(chosen).lower().startswith("tpu"):
        raise SaigaError("saigakit has no TPU support, and Kaggle gives a pushed notebook none. Use NvidiaTeslaT4.")
    if chosen is None:
        return content
    if chosen not in ACCELERATORS:
        raise SaigaError(
            f"accelerator {chosen!r} is unknown or retired.{suggestion(chosen, ACCELERATORS)} Use one of "
            f"{', '.join(ACCELERATORS)}; the first one is free."
        )
    return {**content, "enable_gpu": True, "machine_shape": chosen}


def render(notebook: Path, parameters: Mapping[str, object], target: Path) -> None:
    """Write the notebook with its parameters and without outputs. Raises SaigaError for what its stage would refuse."""
    if parameters:
        import papermill

        known = papermill.inspect_notebook(str(notebook))
        for name in sorted(set(parameters) - set(known)):
            hint = suggestion(name, known)
            raise SaigaError(f"{notebook.name} has no parameter {name}.{hint} It has {', '.join(known)}.")
        require_valid(notebook.stem, parameters)
        papermill.execute_notebook(
            str(notebook), str(target), parameters=dict(parameters), prepare_only=True, progress_bar=False
        )
    content = json.loads((target if parameters else notebook).read_text(encoding="utf-8"))
    content["metadata"].pop("papermill", None)  # contains paths of this machine
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = []
    target.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    if (size := target.stat().st_size) > _LARGEST:
        raise SaigaError(
            f"{notebook.name} has {size:,} bytes, and Kaggle accepts {_LARGEST:,}. Move what is long into a data set."
        )


def train_config(values: Mapping[str, Any]) -> TrainConfig:
    """Of the parameters of 02_train. Raises SaigaError if they are not valid."""
    ours = {name: value for name, value in values.items() if name != "run_dir"}
    return TrainConfig.from_json({"train_file": "-", "output_dir": "-", **ours}, "02_train")


def require_valid(stage: str, values: Mapping[str, Any]) -> None:
    """Raise SaigaError for values that `stage` would refuse after the wait for a machine."""
    values = {"model": "saiga2_7b", **values}
    for name, value in values.items():
        path = Path("" if name == "run_dir" else str(value))  # which is made there
        if (path.is_absolute() and path.parts[1] != "kaggle") or (name == "model" and path.is_dir()):
            raise SaigaError(f"{name}={value!r} is on this machine, and Kaggle does not have it; name one of the Hub.")
    if str(values["model"]).startswith("/kaggle/"):  # not here
        values["model"] = "saiga2_7b"
    spec = registry.find(values["model"])
    if stage == "02_train" and (hours := train_config(values).max_hours) > _LONGEST_H:
        raise SaigaError(f"max_hours={hours:g}: Kaggle kills a session at 12 hours. Take {_LONGEST_H} or less.")
    sequence_budget(spec, values.get("max_seq_length"))
    quantization.require_known(values.get("quant_type", "Q4_K_M"))
    require_share("eval_fraction", values.get("eval_fraction", 0.5))
    for name, least in (("max_examples", 1), ("quality_tokens", 0), ("n_gpu_layers", -1)):
        require_count(name, values.get(name, least), least=least)
