"""YAML files and words of the command line into parameters, with a sentence for each mistake."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from saigakit.config import TrainConfig
from saigakit.errors import SaigaError, suggestion
from saigakit.registry import Lora

_WORDS = {"None": None, "True": True, "False": False}


def value(text: str) -> object:
    """As JSON or Python writes it; anything else is text."""
    if text in _WORDS:
        return _WORDS[text]
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_yaml(file: Path) -> dict[str, Any]:
    """A mapping of parameters. Raises SaigaError for anything else."""
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SaigaError(f"{file} is not there.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SaigaError(f"{file} cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        raise SaigaError(f"{file} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise SaigaError(f"{file} must hold lines of `name: value`, and it holds {_kind(content)}.")
    return {str(name): value for name, value in content.items()}


def _kind(content: object) -> str:
    return "nothing" if content is None else f"a {type(content).__name__}"


def train_config(values: Mapping[str, Any], source: str) -> TrainConfig:
    known = {item.name: item.default is MISSING for item in fields(TrainConfig)}
    for name in values:
        if name not in known:
            hint = suggestion(name, known)
            raise SaigaError(f"{source}: {name!r} is no setting of a training.{hint} There are: {', '.join(known)}.")
    if missing := [name for name, is_required in known.items() if is_required and name not in values]:
        raise SaigaError(f"{source}: {', '.join(missing)} must be given.")
    lora = values.get("lora")
    if isinstance(lora, dict):
        allowed = [item.name for item in fields(Lora)]
        if unknown := sorted(set(lora) - set(allowed)):
            raise SaigaError(f"{source}: lora has no {', '.join(unknown)}; it has {', '.join(allowed)}.")
        modules = {"target_modules": tuple(lora["target_modules"])} if "target_modules" in lora else {}
        return TrainConfig(**{**values, "lora": Lora(**{**lora, **modules})})
    return TrainConfig(**values)
