"""Parse parameters from YAML files and the command line."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from saigakit.config import TrainConfig
from saigakit.errors import SaigaError, suggestion
from saigakit.registry import Lora

_PYTHON_LITERALS = {"None": None, "True": True, "False": False}


def parse_value(text: str) -> object:
    """Parse JSON or a Python literal; anything else is text."""
    if text in _PYTHON_LITERALS:
        return _PYTHON_LITERALS[text]
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_yaml(file: Path) -> dict[str, Any]:
    """Raises SaigaError if the file is not a mapping."""
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SaigaError(f"{file} does not exist.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SaigaError(f"{file} cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        raise SaigaError(f"{file} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        found = "is empty" if content is None else f"holds a {type(content).__name__}"
        raise SaigaError(f"{file} {found}; write lines of `name: value`.")
    return {str(name): value for name, value in content.items()}


def train_config(values: Mapping[str, Any], source: str) -> TrainConfig:
    """Raises SaigaError for unknown and missing settings; `source` names their file."""
    known = {item.name: item.default is MISSING for item in fields(TrainConfig)}
    for name in values:
        if name not in known:
            hint = suggestion(name, known)
            raise SaigaError(f"{source}: unknown setting {name!r}.{hint} Known settings: {', '.join(known)}.")
    if missing := [name for name, is_required in known.items() if is_required and name not in values]:
        raise SaigaError(f"{source}: {' and '.join(missing)} must be set.")
    lora = values.get("lora")
    if isinstance(lora, dict):
        allowed = [item.name for item in fields(Lora)]
        if unknown := sorted(set(lora) - set(allowed)):
            raise SaigaError(f"{source}: unknown lora settings {', '.join(unknown)}. Known: {', '.join(allowed)}.")
        return TrainConfig(**{**values, "lora": Lora.from_json(lora)})
    return TrainConfig(**values)
