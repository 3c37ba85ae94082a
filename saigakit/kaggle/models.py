"""A folder into a version of a model on Kaggle, by the kaggle command line, and what of it is there."""

import csv
import io
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path

from saigakit.errors import SaigaError
from saigakit.kaggle import kernels

_PAGE = 200  # files of a listing; a stage has fewer


def push_version(folder: Path, instance: str, *, card: str, licence: str, private: bool) -> str:
    """The reference of a new version of `instance` (owner/model/framework/variation) with the files of `folder`.

    Model and variation are made where they are not there. Raises SaigaError where Kaggle refuses one of them, and
    where the model is public and `private` is asked for.
    """
    owner, name, framework, variation = instance.split("/")
    _require_model(folder, f"{owner}/{name}", card, private)
    if (there := kernels.asked("models", "instances", "get", instance)) is not None:
        before = _version(instance, there)
        notes = ("-n", "pushed by saigakit", "-q", "-p", str(folder))
        _accepted(kernels.kaggle("models", "instances", "versions", "create", *notes, instance), instance)
        return f"{instance}/{before + 1}"
    values = {"ownerSlug": owner, "modelSlug": name, "instanceSlug": variation, "framework": framework}
    values |= {"overview": "", "usage": "", "licenseName": licence}
    _write(folder / "model-instance-metadata.json", {**values, "fineTunable": False, "trainingData": []})
    _accepted(kernels.kaggle("models", "instances", "create", "-q", "-p", str(folder)), instance)
    return f"{instance}/1"


def _require_model(folder: Path, model: str, card: str, private: bool) -> None:
    there = kernels.asked("models", "get", model)
    if there is None:
        owner, name = model.split("/")
        metadata = folder / "model-metadata.json"
        values = {"ownerSlug": owner, "slug": name, "title": name, "subtitle": "", "isPrivate": private}
        _write(metadata, {**values, "description": card, "publishTime": "", "provenanceSources": ""})
        _accepted(kernels.kaggle("models", "create", "-p", str(folder)), model)
        metadata.unlink()
    elif private and not re.search(r'"isPrivate"\s*:\s*true', there):  # false is not printed
        raise SaigaError(
            f"{model} is there and public, and private=True. Make it private in its settings on kaggle.com, push with "
            "private=False, or choose another name."
        )


def require_arrived(reference: str, sizes: Mapping[str, int], *, poll_s: float = 5.0, wait_s: float = 600.0) -> None:
    """Raises SaigaError where a file is missing there or has another size; Kaggle gives no hashes."""
    deadline = time.monotonic() + wait_s
    while (found := _listed(reference)).keys() < sizes.keys() and time.monotonic() < deadline:
        time.sleep(poll_s)  # a version is listed when Kaggle has taken it in
    for name, size in sizes.items():
        if name not in found:
            raise SaigaError(f"{name} did not arrive in {reference}. Push it again.")
        if found[name] != size:
            raise SaigaError(
                f"{name} has {found[name]:,} bytes in {reference} and {size:,} here: it was damaged on the way. "
                "Push it again, and delete that version on kaggle.com."
            )


def _listed(reference: str) -> dict[str, int]:
    """Bytes of each file; none where the version is not there yet."""
    said = kernels.asked("models", "instances", "versions", "files", reference, "-v", "--page-size", f"{_PAGE}") or ""
    lines = said.splitlines()
    header = next((number for number, line in enumerate(lines) if line.startswith("name,")), len(lines))
    return {row["name"]: int(row["size"]) for row in csv.DictReader(io.StringIO("\n".join(lines[header:])))}


def _version(instance: str, said: str) -> int:
    """The number of the newest version."""
    found = re.search(r'"versionNumber"\s*:\s*"?(\d+)', said)
    if found is None:
        raise SaigaError(f"Kaggle gave no version of {instance}: {said.strip()[:300]!r}")
    return int(found[1])


def _accepted(said: str, reference: str) -> None:
    """Kaggle's command line exits 0 after a refusal; only its words tell."""
    if "was created" not in said:
        raise SaigaError(f"Kaggle refused {reference}: {said.strip()[-600:]}. Look at kaggle.com for who has the name.")


def _write(file: Path, content: Mapping[str, object]) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
