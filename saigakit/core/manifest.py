"""A stage's directory with a manifest: made beside, renamed when complete, kept when nothing changed."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from saigakit.core.files import discard_partial, sha256, write_text
from saigakit.errors import SaigaError

NAME = "saigakit.json"
_REPLACE = "SAIGAKIT_REPLACE"
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


def hashes(path: Path) -> dict[str, str]:
    """Relative path to SHA-256 of every file under a directory, the manifest itself left out; or of one file."""
    if path.is_file():
        return {path.name: sha256(path)}
    files = sorted(item for item in path.rglob("*") if item.is_file() and item.name != NAME)
    return {item.relative_to(path).as_posix(): sha256(item) for item in files}


def beside(file: Path) -> Path:
    """The manifest of a single file that is no stage's."""
    return file.with_name(f"{file.stem}.{NAME}")


def read(directory: Path) -> Manifest:
    """Raises SaigaError where there is no manifest or it is damaged."""
    return _read(directory / NAME, f"{directory} has no {NAME}: it is not the finished output of a stage.")


def read_beside(file: Path) -> Manifest:
    """Of a single file. Raises SaigaError where there is no manifest or it is damaged."""
    place = beside(file)
    absent = f"{file} has no {place.name} beside it, which `saigakit export` writes for the first file that it makes."
    return _read(place, absent)


def _read(file: Path, absent: str) -> Manifest:
    if not file.is_file():
        raise SaigaError(absent)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SaigaError(f"{file} is damaged ({error}); run the stage again.") from None
    if not isinstance(content, dict) or not content.keys() >= {"stage", "parameters", "inputs", "outputs"}:
        raise SaigaError(f"{file} is damaged: it is no manifest of a stage; run the stage again.")
    return content


def require_stage(directory: Path, stage: str, *, model: str | None = None) -> Manifest:
    """The manifest of `stage`, made for `model` and its outputs present.

    Raises SaigaError that names the notebook to run first, or both models.
    """
    if not directory.is_dir():
        raise SaigaError(f"{directory} is not there: run {stage} first.")
    content = read(directory)
    if content.get("stage") != stage:
        raise SaigaError(f"{directory} was made by {content.get('stage')}, and {stage} is needed here.")
    made_for = content["parameters"].get("model")
    if model is not None and made_for != model:
        raise SaigaError(
            f"{directory} was made for model={made_for!r}, and this run is of model={model!r}. "
            f"Use one model in all four notebooks, or another run_dir."
        )
    missing = [name for name in content["outputs"] if not (directory / name).is_file()]
    if missing:
        raise SaigaError(f"{directory} lost {', '.join(missing)}; run {stage} again.")
    return content


def versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _identity(stage: str, parameters: Mapping[str, Any], inputs: Mapping[str, Any]) -> Manifest:
    return json.loads(json.dumps({"stage": stage, "parameters": parameters, "inputs": inputs}, default=str))  # type: ignore[no-any-return]


def is_kept(
    final: Path,
    *,
    stage: str,
    parameters: Mapping[str, Any],
    inputs: Mapping[str, Any],
    is_derived: bool = False,
) -> bool:
    """True if `final` is complete and was made of the same things; False if it is not there.

    Raises SaigaError when it is there and was made of something else, or is damaged: nothing is overwritten.
    With SAIGAKIT_REPLACE=1, as the runner sets it, that is said and the stage is made afresh; so is one that only
    `is_derived` from other stages, as a measurement.
    """
    if not final.exists():
        return False
    problem = _difference(final, stage, _identity(stage, parameters, inputs))
    if problem is None:
        print(f"{stage}: {final} is complete and made of the same inputs and parameters: kept.", flush=True)
        return True
    if not _may_replace(final, is_derived):
        raise SaigaError(f"{problem} Delete it, rename it or choose another run_dir.")
    print(f"{stage}: {problem} It is made afresh.", flush=True)
    return False


def _may_replace(final: Path, is_derived: bool) -> bool:
    """A directory without a manifest is no stage of ours: it is never thrown away."""
    return (is_derived or is_replacing()) and (final / NAME).is_file()


def is_replacing() -> bool:
    """Whether the runner has set SAIGAKIT_REPLACE=1."""
    return os.environ.get(_REPLACE) == "1"


def differing(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs in the parameters and inputs of two manifests, one phrase each."""
    return [
        f"{key}: {_short(there[part].get(key))} there, {_short(now[part].get(key))} now"
        for part in ("parameters", "inputs")
        for key in {**there[part], **now[part]}
        if there[part].get(key) != now[part].get(key)
    ]


def changed(directory: Path, content: Manifest) -> list[str]:
    """Names of the outputs that are no longer what they were."""
    there = {name: directory / name for name in content["outputs"]}
    return [n for n, file in there.items() if not file.is_file() or sha256(file) != content["outputs"][n]]


def _difference(final: Path, stage: str, wanted: Manifest) -> str | None:
    """A sentence on what makes a finished stage another one than is wanted, None if nothing does."""
    try:
        content = require_stage(final, stage)
    except SaigaError as error:
        return str(error)
    if found := differing(content, wanted):
        return f"{final} exists and was made differently ({'; '.join(found)})."
    damaged = changed(final, content)
    return f"{final}: {', '.join(damaged)} changed since it was made." if damaged else None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


@contextmanager
def making(
    final: Path,
    *,
    stage: str,
    parameters: Mapping[str, Any],
    inputs: Mapping[str, Any],
    facts: Mapping[str, Any] | None = None,
    goes_on: bool = False,
    is_derived: bool = False,
) -> Iterator[Path]:
    """A directory beside `final` to write into; on success it gets its manifest and the final name.

    `facts` may be filled while it is written; `goes_on`: a stage of that name is there, and this is it further on;
    `is_derived`: as for `is_kept`.

    A directory left by a killed run is emptied first; on an error nothing bears the final name, and what bore it
    before stays.
    """
    partial = discard_partial(final)
    partial.mkdir(parents=True)
    yield partial
    identity: dict[str, Any] = {"stage": stage, "parameters": parameters, "inputs": inputs}
    write(partial / NAME, **identity, facts=facts or {}, outputs=hashes(partial))
    if final.exists() and not goes_on and not _may_replace(final, is_derived):
        raise SaigaError(f"{final} appeared while {partial} was written; nothing was overwritten.")
    replaced = final.with_name(f".{final.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)


def write(
    file: Path,
    *,
    stage: str,
    parameters: Mapping[str, Any],
    inputs: Mapping[str, Any],
    facts: Mapping[str, Any],
    outputs: Mapping[str, str],
) -> Path:
    """A manifest; `outputs`: SHA-256 of what was made, by name."""
    content = {**_identity(stage, parameters, inputs), **facts, "versions": versions(), "outputs": outputs}
    return write_text(file, json.dumps(content, ensure_ascii=False, indent=2, default=str))
