"""Write a stage's directory together with its manifest, and decide whether a finished one can be reused."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict, Unpack

from saigakit.core import hub, install
from saigakit.core.files import inside, lock_file, replacing, sha256, write_text
from saigakit.errors import SaigaError

NAME = "saigakit.json"
_PACKAGES = ("saigakit", "tokenizers", "torch", "transformers", "peft", "bitsandbytes", "gguf", "llama-cpp-python")
Manifest = dict[str, Any]


class Identity(TypedDict):
    """What a stage was made from; one with the same identity can be reused."""

    stage: str
    parameters: Mapping[str, Any]
    inputs: Mapping[str, Any]


def hashes(path: Path) -> dict[str, str]:
    """SHA-256 by relative path of all files in a directory except its manifest, or of a single file."""
    if path.is_file():
        return {path.name: hub.verified_sha256(path)}
    files = sorted(item for item in path.rglob("*") if item.is_file() and item.name != NAME)
    return {item.relative_to(path).as_posix(): hub.verified_sha256(item) for item in files}


def path_for(file: Path) -> Path:
    """The path of the manifest of a single file that belongs to no stage."""
    return file.with_name(f"{file.stem}.{NAME}")


def read(made: Path) -> Manifest:
    """`made`: the directory of a stage, or a single file."""
    is_single = made.is_file()
    file = path_for(made) if is_single else made / NAME
    if is_single and not file.is_file():
        export = "`saigakit export` writes one for the first file that it makes"
        raise SaigaError(f"{made} has no {file.name} next to it; {export}.")
    if not file.is_file():
        raise SaigaError(f"{made} has no {NAME}: it is not the finished output of a stage.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SaigaError(f"{file} is damaged ({error}); run the stage again.") from None
    if not (has_objects(content, "parameters", "inputs", "outputs") and "stage" in content):
        raise SaigaError(f"{file} is damaged: it is not the manifest of a stage; run the stage again.")
    return content  # type: ignore[no-any-return]


def has_objects(content: object, *names: str) -> bool:
    """Whether it is a JSON object, and so is each of `names` in it."""
    return isinstance(content, dict) and all(isinstance(content.get(name), dict) for name in names)


def require_stage(directory: Path, stage: str, *, model: str | None = None) -> Manifest:
    """The manifest of a finished `stage`, made for `model`, whose outputs all exist."""
    if not directory.is_dir():
        raise SaigaError(f"{directory} is not there: run {stage} first.")
    content = read(directory)
    if content["stage"] != stage:
        raise SaigaError(f"{directory} was made by {content['stage']}, and {stage} is needed here.")
    made_for = content["parameters"].get("model")
    if model is not None and made_for != model:
        raise SaigaError(
            f"{directory} was made for model={made_for!r}, but this run has model={model!r}. "
            "Use one model in all four notebooks, or another run_dir."
        )
    if missing := [name for name in content["outputs"] if not inside(directory, name).is_file()]:
        raise SaigaError(f"{directory} lost {', '.join(missing)}; run {stage} again.")
    return content


def versions() -> dict[str, str]:
    """Versions of the installed packages that can change a result."""
    return {name: found for name in _PACKAGES if (found := install.installed_version(name)) is not None}


def as_stored(identity: Mapping[str, Any]) -> Manifest:
    """The identity as it is read from JSON, for comparison."""
    return json.loads(json.dumps(identity, default=str))  # type: ignore[no-any-return]


def is_up_to_date(final: Path, *, may_replace: bool = False, **identity: Unpack[Identity]) -> bool:
    """Whether `final` is complete and was made from the same inputs and parameters; False if it does not exist.

    A stage that is damaged or was made differently raises SaigaError, so that nothing is overwritten. With
    `may_replace` or SAIGAKIT_REPLACE=1, which the runner sets, the difference is reported and the answer is False.
    """
    if not final.exists():
        return False
    stage = identity["stage"]
    if (problem := _problem(final, stage, as_stored(identity))) is None:
        print(f"{stage}: {final} is up to date, reusing it.", flush=True)
        return True
    if not _can_be_replaced(final, may_replace):
        raise SaigaError(f"{problem} Delete it, rename it or choose another run_dir.")
    print(f"{stage}: {problem} Making it again.", flush=True)
    return False


def _can_be_replaced(final: Path, may_replace: bool) -> bool:
    """Never a directory without a manifest: it is not a stage."""
    return (may_replace or is_replacing()) and (final / NAME).is_file()


def is_replacing() -> bool:
    """Whether SAIGAKIT_REPLACE=1, which the runner sets, allows stages to be replaced."""
    return os.environ.get("SAIGAKIT_REPLACE") == "1"


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One phrase for each parameter and input in which two manifests differ, or that only one of them has."""
    return [
        f"{key}: {_shortened(there[part], key)} there, {_shortened(now[part], key)} now"
        for part in ("parameters", "inputs")
        for key in {**there[part], **now[part]}
        if (key in there[part], there[part].get(key)) != (key in now[part], now[part].get(key))
    ]


def changed(directory: Path, content: Manifest) -> list[str]:
    """Names of the outputs that are missing or whose hash has changed."""
    files = {name: inside(directory, name) for name in content["outputs"]}
    return [name for name, file in files.items() if not file.is_file() or sha256(file) != content["outputs"][name]]


def describes(file: Path, **identity: Unpack[Identity]) -> bool:
    """Whether `file` has a manifest with this identity, and it and the files made with it are intact."""
    if not file.is_file() or not path_for(file).is_file():
        return False
    content = read(file)
    return not differences(content, as_stored(identity)) and not changed(file.parent, content)


def _problem(final: Path, stage: str, wanted: Manifest) -> str | None:
    """Why an existing stage is not the wanted one."""
    try:
        content = require_stage(final, stage)
    except SaigaError as error:
        return str(error)
    if found := differences(content, wanted):
        return f"{final} exists but was made differently ({'; '.join(found)})."
    damaged = changed(final, content)
    return f"{final}: {', '.join(damaged)} changed since it was made." if damaged else None


def _shortened(values: Mapping[str, object], key: str) -> str:
    text = repr(values[key]) if key in values else "nothing"
    return text if len(text) <= 60 else f"{text[:57]}…"


@contextmanager
def making(
    final: Path, *, facts: Mapping[str, Any] | None = None, may_replace: bool = False, **identity: Unpack[Identity]
) -> Iterator[Path]:
    """Yield a directory next to `final` to write to. On success add its manifest and rename it to `final`.

    `facts` go into the manifest and may be filled inside the block; `may_replace`: see `is_up_to_date`. Only one
    process works in a run directory at a time. On an error an older `final` stays as it was.
    """

    def require_absent() -> None:
        if final.exists() and not _can_be_replaced(final, may_replace):
            raise SaigaError(f"{final} appeared while this run was making it; nothing was overwritten.")

    with lock_file(final.parent / ".saigakit.lock", final.parent, patience_s=5.0):
        require_absent()  # after waiting for another run
        with replacing(final) as partial:
            partial.mkdir()
            yield partial
            write(partial / NAME, **identity, facts=facts or {}, outputs=hashes(partial))
            require_absent()


def write(file: Path, *, facts: Mapping[str, Any], outputs: Mapping[str, str], **identity: Unpack[Identity]) -> Path:
    """Write a manifest; `outputs` is SHA-256 by file name."""
    content = {**as_stored(identity), **facts, "versions": versions(), "outputs": outputs}
    return write_text(file, json.dumps(content, ensure_ascii=False, indent=2, default=str))
