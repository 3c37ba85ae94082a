"""Find a base model, its tokenizer and an adapter: as a path, a Kaggle attachment or on the Hub."""

import glob
from collections.abc import Callable
from pathlib import Path

from saigakit.core import hub, workspace
from saigakit.demo import packages
from saigakit.errors import SaigaError
from saigakit.registry import ModelSpec
from saigakit.weights import base_files

IDS_DEPEND_ON = (  # files of a tokenizer
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_ADAPTER_FILES = (*base_files.CONFIG_FILES, "adapter_model.*")
_PACKAGED: dict[str, Callable[[], Path]] = {
    "package:smollm2_135m": packages.smollm2_base,
    "package:saiga_tiny": lambda: packages.tiny_saiga() / "base",
}


def base_dir(spec: ModelSpec, base_source: str | None = None) -> Path:
    """A directory with config.json and weights. Raises SaigaError saying what to attach."""
    if base_source is None and spec.base_model in _PACKAGED:
        return _PACKAGED[spec.base_model]()
    if base_source is not None or Path(spec.base_model).is_dir():
        directory = Path(spec.base_model) if base_source is None else workspace.find_input(base_source)
        remedy = "Give the directory of the original Hugging Face files (config.json, *.safetensors, the tokenizer)."
        return _require_file(directory, "config.json", "is not a base model", remedy)
    _, sizes = hub.list_files(spec.base_model)
    weights = base_files.weight_files(sizes)
    hub.require_room(spec.base_model, "model", sum(sizes[name] for name in weights))
    return hub.snapshot(spec.base_model, (*base_files.CONFIG_FILES, *map(glob.escape, weights)))


def tokenizer_dir(spec: ModelSpec, base_source: str | None = None) -> Path:
    """A directory with the tokenizer of training: that of the released adapter, if there is one."""
    if base_source is not None or spec.base_model in _PACKAGED or Path(spec.base_model).is_dir():
        return base_dir(spec, base_source)
    return hub.snapshot(spec.released_adapter or spec.base_model, base_files.CONFIG_FILES)


def tokenizer_files(spec: ModelSpec, base_source: str | None = None) -> list[Path]:
    """The files of `tokenizer_dir` that the token ids of a prompt depend on."""
    directory = tokenizer_dir(spec, base_source)
    return [directory / name for name in IDS_DEPEND_ON if (directory / name).is_file()]


def adapter_dir(spec: ModelSpec, adapter: str, run_dir: str | Path | None = None) -> Path:
    """A directory with adapter_config.json for "released", a path, the name of a finished stage or a Hub id."""
    if not isinstance(adapter, str):
        raise SaigaError(f"adapter={adapter!r} is not text; give a path or a Hub id, or leave it out.")
    name = spec.released_adapter if adapter == "released" else adapter
    if name is None:
        raise SaigaError(f"{spec.name} has no released adapter; leave adapter out.")
    if name == "package:saiga_tiny":
        return packages.tiny_saiga() / "adapter"
    if hub.is_hub_id(name) and not workspace.is_local(name, run_dir):
        return hub.snapshot(name, _ADAPTER_FILES)
    problem = "is not a LoRA adapter", "Give the directory that 02_train made, or a LoRA adapter of peft."
    return _require_file(workspace.find_input(name, run_dir=run_dir), "adapter_config.json", *problem)


def _require_file(directory: Path, name: str, problem: str, remedy: str) -> Path:
    """`directory`, or its only subdirectory with the file: Kaggle mounts a model under its version number."""
    if (directory / name).is_file():
        return directory
    below = sorted(file.parent for file in directory.rglob(name))
    if len(below) == 1:
        return below[0]
    if below:
        raise SaigaError(f"{directory} contains more than one {name}: give one of {', '.join(map(str, below))}.")
    raise SaigaError(f"{directory} {problem}: it has no {name}. {remedy}")
