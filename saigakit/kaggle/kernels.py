"""Push notebooks and data sets to Kaggle, watch the runs and fetch their results, with the kaggle command line."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from saigakit.core import install, manifest, workspace
from saigakit.core.display import printable
from saigakit.core.files import replacing, require_absent, scratch
from saigakit.errors import SaigaError

METADATA = Path("kaggle-metadata")


def username() -> str:
    """The user who is logged in to the kaggle command line."""
    found = re.search(r"^- username: (\S+)", run_kaggle("config", "view"), re.MULTILINE)
    if found is None or found[1] == "None":
        raise SaigaError("Nobody is logged in to Kaggle. Run `kaggle auth login` and try again.")
    return found[1]


def push(stage: str | Path, parameters: Mapping[str, object] | None = None) -> str:
    """Start the notebook of a folder of kaggle-metadata, such as "02_train", and return its reference, owner/slug."""
    folder = _folder(stage)
    content = _metadata(folder / "kernel-metadata.json", username())
    notebook = (folder / str(content["code_file"])).resolve()
    if not notebook.is_file():
        raise SaigaError(f"{folder / 'kernel-metadata.json'} names {notebook}, which is not there.")
    with scratch() as upload:
        _copy_with_parameters(notebook, parameters or {}, upload / notebook.name)
        content["code_file"] = notebook.name
        (upload / "kernel-metadata.json").write_text(json.dumps(content), encoding="utf-8")
        output = submit(str(content["id"]), "kernels", "push", "-p", str(upload))
    print(output.strip().splitlines()[-1])
    return str(content["id"])


def is_dataset(name: str) -> bool:
    """Whether a folder of kaggle-metadata describes a data set rather than a notebook."""
    return any((folder / "dataset-metadata.json").is_file() for folder in (Path(name), METADATA / name))


def push_dataset(folder: str | Path, files: Sequence[Path] = (), *, poll_s: float = 5.0) -> str:
    """Upload a folder of kaggle-metadata with `files` as a private data set or a new version of it.

    Returns its reference when it can be attached: a notebook that is pushed earlier loses it.
    """
    source = _folder(folder, "dataset-metadata.json")
    with scratch() as upload:
        shutil.copytree(source, upload, dirs_exist_ok=True)
        for file in files:
            if not file.is_file():
                raise SaigaError(f"{file} is not there, so it cannot be uploaded.")
            shutil.copy2(file, upload)
        if len(list(upload.iterdir())) < 2:
            raise SaigaError(f"{source} has nothing to upload except its metadata; name the files.")
        content = _metadata(source / "dataset-metadata.json", username())
        (upload / "dataset-metadata.json").write_text(json.dumps(content), encoding="utf-8")
        reference = str(content["id"])
        verb = ("create",) if _dataset_status(reference) is None else ("version", "-m", "pushed by saigakit")
        submit(reference, "datasets", *verb, "--quiet", "-p", str(upload))
    _wait_until_ready(reference, poll_s)
    print(f"Data set {reference} is ready.")
    return reference


def watch(kernel: str, *, poll_s: float = 30.0) -> None:
    """Wait for the end of a notebook, owner/slug or a stage of the logged-in user, and report its status.

    Raises SaigaError with Kaggle's message and the end of the log if it fails or is cancelled.
    """
    reference, start = _reference(kernel), time.monotonic()
    shown, shown_at, tolerated = "", start, 0  # failures in a row to get the status; none at first: a name may be wrong
    while shown != "COMPLETE":
        try:
            answer = run_kaggle("kernels", "status", reference)
        except SaigaError:
            if not tolerated:
                raise
            tolerated -= 1
            print(f"{reference}: Kaggle does not answer, trying again", flush=True)
            time.sleep(poll_s)
            continue
        tolerated = 4  # a run takes hours
        found = re.search(r'has status "(?:\w+\.)?(\w+)"', answer)
        if found is None:
            raise SaigaError(f"Kaggle gave no status for {reference}: {answer.strip()[:300]!r}")
        status, now = found[1], time.monotonic()
        if status != shown or now - shown_at >= 600:
            print(f"{reference}: {status} after {(now - start) / 60:.0f} min", flush=True)
            shown, shown_at = status, now
        if status in ("ERROR", "CANCEL_ACKNOWLEDGED"):
            raise SaigaError(_failure(reference, status, answer))
        if status != "COMPLETE":
            time.sleep(poll_s)


def fetch(kernel: str, directory: str | Path) -> Path:
    """Download output and log of a finished notebook; `directory` appears only when it is complete.

    Files are compared with their stage's manifest, because the command line may save an error page as a file.
    """
    final, reference = Path(directory), _reference(kernel)
    require_absent(final)
    with replacing(final) as partial:
        partial.mkdir()
        run_kaggle("kernels", "output", reference, "-p", str(partial), echo=True)
        if not any(partial.rglob("*")):
            raise SaigaError(f"{reference} has no output. Has it finished? `saigakit watch {shlex.quote(reference)}`")
        for file in sorted(partial.rglob(manifest.NAME)):
            if damaged := manifest.changed(file.parent, manifest.read(file.parent)):
                raise SaigaError(f"{', '.join(damaged)} of {reference} arrived damaged. Fetch again.")
    return final


def _folder(stage: str | Path, name: str = "kernel-metadata.json") -> Path:
    for folder in (Path(stage), METADATA / stage):
        if (folder / name).is_file():
            return folder
    known = ", ".join(sorted(file.parent.name for file in METADATA.glob(f"*/{name}")))
    raise SaigaError(f"No {name} in {stage} or {METADATA / stage}. Known: {known or f'none, no {METADATA} here'}.")


def _metadata(file: Path, owner: str) -> dict[str, object]:
    """The metadata with `owner` in place of USERNAME."""
    text = file.read_text(encoding="utf-8").replace("USERNAME/", f"{owner}/")
    try:
        content: dict[str, object] = json.loads(text)
    except ValueError as error:
        raise SaigaError(f"{file} is not JSON: {error}.") from None
    return content


def _reference(kernel: str) -> str:
    if "/" in kernel:
        return kernel
    return str(_metadata(_folder(kernel) / "kernel-metadata.json", username())["id"])


def _copy_with_parameters(notebook: Path, parameters: Mapping[str, object], target: Path) -> None:
    """Copy a notebook and set its parameters, since Kaggle cannot be given any."""
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
    del content["metadata"]["papermill"]  # contains paths of this machine
    target.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def submit(reference: str, *command: str) -> str:
    """Run a kaggle command that creates `reference`, and check its output: it exits with status 0 even if refused."""
    output = run_kaggle(*command)
    if refusals := re.findall(r"^.*(?:push|creation) error:.*$", output, re.MULTILINE):
        raise SaigaError(
            f"Kaggle refused {reference}: {'; '.join(refusals)}. If the reason is a quota or running sessions, wait or "
            "stop one; if it is the title or the name, check on kaggle.com who has it."
        )
    if dropped := re.findall(r"^The following are not valid.*$", output, re.MULTILINE):
        raise SaigaError(
            f"Kaggle accepted {reference} without some of its sources: {'; '.join(dropped)}. Cancel the run on "
            "kaggle.com if it has started. A data set must be ready and a notebook must have finished once; then push "
            "again."
        )
    if not re.search("is being created|successfully|was created", output):
        raise SaigaError(f"Kaggle did not confirm {reference}: {output.strip()[-600:]!r}")
    return output


def _wait_until_ready(reference: str, poll_s: float) -> None:
    deadline = time.monotonic() + 600
    while (status := _dataset_status(reference)) not in ("ready", "failed", "deleted"):
        if time.monotonic() > deadline:
            raise SaigaError(f"Data set {reference} is still {status!r} after 10 minutes; check it on kaggle.com.")
        time.sleep(poll_s)
    if status != "ready":
        raise SaigaError(f"Kaggle could not create the data set {reference}: its status is {status!r}.")


def _dataset_status(reference: str) -> str | None:
    answer = query_kaggle("datasets", "status", reference)
    return None if answer is None else answer.strip().splitlines()[-1]


def query_kaggle(*command: str) -> str | None:
    """The output of a kaggle command; None if what it asks about does not exist."""
    try:
        return run_kaggle(*command)
    except SaigaError as error:
        if re.search(r"\b40[34] Client Error", str(error)):  # Kaggle answers 403 for what does not exist
            return None
        raise


def _failure(reference: str, status: str, answer: str) -> str:
    message = re.search(r'^Failure message: "(.*)"', answer, re.MULTILINE | re.DOTALL)
    what = "was cancelled" if status.startswith("CANCEL") else "failed"
    try:
        log = "".join(entry["data"] for entry in json.loads(run_kaggle("kernels", "logs", reference).strip() or "[]"))
    except (SaigaError, ValueError) as error:  # the failure itself must still be reported
        log = f"(no log: {error})"
    end = "\n".join(f"  {line}" for line in log.strip().splitlines()[-15:])
    return printable(f"{reference} {what} on Kaggle{f': {message[1]}' if message else ''}. The end of its log:\n{end}")


def run_kaggle(*arguments: str, echo: bool = False) -> str:
    """Run the kaggle command line and return what it printed on both streams."""
    if lacking := install.missing(["kaggle"]):
        raise SaigaError(f"This needs {install.listed(lacking)}. Run: pip install 'saigakit[kaggle,run]'")
    # -m kaggle: its check of the program's name knows this form. -W: no warning about a newer version.
    command = [sys.executable, "-m", "kaggle", "-W", *arguments]
    lines = []
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=workspace.child_environment(),
        encoding="utf-8",
        errors="replace",
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            lines.append(line)
            if echo:
                print(printable(line), end="", flush=True)
    output = "".join(lines)
    if child.returncode == 0:
        return output
    if "Authentication required" in output:
        raise SaigaError("Nobody is logged in to Kaggle: run `kaggle auth login` or set KAGGLE_API_TOKEN.")
    raise SaigaError(f"kaggle {' '.join(arguments)} failed: {output.strip()[-1000:] or f'exit {child.returncode}'}")
