"""Upload a folder as a version of a Kaggle model, and verify what arrived."""

import csv
import io
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path

from saigakit.core.files import write_text
from saigakit.errors import SaigaError
from saigakit.kaggle import command_line

_PAGE = 200  # files per listing; a stage has fewer


def push_version(folder: Path, instance: str, *, card: str, licence: str, private: bool) -> str:
    """Upload `folder` as a version of `instance` (owner/model/framework/variation), and return its reference.

    Model and variation are created if necessary. A public model is refused if `private` is requested.
    """
    owner, name, framework, variation = instance.split("/")
    _require_model(folder, f"{owner}/{name}", card, private)
    if (there := command_line.query("models", "instances", "get", instance)) is not None:
        found = re.search(r'"versionNumber"\s*:\s*"?(\d+)', there)
        if found is None:
            raise SaigaError(f"Kaggle gave no version of {instance}: {there.strip()[:300]!r}")
        options = ("-n", "pushed by saigakit", "-q", "-p", str(folder))
        command_line.submit(instance, "models", "instances", "versions", "create", *options, instance)
        return f"{instance}/{int(found[1]) + 1}"
    values = {"ownerSlug": owner, "modelSlug": name, "instanceSlug": variation, "framework": framework}
    content = {**values, "overview": "", "usage": "", "licenseName": licence, "fineTunable": False, "trainingData": []}
    write_text(folder / "model-instance-metadata.json", json.dumps(content, ensure_ascii=False))
    command_line.submit(instance, "models", "instances", "create", "-q", "-p", str(folder))
    return f"{instance}/1"


def _require_model(folder: Path, model: str, card: str, private: bool) -> None:
    there = command_line.query("models", "get", model)
    if there is None:
        owner, name = model.split("/")
        values = {"ownerSlug": owner, "slug": name, "title": name, "subtitle": "", "isPrivate": private}
        content = {**values, "description": card, "publishTime": "", "provenanceSources": ""}
        metadata = write_text(folder / "model-metadata.json", json.dumps(content, ensure_ascii=False))
        command_line.submit(model, "models", "create", "-p", str(folder))
        metadata.unlink()
    elif private and not re.search(r'"isPrivate"\s*:\s*true', there):  # false is not printed
        raise SaigaError(
            f"{model} is public, but private=True. Make it private in its settings on kaggle.com, push with "
            "private=False, or choose another name."
        )


def require_arrived(reference: str, sizes: Mapping[str, int], *, wait_s: float = 600.0) -> None:
    """Raise SaigaError if an uploaded file is missing or has another size; Kaggle provides no hashes."""
    deadline = time.monotonic() + wait_s
    while (found := _listed(reference)).keys() < sizes.keys() and time.monotonic() < deadline:
        time.sleep(5)  # a version is listed once Kaggle has processed it
    for name, size in sizes.items():
        if name not in found:
            raise SaigaError(f"{name} did not arrive in {reference}. Push it again.")
        if found[name] != size:
            raise SaigaError(
                f"{name} has {found[name]:,} bytes in {reference} and {size:,} here: the upload is damaged. "
                "Delete that version on kaggle.com and push again."
            )


def _listed(reference: str) -> dict[str, int]:
    """Bytes of each file; empty if the version is not listed yet."""
    options = ("-v", "--page-size", f"{_PAGE}")
    listing = command_line.query("models", "instances", "versions", "files", reference, *options)
    lines = (listing or "").splitlines()
    header = next((number for number, line in enumerate(lines) if line.startswith("name,")), len(lines))
    return {row["name"]: int(row["size"]) for row in csv.DictReader(io.StringIO("\n".join(lines[header:])))}
