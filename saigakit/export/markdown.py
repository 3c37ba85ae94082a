"""Build the model cards of adapters and GGUF files in Markdown, with the metadata that the Hub reads."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from saigakit.core import hub
from saigakit.core.display import Table
from saigakit.core.files import sha256_of_text
from saigakit.registry import ModelSpec

# The Hub's names for licences: https://huggingface.co/docs/hub/repositories-licenses
_LICENCES = ("apache-2.0", "mit", "llama2", "llama3", "gemma")


class Card(NamedTuple):
    """What the cards of adapters and of GGUF files have in common."""

    spec: ModelSpec
    title: str
    library: str
    tags: Sequence[str]
    chat_template: str
    system_prompt: str | None
    versions: Mapping[str, str]
    relation: str = ""  # to the base model, as the Hub names it

    def text(self, english: str, russian: str, sections: Mapping[str, str]) -> str:
        """The complete card: two introductions, `sections` by their headings, the prompt and the versions."""
        licence, digest = self.spec.licence, sha256_of_text(self.chat_template)
        prompt = [f"Chat template (SHA-256 `{digest}`):", block(self.chat_template, "jinja")]
        if self.system_prompt:
            prompt.append(f"System prompt: {code(self.system_prompt)}")
        parts = [
            f"---\n{metadata(self.spec, self.library, self.tags, self.relation)}\n---\n# {plain(self.title)}",
            f"{english} The licence of the base model ({licence or 'see its page'}) applies.",
            f"{russian} Всё измерено автором, независимой проверки не было. Модель может ошибаться. Действует лицензия "
            f"базовой модели: {licence or 'см. её страницу'}.",
            *(f"## {heading}\n\n{text.strip()}" for heading, text in sections.items()),
            "## Prompt",
            *prompt,
            f"## Versions\n\n{table(('package', 'version'), self.versions.items())}",
        ]
        return "\n\n".join(parts) + "\n"


def metadata(spec: ModelSpec, library: str, tags: Sequence[str], relation: str = "") -> str:
    """YAML, of which JSON values are a part. The Hub refuses a base model that it does not have."""
    values: dict[str, Any] = {"language": ["ru"], "library_name": library, "pipeline_tag": "text-generation"}
    if spec.licence in _LICENCES:
        values["license"] = spec.licence
    elif spec.licence:
        values |= {"license": "other", "license_name": spec.licence}
    if hub.is_hub_id(spec.base_model):
        values |= {"base_model": spec.base_model} | ({"base_model_relation": relation} if relation else {})
    values["tags"] = tags
    return "\n".join(f"{name}: {json.dumps(value)}" for name, value in values.items())


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = [_cell(name) for name in header]
    lines = [names, ["---"] * len(names), *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def of_table(shown: Table) -> str:
    return f"{table(map(plain, shown.header), (map(plain, row) for row in shown.rows))}\n\n{plain(shown.note)}\n"


def _cell(text: str) -> str:
    return re.sub(r"\\*\|", r"\\|", " ".join(text.split()))  # a backslash before it would cancel the escape


def plain(text: str) -> str:
    """One line in which nothing is Markdown or HTML."""
    return re.sub(r"([\\`*\[\]<>&])", r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    line, fence = " ".join(text.split()), _fence(text, 1)
    return f"{fence} {line} {fence}" if "`" in line else f"`{line}`"


def block(text: str, language: str = "") -> str:
    return f"{(fence := _fence(text, 3))}{language}\n{text.rstrip()}\n{fence}"


def _fence(text: str, least: int) -> str:
    """More backticks than `text` has in a row."""
    return "`" * max(least, *(len(found) + 1 for found in re.findall("`+|$", text)))


def linked(name: str) -> str:
    """A model as a link to its page on the Hub, or the name of its directory."""
    return f"[{name}](https://huggingface.co/{name})" if hub.is_hub_id(name) else code(Path(name).name)
