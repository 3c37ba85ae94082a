"""Publish what a notebook has made, if the secrets HF_TOKEN and HF_REPO are there."""

import shlex
from pathlib import Path

from saigakit import export
from saigakit.core import hub, workspace
from saigakit.errors import masked
from saigakit.publish.adapter import push_adapter
from saigakit.publish.gguf_file import push_to_hub


def if_asked(stage_dir: str | Path) -> None:
    """Push a finished 02_train to HF_REPO with _lora added, or a 03_merge_gguf with _gguf, as private repositories.

    A failure is printed with the command that publishes later: raised, it would mark hours of work as failed.
    """
    directory, repo = Path(stage_dir), workspace.secret(hub.REPO)
    is_gguf = directory.name == export.STAGE
    name = f"{repo or 'OWNER/NAME'}{'_gguf' if is_gguf else '_lora'}"
    run_dir = Path("runs") / directory.name if workspace.on_kaggle() else directory.parent
    fetch = f"saigakit fetch {directory.name} {run_dir} && " if workspace.on_kaggle() else ""
    later = f"{fetch}saigakit publish {shlex.quote(str(run_dir))} {name}{' --gguf' if is_gguf else ''}"
    try:
        if repo is not None:
            (push_to_hub if is_gguf else push_adapter)(directory, name)
        else:
            lacking = f"the secrets HF_TOKEN and {hub.REPO}" if hub.token() is None else f"the secret {hub.REPO}"
            print(f"To publish it, set {lacking} (owner/name) before the notebook runs, or later: {later}", flush=True)
    except Exception as error:
        print(masked(f"Not published: {error} To publish it later: {later}"), flush=True)
