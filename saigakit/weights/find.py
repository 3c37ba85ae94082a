"""Find a base model, its tokenizer and an adapter: as a path, a Kaggle attachment or on the Hub."""

import glob
from collections.abc import Callable
from pathlib import Path

from saigakit.core import hub, workspace
from saigakit.demo import packages
from saigakit.errors import SaigaError
from saigakit.registry import MODELS, PINS, ModelSpec
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
    directory = _local_model(spec) if base_source is None else workspace.find_input(base_source)
    if directory is not None:
        remedy = "Give the directory of the original Hugging Face files (config.json, *.safetensors, the tokenizer)."
        return base_files.require_safe(_require_file(directory, "config.json", "is not a base model", remedy))
    configs = base_files.require_safe(_fetch(spec.base_model, spec.revision, base_files.CONFIG_FILES))
    _, sizes = hub.list_files(spec.base_model, revision=configs.name)
    weights = base_files.weight_files(sizes)
    hub.require_room(spec.base_model, "model", sum(sizes[name] for name in weights))
    return _fetch(spec.base_model, configs.name, (*base_files.CONFIG_FILES, *map(glob.escape, weights)))


def tokenizer_dir(spec: ModelSpec, base_source: str | None = None) -> Path:
    """A directory with the tokenizer of training: that of the released adapter, if there is one."""
    if base_source is not None or spec.base_model in _PACKAGED or _local_model(spec) is not None:
        return base_dir(spec, base_source)
    return _fetch(spec.released_adapter or spec.base_model, spec.revision, base_files.CONFIG_FILES)


def _local_model(spec: ModelSpec) -> Path | None:
    """The directory that `model` names; none replaces a repository that the registry names."""
    directory = Path(spec.base_model)
    is_repository = spec.revision is not None or (spec.name in MODELS and hub.is_hub_id(spec.base_model))
    return None if is_repository or not directory.is_dir() else _reported(spec.base_model, directory)


def _reported(name: str, found: Path) -> Path:
    """`found`, which is printed if `name` could mean a repository."""
    if hub.is_hub_id(name):
        hub.print_once(f"{name} is {found.absolute()}; for the repository on the Hub write {name}@main.")
    return found


def _fetch(repo: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """`revision`: None for the commit in PINS, or else main."""
    commit, recorded = PINS.get(repo, (None, {}))
    return hub.snapshot(repo, patterns, "model", revision or commit, recorded if revision in (None, commit) else {})


def tokenizer_files(directory: Path) -> list[Path]:
    """The files that the token ids of a prompt depend on."""
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
    repo, _, revision = name.partition("@")
    if hub.is_hub_id(repo) and (name == spec.released_adapter or revision or not workspace.is_local(name, run_dir)):
        return _fetch(repo, revision or None, _ADAPTER_FILES)
    problem = "is not a LoRA adapter", "Give the directory that 02_train made, or a LoRA adapter of peft."
    return _require_file(_reported(name, workspace.find_input(name, run_dir=run_dir)), "adapter_config.json", *problem)


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
