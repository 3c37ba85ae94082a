"""Select the files of a base model that are read, and hash them."""

import fnmatch
from collections.abc import Iterable
from pathlib import Path

from saigakit.core import manifest
from saigakit.core.files import sha256

WEIGHT_FORMATS = (  # index file and shard pattern; the first format found is read
    ("model.safetensors.index.json", "model*.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model*.bin"),
)
CONFIG_FILES = ("*.json", "*.model", "*.jinja")  # configs and the tokenizer


def weight_files(names: Iterable[str]) -> list[str]:
    """The weight files that are read: of one format, and none from subdirectories."""
    top = sorted(name for name in names if "/" not in name)
    for index, pattern in WEIGHT_FORMATS:
        if (found := fnmatch.filter(top, pattern)) or index in top:
            return found or fnmatch.filter(top, f"*{Path(pattern).suffix}")  # an index may name its shards differently
    return []


def hashes(directory: Path) -> dict[str, str]:
    """SHA-256 by name of weights, configs and tokenizer, without a second copy of the weights."""
    names = [file.name for file in directory.iterdir() if file.is_file()]
    configs = {name for pattern in CONFIG_FILES for name in fnmatch.filter(names, pattern)} - {manifest.NAME}
    return {name: sha256(directory / name) for name in sorted({*weight_files(names), *configs})}


def weight_bytes(directory: Path) -> int:
    return sum((directory / name).stat().st_size for name in weight_files(file.name for file in directory.iterdir()))
