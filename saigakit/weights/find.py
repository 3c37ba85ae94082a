"""Find a base model, its tokenizer and an adapter: here, attached or on the Hub."""

import glob
from collections.abc import Callable
from pathlib import Path

from saigakit.core import hub, workspace
from saigakit.demo import packages
from saigakit.errors import SaigaError
from saigakit.registry import ModelSpec
from saigakit.weights import base_files

_TOKENIZER_FILES = base_files.BESIDES
_IDS_DEPEND_ON = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_ADAPTER_FILES = (*_TOKENIZER_FILES, "adapter_model.*")
_PACKAGED: dict[str, Callable[[], Path]] = {
    "package:smollm2_135m": packages.smollm2_base,
    "package:saiga_tiny": lambda: packages.tiny_saiga() / "base",
}


def base_dir(spec: ModelSpec, base_source: str | None = None) -> Path:
    """A directory with config.json and weights. Raises SaigaError that says what to attach instead."""
    if base_source is not None:
        return _with_config(workspace.find_input(base_source))
    if spec.base_model in _PACKAGED:
        return _PACKAGED[spec.base_model]()
    if Path(spec.base_model).is_dir():
        return _with_config(Path(spec.base_model))
    return hub.snapshot(spec.base_model, (*_TOKENIZER_FILES, *_weight_files(spec.base_model)))


def tokenizer_dir(spec: ModelSpec, base_source: str | None = None) -> Path:
    """A directory with the tokenizer the model was trained with: the released adapter's where there is one."""
    if base_source is not None or spec.base_model in _PACKAGED or Path(spec.base_model).is_dir():
        return base_dir(spec, base_source)
    return hub.snapshot(spec.released_adapter or spec.base_model, _TOKENIZER_FILES)


def tokenizer_files(spec: ModelSpec, base_source: str | None = None) -> list[Path]:
    """What of `tokenizer_dir` the ids of a prompt depend on."""
    directory = tokenizer_dir(spec, base_source)
    return [directory / name for name in _IDS_DEPEND_ON if (directory / name).is_file()]


def adapter_dir(spec: ModelSpec, adapter: str, run_dir: str | Path | None = None) -> Path:
    """A directory with adapter_config.json: "released", a path, a finished stage's name or a Hub id."""
    if not isinstance(adapter, str):
        raise SaigaError(f"adapter={adapter!r} is a {type(adapter).__name__}; give a path, a Hub id or None.")
    name = spec.released_adapter if adapter == "released" else adapter
    if name is None:
        raise SaigaError(f"{spec.name} has no released adapter; use adapter=None for a new LoRA.")
    if name == "package:saiga_tiny":
        return packages.tiny_saiga() / "adapter"
    is_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if is_hub_id and not workspace.is_local(name, run_dir):
        return hub.snapshot(name, _ADAPTER_FILES)
    return _holding(
        workspace.find_input(name, run_dir=run_dir),
        "adapter_config.json",
        "is no LoRA adapter",
        "Give the directory that 02_train made, or one of peft's files.",
    )


def _with_config(directory: Path) -> Path:
    return _holding(
        directory,
        "config.json",
        "is no base model",
        "Give the directory of the original Hugging Face files (config.json, *.safetensors, the tokenizer).",
    )


def _holding(directory: Path, marker: str, problem: str, remedy: str) -> Path:
    """`directory`, or the only one below it that holds the file `marker`: Kaggle mounts a model under its version."""
    if (directory / marker).is_file():
        return directory
    below = sorted(file.parent for file in directory.rglob(marker))
    if len(below) == 1:
        return below[0]
    if below:
        raise SaigaError(f"{directory} holds more than one {marker}: name one of {', '.join(map(str, below))}.")
    raise SaigaError(f"{directory} {problem}: it has no {marker}. {remedy}")


def _weight_files(repo: str) -> tuple[str, ...]:
    """One kind of weights. Raises SaigaError where the disk has no room for what of them is not there yet."""
    sizes = hub.file_sizes(repo)
    names = base_files.weights(sizes)
    hub.require_room(repo, "model", sum(sizes[name] for name in names))
    return tuple(map(glob.escape, names))
