"""Upload files to a Hub repository in one commit and verify what arrived."""

import json
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from saigakit import registry
from saigakit.core import hub, manifest, workspace
from saigakit.core.files import scratch, sha256, write_text
from saigakit.core.lazy import huggingface_hub
from saigakit.errors import SaigaError
from saigakit.weights import base_files, find, lineage

_OF_THE_HUB = {".gitattributes", "README.md"}  # the Hub makes them itself
_YANDEXGPT_CAP = "YandexGPT's licence: from 10 million output tokens a month on you need an agreement with Yandex."


def require_unchanged(directory: Path, stage: str) -> manifest.Manifest:
    """The manifest of a finished stage. Raises SaigaError if one of its files has changed."""
    content = manifest.require_stage(directory, stage)
    if damaged := manifest.changed(directory, content):
        raise SaigaError(f"{directory}: {', '.join(damaged)} changed since it was made. Run {stage} again.")
    return content


def print_terms(model: str) -> None:
    """Print the cap in section I.b of YandexGPT's licence if the base of `model` is a YandexGPT."""
    if "yandexgpt" in registry.find(model).base_model.lower():
        print(_YANDEXGPT_CAP, flush=True)


def public_manifest(content: Mapping[str, Any], kept: Container[str], run_dir: Path) -> dict[str, Any]:
    """The manifest as the next stage reads it, for the files `kept`, without names of other local files."""
    parameters = {name: value for name, value in content["parameters"].items() if name != "base_source"}
    model = parameters["model"]
    parameters["model"] = model if public(model, run_dir) == model else Path(model).name
    parameters["adapter"] = public(parameters.get("adapter"), run_dir)
    inputs = {part: _numbered(found) if isinstance(found, dict) else found for part, found in content["inputs"].items()}
    outputs = {name: digest for name, digest in content["outputs"].items() if name in kept}
    return {**content, "parameters": parameters, "inputs": inputs, "outputs": outputs}


def public(value: object, run_dir: Path) -> object:
    """`value`, or in a list each of them, unless it is text that names neither a repository nor a packaged adapter."""
    if isinstance(value, list):
        return [public(each, run_dir) for each in value]
    if not isinstance(value, str) or value in ("released", "folded") or value.startswith("package:"):
        return value
    is_repository = hub.is_hub_id(value.partition("@")[0])
    return value if is_repository and not workspace.is_local(value, run_dir) else "a local path"


def _numbered(hashes: Mapping[str, str]) -> dict[str, str]:
    """Numbers in place of file names, except those of weights, by which a base is compared, and of a tokenizer."""
    kept = {*base_files.weight_files(hashes), *dict(base_files.WEIGHT_FORMATS), *find.IDS_DEPEND_ON}
    return {name if name in kept else f"{i}": digest for i, (name, digest) in enumerate(hashes.items())}


def write_texts(directory: Path, content: manifest.Manifest, texts: Mapping[str, str]) -> dict[str, Path]:
    """Write `texts` and the manifest; returns the files by name."""
    texts = {**texts, manifest.NAME: json.dumps(content, ensure_ascii=False, indent=2)}
    return {name: write_text(directory / name, text) for name, text in texts.items()}


