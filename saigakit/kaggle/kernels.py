"""Push notebooks to Kaggle, watch and stop their runs, and fetch the results."""

import json
import re
import shlex
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from saigakit.core import manifest, workspace
from saigakit.core.display import printable
from saigakit.core.files import explaining, require_absent, scratch
from saigakit.errors import SaigaError
from saigakit.kaggle import command_line, notebook
from saigakit.kaggle.command_line import NoAnswerError

_LONGEST_PAUSE_S = 600.0  # between two questions while Kaggle does not answer
_PATIENCE_S = 12 * 3600.0  # without any answer; a run takes no longer
_REFUSED_PATIENCE_S = 3600.0  # the same where Kaggle refuses to answer, as it does now and then
_GOING_ON = ("RUNNING", "QUEUED", "NEW_SCRIPT")  # Kaggle's words for a run that has not ended
_CANCEL = """
import sys
from kaggle import api
from kagglesdk.kernels.types.kernels_api_service import ApiCancelKernelSessionRequest
request = ApiCancelKernelSessionRequest()
request.kernel_session_id = int(sys.argv[1])
with api.build_kaggle_client() as client:
    print(client.kernels.kernels_api_client.cancel_kernel_session(request).error_message)
"""


class RunFailedError(SaigaError):
    """A run failed or was cancelled on Kaggle."""


class Pushed(NamedTuple):
    """A version of a notebook that Kaggle has accepted; `reference` is owner/slug/version."""

    reference: str
    address: str


def push(
    stage: str | Path,
    parameters: Mapping[str, object] | None = None,
    *,
    accelerator: str | None = None,
    public: bool = False,
) -> str:
    """Start the notebook of a folder of kaggle-metadata, such as "02_train", and return its reference, owner/slug."""
    folder = notebook.find_folder(stage)
    content = notebook.read_metadata(folder / notebook.KERNEL, command_line.username())
    file = (folder / str(content["code_file"])).resolve()
    if not file.is_file():
        raise SaigaError(f"{folder / notebook.KERNEL} names {file}, which is not there.")
    content |= {"is_private": False} if public else {}
    pushed = push_notebook(file, notebook.with_accelerator(content, accelerator), parameters or {})
    print(f"Version {pushed.reference.rsplit('/')[-1]} of {content['id']} was pushed: {pushed.address}")
    return str(content["id"])


def push_notebook(file: Path, content: dict[str, Any], parameters: Mapping[str, object]) -> Pushed:
    """Start a notebook with these metadata. Raises SaigaError if Kaggle refuses it, or drops a source or the name."""
    from slugify import slugify  # a dependency of the kaggle command line

    ours, from_title = str(content["id"]).split("/")[-1], slugify(str(content.get("title", "")))
    if from_title != ours:  # the run would be lost
        raise SaigaError(
            f"The title {content.get('title')!r} gives the name {from_title!r}, but the id ends in {ours!r}. Kaggle "
            f"follows the title; change one of them in {notebook.KERNEL}."
        )
    with scratch() as upload:
        notebook.render(file, parameters, upload / file.name)
        text = json.dumps({**content, "code_file": file.name})
        (upload / notebook.KERNEL).write_text(text, encoding="utf-8")
        shape = ("--accelerator", content["machine_shape"]) if "machine_shape" in content else ()
        output = command_line.submit(str(content["id"]), "kernels", "push", "-p", str(upload), *shape)
    version, address = re.findall(r"Kernel version (\d*) ?successfully.*? at (\S+)", output)[0]
    if (theirs := re.search(r"/code/[^/]+/([^/?#]+)", address)) and theirs[1] != ours:
        raise SaigaError(f"Kaggle started it as {theirs[1]!r} instead of {ours!r}. Cancel it there: {address}")
    return Pushed(f"{content['id']}/{version}".rstrip("/"), address)


def watch(kernel: str, *, poll_s: float = 30.0) -> None:
    """Wait for the end of a notebook, owner/slug or a stage of the logged-in user, and report its status.

    Hours without an answer are survived. Raises RunFailedError with Kaggle's message and the end of the log if it
    fails or is cancelled.
    """
    reference, start = _reference(kernel), time.monotonic()
    shown, shown_at, answered_at, pause = "", start, None, poll_s
    while shown != "COMPLETE":
        try:
            status, message = _status(reference)
        except SaigaError as error:
            patience_s = _PATIENCE_S if isinstance(error, NoAnswerError) else _REFUSED_PATIENCE_S
            if answered_at is None or time.monotonic() > answered_at + patience_s:  # at first: the name may be wrong
                raise
            pause = min(2 * pause, _LONGEST_PAUSE_S)
            print(f"{reference}: {error} Asking again in {pause:.0f} s.", flush=True)
            time.sleep(pause)
            continue
        answered_at, pause = time.monotonic(), poll_s
        if status != shown or answered_at - shown_at >= 600:
            print(f"{reference}: {status} after {(answered_at - start) / 60:.0f} min", flush=True)
            shown, shown_at = status, answered_at
        if status in ("ERROR", "CANCEL_ACKNOWLEDGED"):
            raise RunFailedError(_failure(reference, status, message))
        if status != "COMPLETE":
            time.sleep(poll_s)


