"""Select the files of a base model that are read, check its configs and hash them."""

import fnmatch
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from saigakit.core import hub, manifest
from saigakit.errors import SaigaError

WEIGHT_FORMATS = (  # index file and shard pattern; the first format found is read
    ("model.safetensors.index.json", "model*.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model*.bin"),
)
CONFIG_FILES = ("*.json", "*.model", "*.jinja")  # configs and the tokenizer
_REFUSED = ("auto_map", "custom_pipelines", "transformers_weights")  # code, and other weights than an export reads
_IMPLEMENTATIONS = (None, "eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm")  # those inside transformers
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?(:[\w.-]+)?")  # also as a kernel: owner/name@revision:function
_ONLY_NAMES = (
    "name_or_path",
    "model_name",
    "tokenizer_name",
    "base_model",
    "license",
    "datasets",
    "created",
)  # ends of keys that nothing is fetched for


def weight_files(names: Iterable[str]) -> list[str]:
    """The weight files that are read: of one format, and none from subdirectories."""
    top = sorted(name for name in names if "/" not in name)
    for index, pattern in WEIGHT_FORMATS:
        if (found := fnmatch.filter(top, pattern)) or index in top:
            return found or fnmatch.filter(top, f"*{Path(pattern).suffix}")  # an index may name its shards differently
    return []


def require_safe(base_dir: Path) -> Path:
    """`base_dir`. Raises SaigaError if transformers would fetch or run code for it, or load something else."""
    if (base_dir / "adapter_config.json").is_file():
        raise SaigaError(
            f"{base_dir} contains adapter_config.json next to a base model: transformers would attach it, an export "
            "would not. Merge it first, or move it to another directory and give that as adapter."
        )
    for file in (base_dir / f"{kind}config.json" for kind in ("", "generation_", "tokenizer_")):
        for key, value in _settings(read_json(file)) if file.is_file() else ():
            if _is_unsafe(key, value) and (key in _REFUSED or not file.name.startswith("tokenizer")):
                raise SaigaError(
                    f"{file}: {key}={str(value)[:80]!r} can make transformers fetch or run code, or load other weights."
                    " Give the original model, or a copy without this key if you know that it is not needed."
                )
    return base_dir


def _settings(value: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Every key with its value, at any depth; the elements of a list have its key."""
    yield key, value
    elements = [(key, each) for each in value] if isinstance(value, list) else []
    for name, each in value.items() if isinstance(value, dict) else elements:
        yield from _settings(each, name)


def _is_unsafe(key: str, value: object) -> bool:
    if re.search(r"(attn|experts)_implementation", key) and not isinstance(value, bool):
        return any(each not in _IMPLEMENTATIONS for each in (value.values() if isinstance(value, dict) else [value]))
    if key in ("quantization_config", "compression_config") and value:
        return not isinstance(value, dict) or value.get("quant_method") != "bitsandbytes"
    is_repository = isinstance(value, str) and _REPOSITORY.fullmatch(value) and not key.endswith(_ONLY_NAMES)
    return bool(is_repository or (key in _REFUSED and value))


def read_json(file: Path, default: Any = None) -> Any:  # noqa: ANN401
    """`default`: for a file that need not exist."""
    if default is not None and not file.is_file():
        return default
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(file, str(error)) from None


def damaged(file: Path, reason: str) -> SaigaError:
    return SaigaError(f"{file} is missing or damaged ({reason}). Download or attach it again.")


def hashes(directory: Path) -> dict[str, str]:
    """SHA-256 by name of weights, configs and tokenizer, without a second copy of the weights."""
    names = [file.name for file in directory.iterdir() if file.is_file()]
    configs = {name for pattern in CONFIG_FILES for name in fnmatch.filter(names, pattern)} - {manifest.NAME}
    return {name: hub.verified_sha256(directory / name) for name in sorted({*weight_files(names), *configs})}


def weight_bytes(directory: Path) -> int:
    return sum((directory / name).stat().st_size for name in weight_files(file.name for file in directory.iterdir()))
