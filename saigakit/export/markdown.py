"""Rows and texts into the Markdown of a model card, and a model into the metadata that the Hub reads there."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from saigakit.core import hub
from saigakit.core.display import Table
from saigakit.registry import ModelSpec

# The names that the Hub has for licences: https://huggingface.co/docs/hub/repositories-licenses
_LICENCES = ("apache-2.0", "mit", "llama2", "llama3", "gemma")


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = [_cell(name) for name in header]
    lines = [names, ["---"] * len(names), *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def of_table(shown: Table) -> str:
    return f"{table(shown.header, shown.rows)}\n\n{shown.note}\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def code(text: str) -> str:
    return f"`{' '.join(text.split()).replace('`', chr(39))}`"


def block(text: str, language: str = "") -> str:
    return f"```{language}\n{text.replace('```', '` ` `').rstrip()}\n```"


def linked(name: str) -> str:
    """A model by its page on the Hub, or by the name of its directory."""
    return f"[{name}](https://huggingface.co/{name})" if hub.is_hub_id(name) else code(Path(name).name)


def metadata(spec: ModelSpec, library: str, tags: Sequence[str], **of_base: str) -> str:
    """YAML, which JSON is too; the Hub refuses a base model that is not there, and so `of_base` is left out with it."""
    values: dict[str, Any] = {"language": ["ru"], "library_name": library, "pipeline_tag": "text-generation"}
    values |= licence(spec.licence)
    if hub.is_hub_id(spec.base_model):
        values |= {"base_model": spec.base_model, **of_base}
    values["tags"] = tags
    return "\n".join(f"{name}: {json.dumps(value)}" for name, value in values.items())


def licence(name: str) -> dict[str, str]:
    """What the Hub's metadata say of a licence."""
    if name in _LICENCES:
        return {"license": name}
    return {"license": "other", "license_name": name} if name else {}
