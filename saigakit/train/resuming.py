"""What an earlier session or a killed run has left into where training goes on, aloud."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from saigakit.config import TrainConfig
from saigakit.core import manifest, workspace
from saigakit.data import sources
from saigakit.errors import SaigaError
from saigakit.train import checkpoints
from saigakit.train.checkpoints import Store

STAGE = "02_train"
_OF_A_SESSION = {*checkpoints.NOT_IDENTITY} - {"adapter"}  # may differ between two sessions of one training


def resumed(config: TrainConfig) -> TrainConfig:
    """`config` with resume_from, where an attached 02_train of the same parameters and records ended by max_hours.

    One that differs is named with what differs, and training begins anew. Raises SaigaError where there are two.
    """
    if config.resume_from is not None or Path(config.output_dir).exists():
        return config
    found = []
    for root in workspace.input_roots():
        for file in sorted(root.rglob(f"{STAGE}/{manifest.NAME}")):
            content = manifest.read(file.parent)
            if content["stage"] != STAGE or content.get("training", {}).get("ended") != "max_hours":
                continue
            if differing := _differing(content, config):
                names = ", ".join(differing)
                print(f"{file.parent} ended by max_hours and is not continued: other {names}.", flush=True)
            else:
                found.append(file.parent)
    if len(found) > 1:
        raise SaigaError(
            f"More than one attached {STAGE} ended by max_hours: {', '.join(map(str, found))}. Detach all but the last "
            "one, or give its directory as resume_from."
        )
    if not found:
        return config
    print(f"{found[0]} ended by max_hours: training goes on from there.", flush=True)
    return replace(config, resume_from=str(found[0]))


def _differing(content: dict[str, Any], config: TrainConfig) -> list[str]:
    # A stage without "folded" is of a version that continued the adapter.
    there = {"folded": False, **content["parameters"]}
    now = json.loads(json.dumps(config.to_json() | config.start))
    kept = (name for name in now if name in there and name not in _OF_A_SESSION)
    # 01_format tells the longest conversation where the config leaves it open.
    names = [name for name in kept if now[name] != there[name] and (name, now[name]) != ("max_seq_length", None)]
    files = (("train", "training"), ("held_out", "held-out"), ("replay", "replay"))
    for (part, name), file in zip(files, (config.train_file, config.eval_file, config.replay_file), strict=True):
        found = sources.records_files(file, Path(config.output_dir).parent) if file else []
        hashes = [manifest.sha256(path) for path in found]
        if hashes != list((content["inputs"].get(part) or {}).values()):
            names.append(f"{name} records")
    return names


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
    found = store.newest(*(place for place in (unfinished, named) if place is not None))
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