class HubRepository:
    """One repository, and the only holder of the token."""

    def __init__(self, repo_id: str) -> None:
        """Raises SaigaError for a bad name or without the secret HF_TOKEN."""
        self.repo_id, self.api = repo_id, huggingface_hub.HfApi(token=hub.writing_token())
        if not hub.is_hub_id(repo_id):
            raise SaigaError(
                f"repo_id={repo_id!r} is not the name of a repository. Give 'owner/name', with Latin letters, digits, "
                "'-', '_' and '.', where owner is your name on the Hub or that of your organisation."
            )

    def push(
        self, files: Mapping[str, Path], content: Mapping[str, Any], message: str, *, private: bool, replace: bool
    ) -> str:
        """Replace what the repository holds by `files`, with the manifest `content`; returns its address."""
        with hub.uploading(self.repo_id):
            names = self._open(content, private=private, replace=replace)
            size = sum(file.stat().st_size for file in files.values())
            print(f"Uploading to {self.repo_id}, files: {len(files)}, {size / 1e6:,.1f} MB …", flush=True)
            added = [huggingface_hub.CommitOperationAdd(name, str(file)) for name, file in files.items()]
            removed = [huggingface_hub.CommitOperationDelete(name) for name in names if name not in files]
            commit = self.api.create_commit(self.repo_id, [*added, *removed], commit_message=message)
            self._require_arrived(files, commit.oid)
        url = f"{self.api.endpoint}/{self.repo_id}"
        print(f"All files ({len(files)}) arrived: {url}", flush=True)
        return url

    def _open(self, content: Mapping[str, Any], *, private: bool, replace: bool) -> list[str]:
        """The names of our files in the repository, which is created if it does not exist."""
        try:
            info = self.api.model_info(self.repo_id)
        except huggingface_hub.errors.RepositoryNotFoundError:
            self.api.create_repo(self.repo_id, private=private)
            return []
        if private and not info.private:
            raise SaigaError(
                f"{self.repo_id} exists and is public, but private=True. Make it private in its settings on the Hub, "
                "push with private=False, or choose another repo_id."
            )
        names = [file.rfilename for file in info.siblings or [] if file.rfilename not in _OF_THE_HUB]
        if names and not replace:
            self._require_same_model(names, content)
        return names

    def _require_same_model(self, names: list[str], content: Mapping[str, Any]) -> None:
        """Raises SaigaError if the repository holds something other than an earlier push of the same model."""
        what = f"{len(names)} files ({', '.join(names[:5])}{', …' if len(names) > 5 else ''})"
        if manifest.NAME in names:
            there, ours = _identity(self._fetch(manifest.NAME, None)), _identity(json.dumps(content))
            if there == ours:
                return
            if there[0] is not None:
                is_same_model = there[:2] == ours[:2]
                what = f"{there[0]} of model={there[1]!r}" + (", on other base weights" if is_same_model else "")
        raise SaigaError(
            f"{self.repo_id} exists and holds {what}; nothing was overwritten. Choose another repo_id, or push with "
            "replace=True to replace its files."
        )

    def _require_arrived(self, files: Mapping[str, Path], commit: str) -> None:
        """Compare all sizes, the SHA-256 that the Hub has of large files, and small files byte by byte."""
        tree = self.api.list_repo_tree(self.repo_id, recursive=True, revision=commit)
        found = {item.path: item for item in tree if isinstance(item, huggingface_hub.hf_api.RepoFile)}
        for name, file in files.items():
            if name not in found:
                raise SaigaError(f"{name} did not arrive in {self.repo_id}. Push it again.")
            size, digest = file.stat().st_size, sha256(file)
            if found[name].size != size:
                problem = f"has {found[name].size:,} bytes in {self.repo_id} and {size:,} here"
            elif (lfs := found[name].lfs) is not None and lfs.sha256 != digest:
                problem = f"has the SHA-256 {lfs.sha256} in {self.repo_id} and {digest} here"
            elif lfs is None and self._fetch(name, commit) != file.read_bytes():
                problem = f"has different content in {self.repo_id} than here"
            else:
                continue
            raise SaigaError(f"{name} {problem}: it was damaged in transfer. Delete it there and push again.")

    def _fetch(self, name: str, revision: str | None) -> bytes:
        with scratch() as cache:
            return Path(self.api.hf_hub_download(self.repo_id, name, revision=revision, cache_dir=cache)).read_bytes()


def _identity(text: str | bytes) -> tuple[Any, Any, Any]:
    """Stage, model and hashes of the base's weights in a manifest; None for each if it is not a manifest."""
    try:
        content = json.loads(text)
        base = content["inputs"]["base"]
        weights = lineage.weight_hashes(base) if isinstance(base, dict) else base
        return content["stage"], content["parameters"]["model"], weights
    except (ValueError, KeyError, TypeError):
        return None, None, None
