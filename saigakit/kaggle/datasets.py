"""Upload data sets to Kaggle and wait until a notebook can attach them."""

import json
import shutil
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saigakit.core.files import scratch
from saigakit.errors import SaigaError
from saigakit.kaggle import command_line, notebook

WHEELS = "wheels"


def push_dataset(folder: str | Path, files: Sequence[Path] = (), *, public: bool = False, poll_s: float = 5.0) -> str:
    """Upload a folder of kaggle-metadata with `files` as a private data set or a new version of it.

    Returns its reference when it can be attached: a notebook that is pushed earlier loses it.
    """
    source = notebook.find_folder(folder, notebook.DATASET)
    if absent := [str(file) for file in files if not file.is_file()]:
        raise SaigaError(f"{', '.join(absent)} is not there, so it cannot be uploaded.")
    content = notebook.read_metadata(source / notebook.DATASET, command_line.username())
    if source.name == WHEELS:
        require_wheels(files)
    here = [file for file in source.iterdir() if file.name != notebook.DATASET]
    upload(content, [*here, *files], public=public, poll_s=poll_s)
    return str(content["id"])


def upload(content: Mapping[str, Any], files: Sequence[Path], *, public: bool = False, poll_s: float = 5.0) -> None:
    """Upload `files` as the data set that `content` describes, or a new version of it, and wait until it is ready."""
    reference = str(content["id"])
    if not files:
        raise SaigaError(f"{reference} has nothing to upload except its metadata; name the files.")
    with scratch() as directory:
        metadata, verb = directory / notebook.DATASET, ["create", *(["--public"] if public else [])]
        if status(reference) is not None:
            verb = ["version", "-m", "pushed by saigakit"]
            command_line.run("datasets", "metadata", reference, "-p", str(directory))
            info = json.loads(metadata.read_text(encoding="utf-8"))["info"]
            if bool(info.get("isPrivate")) == public:  # false is left out
                raise SaigaError(
                    f"The data set {reference} exists and is {'private' if public else 'public'}; nothing was "
                    "uploaded. Change that in its settings on kaggle.com, or choose another name."
                )
        for file in files:
            shutil.copy2(file, directory)
        metadata.write_text(json.dumps(content), encoding="utf-8")
        command_line.submit(reference, "datasets", *verb, "--quiet", "-p", str(directory))
    deadline = time.monotonic() + 600
    while (found := status(reference)) not in ("ready", "failed", "deleted"):
        if time.monotonic() > deadline:
            raise SaigaError(f"Data set {reference} is still {found!r} after 10 minutes; check it on kaggle.com.")
        time.sleep(poll_s)
    if found != "ready":
        raise SaigaError(f"Kaggle could not create the data set {reference}: its status is {found!r}.")
    print(f"Data set {reference} is ready.", flush=True)


def require_wheels(files: Sequence[Path]) -> None:
    """Raise SaigaError unless `files` are wheels, one of them that of saigakit: a notebook would not find its own."""
    for file in files:
        if file.suffix != ".whl" or not zipfile.is_zipfile(file):
            raise SaigaError(f"{file} is not a wheel. `saigakit wheels DIRECTORY` makes what the notebooks need.")
    own = [file.name for file in files if file.name.startswith("saigakit-")]
    if files and len(own) != 1:
        there = f"these are {len(own)}: {', '.join(own)}" if own else "there is none"
        raise SaigaError(f"The data set needs exactly one wheel of saigakit, and {there}.")


def status(reference: str) -> str | None:
    """Kaggle's word for the status of a data set; None if there is none."""
    answer = command_line.query("datasets", "status", reference)
    return None if answer is None else answer.strip().splitlines()[-1]
