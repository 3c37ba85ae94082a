"""A finished adapter and its model card into a repository of the Hub, and a look at whether all of it arrived."""

import json
import tempfile
from collections.abc import Container, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saigakit import train
from saigakit.core import hub, manifest
from saigakit.core.files import sha256, write_text
from saigakit.errors import SaigaError
from saigakit.prompt import encoding
from saigakit.publish import card
from saigakit.weights import lineage

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_SHOWN = ("log.jsonl", "curve.png")  # what the card tells of; samples.md holds records and stays
_HUBS_OWN = {".gitattributes", "README.md"}


def push_adapter(stage_dir: str | Path, repo_id: str, *, private: bool = True, replace: bool = False) -> str:
    """The address of the repository `repo_id` ("owner/name") with the adapter of a finished 02_train and its card.

    One commit: the repository changes when everything has arrived, or not at all. Of the records it gets their
    SHA-256 and their common system prompt. Needs a token that may write in the secret HF_TOKEN.
    Raises SaigaError, also where the repository holds something other than an earlier adapter of this model on these
    weights; with `replace` its files give way (git keeps them in its history).
    """
    directory = Path(stage_dir)
    content = require_whole(directory, train.STAGE)
    token = hub.writing_token()
    require_name(repo_id)
    model = content["parameters"]["model"]
    tokenizer = encoding.load_tokenizer(model, content["parameters"].get("base_source"))
    with tempfile.TemporaryDirectory() as scratch:
        files = {name: directory / name for name in (*_ADAPTER, *_SHOWN) if (directory / name).is_file()}
        published = public(content, _ADAPTER)
        files |= written(Path(scratch), published, {"README.md": card.write(directory, repo_id, tokenizer)})
        with hub.uploading(repo_id, token):
            what = f"Adapter of {model}, trained with saigakit"
            return Push(repo_id, token).all_of(files, published, what, private=private, replace=replace)


def written(directory: Path, published: manifest.Manifest, texts: Mapping[str, str]) -> dict[str, Path]:
    texts = {**texts, manifest.NAME: json.dumps(published, ensure_ascii=False, indent=2)}
    return {name: write_text(directory / name, text) for name, text in texts.items()}


def require_whole(directory: Path, stage: str) -> manifest.Manifest:
    """The manifest of a finished stage. Raises SaigaError where a file of it has changed."""
    content = manifest.require_stage(directory, stage)
    if damaged := manifest.changed(directory, content):
        raise SaigaError(f"{directory}: {', '.join(damaged)} changed since it was made; run {stage} again.")
    return content


def require_name(repo_id: str) -> None:
    if not hub.is_hub_id(repo_id):
        raise SaigaError(
            f"repo_id={repo_id!r} is no name of a repository: give 'owner/name', of Latin letters, digits, '-', '_' "
            "and '.', where owner is your name on the Hub or that of your organisation."
        )


def public(content: Mapping[str, Any], kept: Container[str]) -> dict[str, Any]:
    """The manifest as the next stage reads it, of the files `kept`, without names of places on this machine."""
    parameters = {name: _without_place(value) for name, value in content["parameters"].items() if name != "base_source"}
    outputs = {name: digest for name, digest in content["outputs"].items() if name in kept}
    return {**content, "parameters": parameters, "outputs": outputs}


def _without_place(value: object) -> object:
    if isinstance(value, list):
        return [_without_place(each) for each in value]
    is_place = isinstance(value, str) and (value.startswith(("/", ".", "~")) or Path(value).exists())
    return Path(str(value)).name if is_place else value


