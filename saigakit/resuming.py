"""What an earlier session or a killed run has left into where training goes on, aloud."""

import json
import time
from pathlib import Path
from typing import Any

from saigakit import checkpoints, manifest, workspace
from saigakit.checkpoints import Store
from saigakit.config import TrainConfig
from saigakit.errors import SaigaError


def goes_on(final: Path, identity: dict[str, Any], config: TrainConfig) -> bool:
    """Whether a stage of the same identity is there that ended by max_hours, and there is time to go on."""
    if not final.exists():
        return False
    try:
        content = manifest.read(final)
    except SaigaError:  # which manifest.is_kept tells, and what to do
        return False
    training = content.get("training", {})
    if training.get("ended") != "max_hours" or content["stage"] != identity["stage"]:
        return False
    if manifest.differing(content, json.loads(json.dumps(identity, default=str))):
        return False
    where = f"{final} ended by max_hours at step {training['step']} of {training['steps']}"
    left_s = workspace.session_start() + config.max_hours * 3600 - time.time()
    if left_s < 2 * training["reserve_s"]:
        print(f"{where}, and max_hours={config.max_hours:g} leave no time to go on in this session.", flush=True)
        return False
    print(f"{where}: it goes on.", flush=True)
    return True


def start(config: TrainConfig, store: Store, unfinished: Path | None) -> Path | None:
    """The checkpoint to go on from, in the store; None for the beginning. What it will do differently is said."""
    named = None if config.resume_from is None else workspace.find_input(config.resume_from)
    sources = [source for source in (unfinished, named) if source is not None]
    found = store.newest(*sources)
    if found is None:
        if named is not None:
            raise SaigaError(
                f"resume_from={config.resume_from!r}: {named} holds no whole checkpoint. Name a 02_train that ended by "
                "max_hours (its directory holds checkpoint/), or leave resume_from out to begin anew."
            )
        return None
    print(f"Training goes on from step {checkpoints.step_of(found)}, saved in {found}.", flush=True)
    now = manifest.versions()
    others = [
        f"{name} {was}, now {now.get(name)}"
        for name, was in checkpoints.made_with(found).items()
        if now.get(name) != was
    ]
    if others:
        print(f"It was made with {'; '.join(others)}: numbers may differ in their last digits.", flush=True)
    return store.bring(found)
