"""A stage's directory with a manifest: made beside, renamed when complete, kept when nothing changed."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from saigakit.errors import SaigaError

NAME = "saigakit.json"
_PACKAGES = (
    "saigakit",
    "tokenizers",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "gguf",
    "llama-cpp-python",
)
Manifest = dict[str, Any]


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hashes(path: Path) -> dict[str, str]:
    """Relative path to SHA-256 of every file under a directory, the manifest itself left out; or of one file."""
    if path.is_file():
        return {path.name: sha256(path)}
    files = sorted(item for item in path.rglob("*") if item.is_file() and item.name != NAME)
    return {item.relative_to(path).as_posix(): sha256(item) for item in files}


def read(directory: Path) -> Manifest:
    """Raises SaigaError where there is no manifest or it is damaged."""
    file = directory / NAME
    if not file.is_file():
        raise SaigaError(f"{directory} has no {NAME}: it is not the finished output of a stage.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SaigaError(f"{file} is damaged ({error}); run the stage again.") from None
    if not isinstance(content, dict):
        raise SaigaError(f"{file} is damaged: not a JSON object; run the stage again.")
    return content


def require_stage(directory: Path, stage: str) -> Manifest:
    """The manifest of `stage`, its outputs present. Raises SaigaError that names the notebook to run first."""
    if not directory.is_dir():
        raise SaigaError(f"{directory} is not there: run {stage} first.")
    content = read(directory)
    if content.get("stage") != stage:
        raise SaigaError(f"{directory} was made by {content.get('stage')}, and {stage} is needed here.")
    missing = [name for name in content["outputs"] if not (directory / name).is_file()]
    if missing:
        raise SaigaError(f"{directory} lost {', '.join(missing)}; run {stage} again.")
    return content


def versions() -> dict[str, str]:
    found = {dist.metadata["Name"].lower(): dist.version for dist in metadata.distributions()}
    return {name: found[name] for name in _PACKAGES if name in found}


def _identity(stage: str, parameters: Mapping[str, Any], inputs: Mapping[str, Any]) -> Manifest:
    return json.loads(json.dumps({"stage": stage, "parameters": parameters, "inputs": inputs}, default=str))  # type: ignore[no-any-return]


def is_kept(final: Path, *, stage: str, parameters: Mapping[str, Any], inputs: Mapping[str, Any]) -> bool:
    """True if `final` is complete and was made of the same things; False if it is not there.

    Raises SaigaError when it is there and was made of something else, or is damaged: nothing is overwritten.
    """
    if not final.exists():
        return False
    content = require_stage(final, stage)
    wanted = _identity(stage, parameters, inputs)
    differing = [
        f"{key}: {content[part].get(key)!r} there, {wanted[part].get(key)!r} now"
        for part in ("parameters", "inputs")
        for key in {**content[part], **wanted[part]}
        if content[part].get(key) != wanted[part].get(key)
    ]
    if differing:
        raise SaigaError(
            f"{final} exists and was made differently ({'; '.join(differing)}). "
            "Delete it, rename it or choose another run_dir."
        )
    damaged = [name for name, digest in content["outputs"].items() if sha256(final / name) != digest]
    if damaged:
        raise SaigaError(
            f"{final}: {', '.join(damaged)} changed since it was made; delete the directory and run again."
        )
    print(f"{stage}: {final} is complete and made of the same inputs and parameters: kept.")
    return True


@contextmanager
def making(
    final: Path,
    *,
    stage: str,
    parameters: Mapping[str, Any],
    inputs: Mapping[str, Any],
    facts: Mapping[str, Any] | None = None,
) -> Iterator[Path]:
    """A directory beside `final` to write into; on success it gets its manifest and the final name.

    A directory left by a killed run is emptied first; on an error nothing bears the final name.
    """
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    content = _identity(stage, parameters, inputs)
    content |= {**(facts or {}), "versions": versions(), "outputs": hashes(partial)}
    write_text(partial / NAME, json.dumps(content, ensure_ascii=False, indent=2, default=str))
    if final.exists():
        raise SaigaError(f"{final} appeared while {partial} was written; nothing was overwritten.")
    partial.rename(final)


def write_text(file: Path, text: str) -> Path:
    """Written beside, flushed to disk and renamed, so that `file` is whole or absent."""
    beside = file.with_name(f".{file.name}.partial")
    with beside.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(file)
    return file
