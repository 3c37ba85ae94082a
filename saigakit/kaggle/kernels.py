"""Notebooks and parameters into kernels that run on Kaggle, and their results home, by the kaggle command line."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from saigakit.core import manifest
from saigakit.core.files import discard_partial, require_absent
from saigakit.errors import SaigaError

METADATA = Path("kaggle-metadata")
PLACEHOLDER = "USERNAME/"  # stands for the owner in kaggle-metadata; the logged-in user takes its place
_REFUSALS = ("Kernel push error:", "Dataset creation error:", "Dataset version creation error:")
_DROPPED = "The following are not valid"


def username() -> str:
    """The logged-in user of the kaggle command line."""
    found = re.search(r"^- username: (\S+)", kaggle("config", "view"), re.MULTILINE)
    if found is None or found[1] == "None":
        raise SaigaError("Kaggle did not say who is logged in. Run `kaggle auth login` and try again.")
    return found[1]


def push(stage: str | Path, parameters: Mapping[str, object] | None = None) -> str:
    """Starts a notebook on Kaggle with `parameters` written into it; returns its reference, owner/slug.

    `stage`: "02_train" or another folder of kaggle-metadata, or a path to one.
    Raises SaigaError where Kaggle refuses it or drops one of its sources.
    """
    folder = _folder(stage)
    content = _metadata(folder / "kernel-metadata.json", username())
    notebook = (folder / str(content["code_file"])).resolve()
    if not notebook.is_file():
        raise SaigaError(f"{folder / 'kernel-metadata.json'} names {notebook}, which is not there.")
    with tempfile.TemporaryDirectory() as scratch:
        _bake(notebook, parameters or {}, Path(scratch) / notebook.name)
        content["code_file"] = notebook.name
        (Path(scratch) / "kernel-metadata.json").write_text(json.dumps(content), encoding="utf-8")
        said = kaggle("kernels", "push", "-p", scratch)
    _require_accepted(said, str(content["id"]))
    print(said.strip().splitlines()[-1])
    return str(content["id"])


def is_dataset(name: str) -> bool:
    """Whether a folder of kaggle-metadata describes a data set, not a notebook."""
    return any((folder / "dataset-metadata.json").is_file() for folder in (Path(name), METADATA / name))


def push_dataset(folder: str | Path, files: Sequence[Path] = (), *, poll_s: float = 5.0) -> str:
    """Makes a private data set of a folder of kaggle-metadata and of `files`, or a new version of it.

    Returns its reference when it can be attached: a notebook pushed before that loses it.
    """
    source = _folder(folder, "dataset-metadata.json")
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(source, scratch, dirs_exist_ok=True)
        for file in files:
            if not file.is_file():
                raise SaigaError(f"{file} is not there, so it cannot be uploaded.")
            shutil.copy2(file, scratch)
        if len(list(Path(scratch).iterdir())) < 2:
            raise SaigaError(f"{source} holds nothing to upload but its metadata; give the files.")
        content = _metadata(source / "dataset-metadata.json", username())
        (Path(scratch) / "dataset-metadata.json").write_text(json.dumps(content), encoding="utf-8")
        reference = str(content["id"])
        verb = ("create",) if _dataset_status(reference) is None else ("version", "-m", "pushed by saigakit")
        _require_accepted(kaggle("datasets", *verb, "--quiet", "-p", scratch), reference)
    _wait_until_ready(reference, poll_s)
    print(f"Data set {reference} is ready.")
    return reference


def watch(kernel: str, *, poll_s: float = 30.0) -> None:
    """Returns when a pushed notebook has finished: a line when its status changes and every ten minutes.

    `kernel`: owner/slug, or a stage's name for the logged-in user's own.
    Raises SaigaError with Kaggle's message and the end of the log when it failed or was cancelled.
    """
    reference, start = _reference(kernel), time.monotonic()
    shown, shown_at = "", start
    for status, said in _statuses(reference, poll_s):
        now = time.monotonic()
        if status != shown or now - shown_at >= 600:
            print(f"{reference}: {status} after {(now - start) / 60:.0f} min", flush=True)
            shown, shown_at = status, now
        if status in ("ERROR", "CANCEL_ACKNOWLEDGED"):
            raise SaigaError(_failure(reference, status, said))
        if status == "COMPLETE":
            return


def fetch(kernel: str, directory: str | Path) -> Path:
    """Downloads a finished notebook's output and log into `directory`, which bears its name only when whole.

    Files that a stage's manifest lists are compared with it: the command line keeps an error page as a file.
    """
    final, reference = Path(directory), _reference(kernel)
    require_absent(final)
    partial = discard_partial(final)
    partial.mkdir(parents=True)
    kaggle("kernels", "output", reference, "-p", str(partial), echo=True)
    if not any(partial.rglob("*")):
        raise SaigaError(f"{reference} has no output. Did it finish? `saigakit watch {reference}` shows its status.")
    for file in sorted(partial.rglob(manifest.NAME)):
        there, promised = manifest.hashes(file.parent), manifest.read(file.parent)["outputs"]
        damaged = [name for name, digest in promised.items() if there.get(name) != digest]
        if damaged:
            raise SaigaError(f"{', '.join(damaged)} of {reference} did not arrive whole (see {partial}). Fetch again.")
    partial.rename(final)
    return final


def _folder(stage: str | Path, name: str = "kernel-metadata.json") -> Path:
    for folder in (Path(stage), METADATA / stage):
        if (folder / name).is_file():
            return folder
    known = ", ".join(sorted(file.parent.name for file in METADATA.glob(f"*/{name}")))
    raise SaigaError(f"No {name} in {stage} or {METADATA / stage}. Here are: {known or f'none, no {METADATA} here'}.")


def _metadata(file: Path, owner: str) -> dict[str, object]:
    text = file.read_text(encoding="utf-8").replace(PLACEHOLDER, f"{owner}/")
    try:
        content: dict[str, object] = json.loads(text)
    except ValueError as error:
        raise SaigaError(f"{file} is not JSON: {error}.") from None
    return content


def _reference(kernel: str) -> str:
    if "/" in kernel:
        return kernel
    return str(_metadata(_folder(kernel) / "kernel-metadata.json", username())["id"])


def _bake(notebook: Path, parameters: Mapping[str, object], target: Path) -> None:
    """A copy of the notebook with its parameters set: a push carries none, and Kaggle runs it without any."""
    if not parameters:
        shutil.copyfile(notebook, target)
        return
    import papermill

    known = papermill.inspect_notebook(str(notebook))
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        raise SaigaError(f"{notebook.name} has no parameter {', '.join(unknown)}; it has {', '.join(known)}.")
    papermill.execute_notebook(
        str(notebook), str(target), parameters=dict(parameters), prepare_only=True, progress_bar=False
    )
    content = json.loads(target.read_text(encoding="utf-8"))
    del content["metadata"]["papermill"]  # holds the paths of this machine
    target.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _require_accepted(said: str, reference: str) -> None:
    """Kaggle's command line exits 0 after a refusal; only its words tell."""
    lines = said.splitlines()
    refusals = [line for line in lines if line.startswith(_REFUSALS)]
    if refusals:
        raise SaigaError(
            f"Kaggle refused {reference}, nothing runs: {'; '.join(refusals)}. If it speaks of a quota or of running "
            "sessions, wait or stop one; if of the title or the name, see who has it on kaggle.com."
        )
    dropped = [line for line in lines if line.startswith(_DROPPED)]
    if dropped:
        raise SaigaError(
            f"Kaggle took {reference} without some of its parts: {'; '.join(dropped)}. A run that has started will "
            "miss them: cancel it on kaggle.com. A data set must exist and be ready, a notebook must have finished "
            "once; then push again."
        )
    if "is being created" not in said and "successfully" not in said:
        raise SaigaError(f"Kaggle did not confirm {reference}: {said.strip()[-600:]!r}")


