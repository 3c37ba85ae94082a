"""What a model, base_source or adapter parameter names into a local directory, from an attachment or the Hub."""

import glob
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from saigakit import definitions, examples, workspace
from saigakit.errors import SaigaError
from saigakit.models import ModelSpec

T = TypeVar("T")
_TOKENIZER_FILES = ("*.json", "*.model", "*.jinja")
_PACKAGED_RECORDS = "package:wordnet/"
_ADAPTER_FILES = (*_TOKENIZER_FILES, "adapter_model.*")
_PACKAGED: dict[str, Callable[[], Path]] = {
    "package:smollm2_135m": examples.smollm2_base,
    "package:saiga_tiny": lambda: examples.tiny_saiga() / "base",
}


def records_file(name: str, run_dir: str | Path | None = None) -> Path:
    """A file of records: a path, one inside `run_dir` or an attached input, or one of the demo's two."""
    if name.startswith(_PACKAGED_RECORDS):
        file = definitions.packaged_records() / name.removeprefix(_PACKAGED_RECORDS)
        if not file.is_file():
            raise SaigaError(f"{name!r} is not there; the demo has train.jsonl and held_out.jsonl.")
        return file
    return workspace.find_input(name, run_dir=run_dir)


def base_dir(spec: ModelSpec, base_source: str | None = None) -> Path:
    """A directory with config.json and weights. Raises SaigaError that says what to attach instead."""
    if base_source is not None:
        return _with_config(workspace.find_input(base_source))
    if spec.base_model in _PACKAGED:
        return _PACKAGED[spec.base_model]()
    if Path(spec.base_model).is_dir():
        return _with_config(Path(spec.base_model))
    return _from_hub(spec.base_model, (*_TOKENIZER_FILES, *_weight_files(spec.base_model)))


def tokenizer_dir(spec: ModelSpec, base_source: str | None = None) -> Path:
    """A directory with the tokenizer the model was trained with: the released adapter's where there is one."""
    if base_source is not None or spec.base_model in _PACKAGED or Path(spec.base_model).is_dir():
        return base_dir(spec, base_source)
    return _from_hub(spec.released_adapter or spec.base_model, _TOKENIZER_FILES)


def adapter_dir(spec: ModelSpec, adapter: str, run_dir: str | Path | None = None) -> Path:
    """A directory with adapter_config.json: "released", a path, a finished stage's name or a Hub id."""
    if not isinstance(adapter, str):
        raise SaigaError(f"adapter={adapter!r} is a {type(adapter).__name__}; give a path, a Hub id or None.")
    name = spec.released_adapter if adapter == "released" else adapter
    if name is None:
        raise SaigaError(f"{spec.name} has no released adapter; use adapter=None for a new LoRA.")
    if name == "package:saiga_tiny":
        return examples.tiny_saiga() / "adapter"
    is_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if is_hub_id and not _is_here(name, run_dir):
        return _from_hub(name, _ADAPTER_FILES)
    return _holding(
        workspace.find_input(name, run_dir=run_dir),
        "adapter_config.json",
        "is no LoRA adapter",
        "Give the directory that 02_train made, or one of peft's files.",
    )


def _is_here(name: str, run_dir: str | Path | None) -> bool:
    places = [Path(name), *([] if run_dir is None else [Path(run_dir) / name])]
    attached = (path for root in workspace.input_roots() for path in root.rglob(glob.escape(name)))
    return any(path.exists() for path in places) or any(attached)


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
    from huggingface_hub import HfApi
    from huggingface_hub.file_download import repo_folder_name

    # Not list_repo_files, which without a connection tries for 24 s.
    token = workspace.secret("HF_TOKEN")
    found = _asking_hub(repo, lambda: HfApi().model_info(repo, files_metadata=True, token=token))
    sizes = {file.rfilename: file.size or 0 for file in found.siblings or []}
    ending = ".safetensors" if any(name.endswith(".safetensors") for name in sizes) else ".bin"
    needed = sum(size for name, size in sizes.items() if name.endswith(ending))
    blobs = _hub_cache() / repo_folder_name(repo_id=repo, repo_type="model") / "blobs"
    there = sum(blob.stat().st_size for blob in blobs.glob("*"))
    workspace.require_disk(_hub_cache(), max(0, needed - there), f"Downloading {repo}")
    return (f"*{ending}",)


def _hub_cache() -> Path:
    return workspace.scratch_dir() / "hub"


def _from_hub(repo: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    return _asking_hub(
        repo,
        lambda: Path(
            snapshot_download(
                repo,
                allow_patterns=list(patterns),
                cache_dir=_hub_cache(),
                token=workspace.secret("HF_TOKEN"),
            )
        ),
    )


def _asking_hub(repo: str, ask: Callable[[], T]) -> T:
    # HTTPError is httpx's in huggingface_hub 1 and httpx2's in 2; no connection is one of these, and no OSError.
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        GatedRepoError,
        HTTPError,
        RepositoryNotFoundError,
    )

    attach = (
        "Or attach a copy as a Kaggle model or data set and give its directory as base_source "
        "(for an adapter: as adapter)."
    )
    try:
        return ask()
    except GatedRepoError:
        raise SaigaError(
            f"{repo} is gated: accept its licence on its Hub page and set the secret HF_TOKEN. {attach}"
        ) from None
    except RepositoryNotFoundError:
        raise SaigaError(f"{repo} is not on the Hub (any more), or HF_TOKEN may not see it. {attach}") from None
    except (HTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:300].rstrip(".:") or type(error).__name__
        raise SaigaError(
            f"{repo} could not be fetched from the Hub: {reason}. On Kaggle, switch Internet on. {attach}"
        ) from None
