"""A finished 03_merge_gguf or export into a repository of the Hub or a model on Kaggle, and whether all arrived."""

import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from saigakit import evaluate, export, registry
from saigakit.core import hub, manifest
from saigakit.errors import SaigaError
from saigakit.evaluate import results
from saigakit.export import markdown, model_card, quality
from saigakit.kaggle import kernels, models
from saigakit.prompt.backends import gguf_vocabulary
from saigakit.publish import adapter

_SHOWN = (".gguf", ".png")
_FRAMEWORK = "gguf"  # as Kaggle's paths name it
# The names that Kaggle has for licences; others are named in the card.
_LICENCES = {"apache-2.0": "Apache 2.0", "mit": "MIT", "gemma": "Gemma", "llama2": "Llama 2", "llama3": "Llama 3"}


def push_to_hub(made: str | Path, repo_id: str, *, private: bool = True, replace: bool = False) -> str:
    """The address of the repository with the GGUF files, what other programs need to run them, and a model card.

    `made`: the directory of a finished 03_merge_gguf, or the first file of a `saigakit export`.
    The card has the table of 04_infer where that stands beside and compared these very files. No record is published.
    One commit, and the refusals, as in adapter.push_adapter.
    """
    directory, content = _finished(Path(made))
    token = hub.writing_token()
    adapter.require_name(repo_id)
    with tempfile.TemporaryDirectory() as scratch:
        files, published = _files(directory, content, Path(scratch), repo_id)
        with hub.uploading(repo_id, token):
            what = f"{published['parameters']['model']} as GGUF, made with saigakit"
            return adapter.Push(repo_id, token).all_of(files, published, what, private=private, replace=replace)


def push_to_kaggle(made: str | Path, name: str, *, private: bool = True) -> str:
    """The reference owner/name/gguf/variation/version of a new version of a Kaggle model, made where it is not there.

    `made`: as for `push_to_hub`; `name`: the model's, of the logged-in user; the variation is the quant type. Every
    file's size there is compared with its size here. Raises SaigaError, also for what the kaggle command line only
    prints.
    """
    if not re.fullmatch(r"[a-z0-9](-?[a-z0-9])+", name) or not 6 <= len(name) <= 50:
        raise SaigaError(
            f"{name!r} is no name of a Kaggle model: give 6 to 50 of a-z, 0-9 and '-', such as saiga-terms."
        )
    directory, content = _finished(Path(made))
    model = f"{kernels.username()}/{name}"
    variation = re.sub(r"[^a-z0-9]+", "-", str(content["parameters"]["quant_type"]).lower())
    spec = registry.find(content["parameters"]["model"])
    with tempfile.TemporaryDirectory() as scratch:
        files, _ = _files(directory, content, Path(scratch) / "texts", name)
        folder = Path(scratch) / "upload"
        folder.mkdir()
        for file_name, file in files.items():
            _linked(file, folder / file_name)
        reference = models.push_version(
            folder,
            f"{model}/{_FRAMEWORK}/{variation}",
            card=files["README.md"].read_text(encoding="utf-8"),
            licence=_LICENCES.get(spec.licence, "Other"),
            private=private,
        )
        sizes = {file_name: file.stat().st_size for file_name, file in files.items()}
    models.require_arrived(reference, sizes)
    print(f"All {len(sizes)} files arrived: https://www.kaggle.com/models/{reference}", flush=True)
    return reference


def _finished(made: Path) -> tuple[Path, manifest.Manifest]:
    """Where the files are, and their manifest. Raises SaigaError where one has changed."""
    if made.suffix != ".gguf":
        return made, adapter.require_whole(made, export.STAGE)
    if not made.is_file():
        raise SaigaError(f"{made} is not there.")
    if not manifest.path_for(made).is_file() and (made.parent / manifest.NAME).is_file():
        return made.parent, adapter.require_whole(made.parent, export.STAGE)
    content = manifest.read_for(made)
    if damaged := manifest.changed(made.parent, content):
        raise SaigaError(f"{made.parent}: {', '.join(damaged)} changed since it was made; export it again.")
    return made.parent, content


def _linked(file: Path, to: Path) -> None:
    """Gigabytes are not copied where the file system can do without."""
    try:
        to.hardlink_to(file.resolve())
    except OSError:
        shutil.copyfile(file, to)


def _files(
    directory: Path, content: manifest.Manifest, scratch: Path, title: str
) -> tuple[dict[str, Path], dict[str, Any]]:
    """What is published of the stage, its texts made anew in `scratch`; and its manifest without places of here."""
    scratch.mkdir(exist_ok=True)
    files = {name: directory / name for name in content["outputs"] if name.endswith(_SHOWN)}
    texts = model_card.made_of(
        _by_type(file for name, file in files.items() if name.endswith(".gguf")),
        spec=registry.find(content["parameters"]["model"]),
        origin=model_card.origin(content["inputs"]),
        title=title,
        compared=_compared(directory, content) if (directory / manifest.NAME).is_file() else "",
    )
    published = adapter.public(content, files)
    return files | adapter.written(scratch, published, texts), published


def _by_type(files: Iterable[Path]) -> dict[str, Path]:
    """By the quant type that each GGUF names, the largest first."""
    import gguf

    found = {}
    for file in sorted(files, key=lambda file: -file.stat().st_size):
        with gguf_vocabulary(file) as llm:
            kind = gguf.LlamaFileType(int(llm.metadata["general.file_type"])).name
        found[kind.removeprefix("MOSTLY_").removeprefix("ALL_")] = file
    return found


def _compared(stage_dir: Path, content: manifest.Manifest) -> str:
    """The table of 04_infer beside the stage, and what quantising cost; empty where both are missing or of others."""
    tables = [quality.kept(stage_dir, content)]
    directory = stage_dir.parent / evaluate.STAGE
    if (directory / manifest.NAME).is_file():
        if manifest.read(directory)["inputs"].get("gguf") == content["outputs"]:
            tables.insert(0, results.show_table(results.read(directory)))
        else:
            print(f"{directory} compared another GGUF: its numbers are not in the model card.", flush=True)
    return "\n".join(markdown.of_table(found) for found in tables if found)
