"""Parse parameters from YAML files and the command line."""

import json
from pathlib import Path
from typing import Any

import click

from saigakit.errors import SaigaError

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
        found = "is empty" if content is None else "holds a list" if isinstance(content, list) else "holds one value"
        raise SaigaError(f"{file} {found}; write lines of `name: value`.")
    return {str(name): value for name, value in content.items()}


PARAMETERS = click.option(
    "-p", "--parameter", "parameters", type=(str, parse_value), multiple=True, metavar="NAME VALUE",
    help="Set a parameter, overriding that of a file; repeatable",
)  # fmt: skip
MODEL = click.option("--model", required=True, help="Name in the registry, Hub id or directory")
NOTEBOOKS = click.option("--notebooks", help="Directory of the four notebooks, if saigakit is not run from a checkout")
