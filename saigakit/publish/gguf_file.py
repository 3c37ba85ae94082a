"""Publish GGUF files with their model card on the Hub or on Kaggle."""

import re
import shutil
from pathlib import Path
from typing import Any

from saigakit import evaluate, export, registry
from saigakit.core import manifest
from saigakit.core.files import inside, scratch
from saigakit.errors import SaigaError
from saigakit.export import markdown, model_card, quality
from saigakit.kaggle import command_line, models
from saigakit.publish import upload

_PUBLISHED = (".gguf", ".png")
# Kaggle's names for licences; the card names any other licence.
_LICENCES = {"apache-2.0": "Apache 2.0", "mit": "MIT", "gemma": "Gemma", "llama2": "Llama 2", "llama3": "Llama 3"}


def push_to_hub(made: str | Path, repo_id: str, *, private: bool = True, replace: bool = False) -> str:
    """Push the GGUF files of `made` with their companion files as `push_adapter` does; returns the address.

    `made` is a finished 03_merge_gguf, or the first file of a `saigakit export`.
    """
    directory, content = _read_finished(Path(made))
    repository = upload.HubRepository(repo_id)
    with scratch() as texts:
        files, published = _collect_files(directory, content, texts, repo_id)
        message = f"{published['parameters']['model']} as GGUF, made with saigakit"
        return repository.push(files, published, message, private=private, replace=replace)


def push_to_kaggle(made: str | Path, name: str, *, private: bool = True) -> str:
    """Push a new version of the Kaggle model `name` of the logged-in user, which is created if there is none.

    `made` as for `push_to_hub`; the variation is the quant type. Returns owner/name/gguf/variation/version.
    """
    if not re.fullmatch(r"[a-z0-9](-?[a-z0-9])+", name) or not 6 <= len(name) <= 50:
        raise SaigaError(
            f"{name!r} is not the name of a Kaggle model. Give 6 to 50 characters of a-z, 0-9 and '-', such as "
            "saiga-terms."
        )
    directory, content = _read_finished(Path(made))
    model = f"{command_line.username()}/{name}"
    variation = re.sub(r"[^a-z0-9]+", "-", str(content["parameters"]["quant_type"]).lower())
    spec = registry.find(content["parameters"]["model"])
    with scratch() as made_here:
        files, _ = _collect_files(directory, content, made_here / "texts", name)
        folder = made_here / "upload"
        folder.mkdir()
        for file_name, file in files.items():
            try:  # gigabytes are copied only if the file system cannot link them
                (folder / file_name).hardlink_to(file.resolve())
            except OSError:
                shutil.copyfile(file, folder / file_name)
        reference = models.push_version(
            folder,
            f"{model}/gguf/{variation}",
            card=files["README.md"].read_text(encoding="utf-8"),
            licence=_LICENCES.get(spec.licence, "Other"),
            private=private,
        )
        sizes = {file_name: file.stat().st_size for file_name, file in files.items()}
    models.require_arrived(reference, sizes)
    print(f"All files ({len(sizes)}) arrived: https://www.kaggle.com/models/{reference}", flush=True)
    return reference


def _read_finished(made: Path) -> tuple[Path, manifest.Manifest]:
    """The directory of the files and their manifest. Raises SaigaError if a file has changed."""
    if made.suffix != ".gguf":
        return made, upload.require_unchanged(made, export.STAGE)
    if not made.is_file():
        raise SaigaError(f"{made} does not exist.")
    if not manifest.path_for(made).is_file() and (made.parent / manifest.NAME).is_file():
        return made.parent, upload.require_unchanged(made.parent, export.STAGE)
    content = manifest.read(made)
    if damaged := manifest.changed(made.parent, content):
        raise SaigaError(f"{made.parent}: {', '.join(damaged)} changed since it was made. Export it again.")
    return made.parent, content


def _collect_files(
    directory: Path, content: manifest.Manifest, target: Path, title: str
) -> tuple[dict[str, Path], dict[str, Any]]:
    """The files to publish, with texts written again in `target`, and the public manifest."""
    upload.print_terms(content["parameters"]["model"])
    target.mkdir(exist_ok=True)
    files = {name: directory / name for name in content["outputs"] if name.endswith(_PUBLISHED)}
    largest_first = sorted(content["files"].items(), key=lambda item: -item[1]["bytes"])
    texts = model_card.companion_texts(
        {facts["quant_type"]: inside(directory, name) for name, facts in largest_first},
        spec=registry.find(content["parameters"]["model"]),
        inputs=content["inputs"],
        title=title,
        measured=_measured(directory, content) if (directory / manifest.NAME).is_file() else "",
    )
    published = upload.public_manifest(content, files, directory.parent)
    return files | upload.write_texts(target, published, texts), published


def _measured(stage_dir: Path, content: manifest.Manifest) -> str:
    """The tables of the 04_infer and 03_quality next to the stage, if they are about these files."""
    tables = (evaluate.table_about(stage_dir, "gguf", content["outputs"]), quality.read_table(stage_dir, content))
    return "\n".join(markdown.of_table(table) for table in tables if table)
