"""Rows and texts into the Markdown of a model card, and a licence into the Hub's name for it."""

from collections.abc import Iterable

# The names that the Hub has for licences: https://huggingface.co/docs/hub/repositories-licenses
_LICENCES = ("apache-2.0", "mit", "llama2", "llama3", "gemma")


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = [_cell(name) for name in header]
    lines = [names, ["---"] * len(names), *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def code(text: str) -> str:
    return f"`{' '.join(text.split()).replace('`', chr(39))}`"


def block(text: str, language: str = "") -> str:
    return f"```{language}\n{text.replace('```', '` ` `').rstrip()}\n```"


def licence(name: str) -> dict[str, str]:
    """What the Hub's metadata say of a licence."""
    if name in _LICENCES:
        return {"license": name}
    return {"license": "other", "license_name": name} if name else {}