def _wait_until_ready(reference: str, poll_s: float) -> None:
    deadline = time.monotonic() + 600
    while (status := _dataset_status(reference)) not in ("ready", "failed", "deleted"):
        if time.monotonic() > deadline:
            raise SaigaError(f"Data set {reference} is still {status!r} after 10 minutes; look at it on kaggle.com.")
        time.sleep(poll_s)
    if status != "ready":
        raise SaigaError(f"Kaggle could not make the data set {reference}: its status is {status!r}.")


def _dataset_status(reference: str) -> str | None:
    said = asked("datasets", "status", reference)
    return None if said is None else said.strip().splitlines()[-1]


def asked(*command: str) -> str | None:
    """What Kaggle says of something; None where it is not there."""
    try:
        return kaggle(*command)
    except SaigaError as error:
        if re.search(r"\b40[34] Client Error", str(error)):  # Kaggle answers 403 for what is not there
            return None
        raise


def _statuses(reference: str, poll_s: float) -> Iterator[tuple[str, str]]:
    """The status and what Kaggle said with it, without end. A run lasts hours: up to four answers may be lost."""
    lost = 5  # the first answer may not be: a wrong name fails there
    while True:
        try:
            said = kaggle("kernels", "status", reference)
        except SaigaError:
            if lost >= 4:
                raise
            lost += 1
            print(f"{reference}: Kaggle does not answer, asking again", flush=True)
        else:
            lost = 0
            found = re.search(r'has status "(?:\w+\.)?(\w+)"', said)
            if found is None:
                raise SaigaError(f"Kaggle gave no status for {reference}: {said.strip()[:300]!r}")
            yield found[1], said
        time.sleep(poll_s)


def _failure(reference: str, status: str, said: str) -> str:
    message = re.search(r'^Failure message: "(.*)"', said, re.MULTILINE | re.DOTALL)
    what = "was cancelled" if status.startswith("CANCEL") else "failed"
    try:
        log = "".join(entry["data"] for entry in json.loads(kaggle("kernels", "logs", reference).strip() or "[]"))
    except (SaigaError, ValueError) as error:  # the failure itself must still be told
        log = f"(no log: {error})"
    end = "\n".join(f"  {line}" for line in log.strip().splitlines()[-15:])
    return f"{reference} {what} on Kaggle{f': {message[1]}' if message else ''}. The end of its log:\n{end}"


def kaggle(*arguments: str, echo: bool = False) -> str:
    """What the kaggle command line printed, both streams. Raises SaigaError with its words where it failed."""
    if importlib.util.find_spec("kaggle") is None:
        raise SaigaError("The kaggle command line is not installed: pip install 'saigakit[kaggle,run]'.")
    # -m kaggle: its own check of the program's name knows this form; -W: no warning about a newer version.
    command = [sys.executable, "-m", "kaggle", "-W", *arguments]
    environment = os.environ | {"PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}
    lines = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, encoding="utf-8", errors="replace"
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            lines.append(line)
            if echo:
                print(line, end="", flush=True)
    said = "".join(lines)
    if child.returncode == 0:
        return said
    if "Authentication required" in said:
        raise SaigaError("Kaggle does not know you: run `kaggle auth login`, or set KAGGLE_API_TOKEN, and try again.")
    raise SaigaError(f"kaggle {' '.join(arguments)} failed: {said.strip()[-1000:] or f'exit {child.returncode}'}")