def _status(reference: str) -> tuple[str, str]:
    """Kaggle's word for the status of a run, and its message about a failure."""
    answer = command_line.run("kernels", "status", reference)
    found = re.search(r'has status "(?:\w+\.)?(\w+)"(?:\s*Failure message: "(.*)")?', answer, re.DOTALL)
    if found is None:
        raise SaigaError(f"Kaggle gave no status for {reference}: {answer.strip()[:300]!r}")
    return found[1], found[2] or ""


def is_running(reference: str) -> bool:
    """Whether the newest run of a notebook has not ended; False if there is none."""
    answer = command_line.query("kernels", "status", reference) or ""
    return re.search(rf'"(\w+\.)?({"|".join(_GOING_ON)})"', answer) is not None


def _failure(reference: str, status: str, message: str) -> str:
    what = "was cancelled" if status.startswith("CANCEL") else "failed"
    try:
        entries = json.loads(command_line.run("kernels", "logs", reference).strip() or "[]")
        log = "".join(entry["data"] for entry in entries).strip() or "(Kaggle has no log of it)"
    except (SaigaError, ValueError, LookupError, TypeError) as error:  # the failure itself must still be reported
        log = f"(no log: {error})"
    end = "\n".join(f"  {line}" for line in log.splitlines()[-15:])
    return printable(f"{reference} {what} on Kaggle{f': {message}' if message else ''}. The end of its log:\n{end}")


def stop(kernel: str) -> None:
    """Cancel the run of a notebook; Kaggle keeps the versions that had finished before.

    Kaggle names the session that a cancellation needs only inside it: `prepare` prints it into the log.
    """
    reference = _reference(kernel)
    if (status := _status(reference)[0]) not in _GOING_ON:
        raise SaigaError(f"{reference} is not running: its status is {status}.")
    try:  # the log of a run goes on until its end
        log = command_line.run("kernels", "logs", "-f", reference, limit_s=60.0, until=workspace.SESSION)
    except SaigaError as error:
        print(error, flush=True)
        log = ""
    if (session := re.search(rf"^{workspace.SESSION}\s+(\S+)", log, re.MULTILINE)) is None:
        page = "/".join(reference.split("/")[:2])  # without the version
        raise SaigaError(
            f"{reference} has not printed its session into its log yet, so it cannot be stopped from here. Try again "
            f"in a minute, or open https://www.kaggle.com/code/{page} and choose Cancel run."
        )
    if refusal := command_line.run_python("-c", _CANCEL, session[1]).strip():
        raise SaigaError(f"Kaggle did not stop {reference}: {printable(refusal)}")
    print(f"Kaggle was asked to stop {reference} (session {session[1]}). See: saigakit watch {shlex.quote(kernel)}")


def fetch(kernel: str, directory: str | Path, *, pattern: str = "") -> Path:
    """Download output and log of a finished notebook, or only the files whose names match a regular expression.

    `directory` appears only when all of it has arrived and equals its stage's manifest. What has arrived is kept, and
    the next call goes on from there.
    """
    final, reference = Path(directory).resolve(), _reference(kernel)
    require_absent(final)
    partial = final.with_name(f".{final.name}.{reference.replace('/', '.')}.fetching")
    with explaining(partial):
        partial.mkdir(parents=True, exist_ok=True)
    options = ("--file-pattern", pattern) if pattern else ()
    try:
        command = ("kernels", "output", reference, "-p", str(partial), *options)
        command_line.run(*command, echo=True, limit_s=command_line.TRANSFER_S)
    except NoAnswerError as error:
        raise SaigaError(f"{error} What has arrived is kept: run the same command to go on.") from None
    finally:
        with suppress(OSError):  # something has arrived
            partial.rmdir()
    if not partial.is_dir():
        raise SaigaError(f"{reference} has no output. Has it finished? saigakit watch {shlex.quote(reference)}")
    stages = sorted(file.parent for file in partial.rglob(manifest.NAME))
    if not stages:
        raise SaigaError(
            f"{reference} has no finished stage among its output, which is in {partial}. How did it end? "
            f"saigakit watch {shlex.quote(reference)}"
        )
    for stage in stages if not pattern else ():
        if damaged := manifest.changed(stage, manifest.read(stage)):
            for name in damaged:
                (stage / name).unlink(missing_ok=True)
            raise SaigaError(f"{', '.join(damaged)} of {reference} arrived damaged. Run the same command again.")
    partial.rename(final)
    return final


def _reference(kernel: str) -> str:
    if "/" in kernel:
        return kernel
    return str(notebook.read_metadata(notebook.find_folder(kernel) / notebook.KERNEL, command_line.username())["id"])
