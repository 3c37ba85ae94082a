"""The files of a base model by name: which of them are read, and their hashes."""

import fnmatch
from collections.abc import Iterable
from pathlib import Path

from saigakit.core import manifest
from saigakit.core.files import sha256

KINDS = (  # of weights: an index, and what the shards are called; the first that is there is read
    ("model.safetensors.index.json", "model*.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model*.bin"),
)
BESIDES = ("*.json", "*.model", "*.jinja")  # configs and the tokenizer


def weights(names: Iterable[str]) -> list[str]:
    """Those that hold the weights that are read: one kind, and nothing in directories below."""
    top = sorted(name for name in names if "/" not in name)
    for index, pattern in KINDS:
        if (found := fnmatch.filter(top, pattern)) or index in top:
            return found or fnmatch.filter(top, f"*{Path(pattern).suffix}")  # an index may call them otherwise
    return []


def hashes(directory: Path) -> dict[str, str]:
    """Name to SHA-256 of what comes of a base from the Hub: no second copy of the weights, no notes."""
    names = [file.name for file in directory.iterdir() if file.is_file()]
    besides = {name for pattern in BESIDES for name in fnmatch.filter(names, pattern)} - {manifest.NAME}
    return {name: sha256(directory / name) for name in sorted({*weights(names), *besides})}


def weight_bytes(directory: Path) -> int:
    return sum((directory / name).stat().st_size for name in weights(file.name for file in directory.iterdir()))
