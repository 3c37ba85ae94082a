"""Attached inputs into the training of an earlier session that max_hours ended, so that this one goes on with it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from saigakit import checkpoints, manifest, sources, workspace
from saigakit.config import TrainConfig
from saigakit.errors import SaigaError

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
