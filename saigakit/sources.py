"""What a model, base_source or adapter parameter names into a local directory, from an attachment or the Hub."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from saigakit import examples, workspace
from saigakit.errors import SaigaError
from saigakit.models import ModelSpec

T = TypeVar("T")
_TOKENIZER_FILES = ("*.json", "*.model", "*.jinja")
_ADAPTER_FILES = (*_TOKENIZER_FILES, "adapter_model.*")
_PACKAGED: dict[str, Callable[[], Path]] = {
    "package:smollm2_135m": examples.smollm2_base,
    "package:saiga_tiny": lambda: examples.tiny_saiga() / "base",
}


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
    name = spec.released_adapter if adapter == "released" else adapter
    if name is None:
        raise SaigaError(f"{spec.name} has no released adapter; use adapter=None for a new LoRA.")
    if name == "package:saiga_tiny":
        return examples.tiny_saiga() / "adapter"
    is_hub_id = name.count("/") == 1 and not name.startswith((".", "/"))
    if is_hub_id and not Path(name).exists():
        directory = _from_hub(name, _ADAPTER_FILES)
    else:
        directory = workspace.find_input(name, run_dir=run_dir)
    if not (directory / "adapter_config.json").is_file():
        raise SaigaError(f"{directory} is no LoRA adapter: it has no adapter_config.json. Run 02_train first.")
    return directory


def _with_config(directory: Path) -> Path:
    if not (directory / "config.json").is_file():
        raise SaigaError(
            f"{directory} is no base model: it has no config.json. base_source must name the directory "
            "of the original Hugging Face files (config.json, *.safetensors, the tokenizer)."
        )
    return directory


def _weight_files(repo: str) -> tuple[str, ...]:
    from huggingface_hub import HfApi

    names = _asking_hub(repo, lambda: HfApi().list_repo_files(repo, token=workspace.secret("HF_TOKEN")))
    return ("*.safetensors",) if any(name.endswith(".safetensors") for name in names) else ("*.bin",)


def _from_hub(repo: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    return _asking_hub(
        repo,
        lambda: Path(
            snapshot_download(
                repo,
                allow_patterns=list(patterns),
                cache_dir=workspace.scratch_dir() / "hub",
                token=workspace.secret("HF_TOKEN"),
            )
        ),
    )


def _asking_hub(repo: str, ask: Callable[[], T]) -> T:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
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
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise SaigaError(
            f"{repo} could not be fetched from the Hub: {reason}. On Kaggle, switch Internet on. {attach}"
        ) from None