class Push:
    """One repository, and the token that is told to nobody else."""

    def __init__(self, repo_id: str, token: str) -> None:
        from huggingface_hub import HfApi

        self.repo_id = repo_id
        self.api = HfApi(token=token)

    def all_of(
        self, files: Mapping[str, Path], content: Mapping[str, Any], what: str, *, private: bool, replace: bool
    ) -> str:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        there = self._there()
        names = [] if there is None else [file.rfilename for file in there.siblings or []]
        if there is None:
            self.api.create_repo(self.repo_id, private=private)
        else:
            self._require_private(there, private)
            self._require_earlier(names, content, replace)
        size = sum(file.stat().st_size for file in files.values())
        print(f"Uploading {len(files)} files, {size / 1e6:,.1f} MB, to {self.repo_id} …", flush=True)
        gone = [name for name in names if name not in files and name not in _HUBS_OWN]
        commit = self.api.create_commit(
            self.repo_id,
            [
                *(CommitOperationAdd(name, str(file)) for name, file in files.items()),
                *(CommitOperationDelete(name) for name in gone),
            ],
            commit_message=what,
        )
        self._require_arrived(files, commit.oid)
        url = f"{self.api.endpoint}/{self.repo_id}"
        print(f"All {len(files)} files arrived: {url}", flush=True)
        return url

    def _there(self) -> "ModelInfo | None":
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            return self.api.model_info(self.repo_id)
        except RepositoryNotFoundError:
            return None

    def _require_private(self, there: "ModelInfo", private: bool) -> None:
        if private and not there.private:
            raise SaigaError(
                f"{self.repo_id} is there and public, and private=True. Make it private in its settings on the Hub, "
                "push with private=False, or choose another repo_id."
            )

    def _require_earlier(self, names: list[str], content: Mapping[str, Any], replace: bool) -> None:
        """Raises SaigaError where the repository holds something else and may not be replaced."""
        held = [name for name in names if name not in _HUBS_OWN]
        if replace or not held:
            return
        what = f"{len(held)} files ({', '.join(held[:5])}{', …' if len(held) > 5 else ''})"
        if manifest.NAME in held:
            made, now = _made(self._fetched(manifest.NAME, None)), _made(json.dumps(content))
            if made == now:
                return
            if made[0] is not None:
                what = f"{made[0]} of model={made[1]!r}" + (", on other base weights" if made[:2] == now[:2] else "")
        raise SaigaError(
            f"{self.repo_id} is there and holds {what}; nothing was overwritten. Choose another repo_id, or push with "
            "replace=True: then its files give way."
        )

    def _require_arrived(self, files: Mapping[str, Path], commit: str) -> None:
        """Sizes of all files, SHA-256 of the large ones as the Hub has it, of the small ones fetched again."""
        from huggingface_hub.hf_api import RepoFile

        listed = self.api.list_repo_tree(self.repo_id, recursive=True, revision=commit)
        found = {item.path: item for item in listed if isinstance(item, RepoFile)}
        for name, file in files.items():
            if name not in found:
                raise SaigaError(f"{name} did not arrive in {self.repo_id}. Push it again.")
            size, digest = file.stat().st_size, sha256(file)
            if found[name].size != size:
                problem = f"has {found[name].size:,} bytes in {self.repo_id} and {size:,} here"
            elif (lfs := found[name].lfs) is not None and lfs.sha256 != digest:
                problem = f"has the SHA-256 {lfs.sha256} in {self.repo_id} and {digest} here"
            elif lfs is None and self._fetched(name, commit) != file.read_bytes():
                problem = f"has another content in {self.repo_id} than here"
            else:
                continue
            raise SaigaError(f"{name} {problem}: it was damaged on the way. Delete it there and push again.")

    def _fetched(self, name: str, revision: str | None) -> bytes:
        with tempfile.TemporaryDirectory() as scratch:
            return Path(self.api.hf_hub_download(self.repo_id, name, revision=revision, cache_dir=scratch)).read_bytes()


def _made(text: str | bytes) -> tuple[Any, Any, Any]:
    """Stage, model and hashes of the base's weights in a manifest; nothing where it is none."""
    try:
        content = json.loads(text)
        base = content["inputs"]["base"]
        weights = lineage.weights_of(base) if isinstance(base, dict) else base
        return content["stage"], content["parameters"]["model"], weights
    except (ValueError, KeyError, TypeError):
        return None, None, None
