"""Publish a trained adapter with its model card on the Hub."""

import tempfile
from pathlib import Path

from saigakit import train
from saigakit.prompt import encoding
from saigakit.publish import adapter_card, upload

_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_SHOWN = ("log.jsonl", "curve.png")  # what the card shows; samples.md contains records and stays here


def push_adapter(stage_dir: str | Path, repo_id: str, *, private: bool = True, replace: bool = False) -> str:
    """Push the adapter of a finished 02_train and its card to `repo_id` ("owner/name"); returns the address.

    It is one commit: the repository changes when everything has arrived, or not at all. Of the records only their
    SHA-256 and common system prompt are published. Needs the secret HF_TOKEN with write access. Raises SaigaError, also
    if the repository holds anything but an earlier adapter of this model and base; `replace` then replaces the files,
    which stay in git's history.
    """
    directory = Path(stage_dir)
    content = upload.require_unchanged(directory, train.STAGE)
    repository = upload.HubRepository(repo_id)
    model = content["parameters"]["model"]
    tokenizer = encoding.load_tokenizer(model, content["parameters"].get("base_source"))
    with tempfile.TemporaryDirectory() as scratch:
        files = {name: directory / name for name in (*_ADAPTER, *_SHOWN) if (directory / name).is_file()}
        published = upload.public_manifest(content, _ADAPTER)
        card = adapter_card.build_card(directory, repo_id, tokenizer)
        files |= upload.write_texts(Path(scratch), published, {"README.md": card})
        message = f"Adapter of {model}, trained with saigakit"
        return repository.push(files, published, message, private=private, replace=replace)
