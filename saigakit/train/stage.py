"""Train an adapter: the stage 02_train. Child processes do the work, one per GPU: see train.__main__."""

import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from saigakit import data
from saigakit.config import TrainConfig
from saigakit.core import launch, manifest, workspace
from saigakit.core.files import sha256
from saigakit.data import report, sources
from saigakit.data.conversations import common_system_prompt
from saigakit.errors import SaigaError
from saigakit.train import checkpoints, curve, preflight, run_state
from saigakit.train.checkpoints import Store
from saigakit.train.job import Job
from saigakit.weights import base_files

STAGE = "02_train"
CONFIG_FILE = "train_config.json"
_OF_A_SESSION = {*checkpoints.NOT_IDENTITY} - {"adapter"}  # may differ between two sessions of one training


def with_resume_point(config: TrainConfig) -> TrainConfig:
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
        hashes = [sha256(path) for path in found]
        if hashes != list((content["inputs"].get(part) or {}).values()):
            names.append(f"{name} records")
    return names


def goes_on(final: Path, identity: dict[str, Any], config: TrainConfig) -> bool:
    """Whether a stage of the same identity is there that ended by max_hours, and there is time to go on."""
    if not final.exists():
        return False
    try:
        content = manifest.read(final)
    except SaigaError:  # which manifest.is_up_to_date tells, and what to do
        return False
    training = content.get("training", {})
    if training.get("ended") != "max_hours" or content["stage"] != identity["stage"]:
        return False
    if manifest.differences(content, json.loads(json.dumps(identity, default=str))):
        return False
    where = f"{final} ended by max_hours at step {training['step']} of {training['steps']}"
    left_s = workspace.session_start() + config.max_hours * 3600 - time.time()
    if left_s < 2 * training["reserve_s"]:
        print(f"{where}, and max_hours={config.max_hours:g} leave no time to go on in this session.", flush=True)
        return False
    print(f"{where}: it goes on.", flush=True)
    return True


def find_start(config: TrainConfig, store: Store, unfinished: Path | None) -> Path | None:
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


def train_adapter(config: TrainConfig) -> Path:
    """The stage 02_train in `config.output_dir`: adapter, log.jsonl, curve.png, samples.md and the config.

    A run that was killed or asked to end goes on from its last checkpoint when it is called again; one that ended by
    max_hours is a stage with checkpoint/ in it, and goes on from there, or elsewhere with `resume_from`.
    Everything that can be known in the first minute is refused in it. On the machines of SAIGAKIT_NODES but the first
    it only lends its processes. Raises SaigaError.
    """
    config = with_resume_point(config)
    final = Path(config.output_dir)
    files = {"train": config.train_file, "held_out": config.eval_file}
    found = {name: workspace.find_input(file, run_dir=final.parent) for name, file in files.items() if file}
    config = _as_formatted(config, found["train"].parent)
    gpus = workspace.gpus()
    number_format = preflight.machine(config, gpus)
    gpus = gpus[: config.processes]
    nodes = launch.Nodes.from_environment()
    machines = 1 if nodes is None else nodes.count
    preflight.sharding(config, gpus, machines)
    processes = config.processes or len(gpus) or 1
    job = Job.of(config, number_format)
    needed = job.memory_needed(processes=processes * machines)
    preflight.fits(needed, gpus, processes, pack="one conversation of max_seq_length")
    preflight.sharded_lora(config, job.lora)
    preflight.sharded_loading(config, job.shape, processes)
    preflight.disk(final, job.shape, job.lora)
    inputs: dict[str, Any] = {name: manifest.hashes(file) for name, file in found.items()}
    if config.replay_file is not None:
        general = sources.records_files(config.replay_file, final.parent)
        inputs["replay"] = {str(number): sha256(file) for number, file in enumerate(general)}
        found |= {"replay": general[0]} if len(general) == 1 else {}  # several are looked up again by their name
    inputs["base"] = base_files.hashes(job.base_dir)
    inputs["adapter"] = None if job.adapter_dir is None else manifest.hashes(job.adapter_dir)
    identity: dict[str, Any] = {"stage": STAGE, "parameters": _parameters(config), "inputs": inputs}
    store = Store(checkpoints.beside(final), checkpoints.identity(identity["parameters"], inputs))
    continues = goes_on(final, identity, config)
    if not continues and manifest.is_up_to_date(final, **identity):
        if manifest.read(final).get("training", {}).get("ended") != "max_hours":
            store.delete()  # else a run that went on from it may have been killed
        return final
    with store.alone(launch.SAVING_PATIENCE_S):
        start = find_start(config, store, final if continues else None)
    prompt = _system_prompt(found["train"], inputs["train"])
    facts: dict[str, Any] = {"number_format": number_format, "system_prompt": prompt}
    if nodes is not None and nodes.rank > 0:
        with tempfile.TemporaryDirectory() as scratch:
            _run_child(job, found, store, start, Path(scratch), processes, nodes)
        return final
    with manifest.making(final, **identity, facts=facts, may_replace=continues) as partial:
        _run_child(job, found, store, start, partial, processes, nodes)
        result_file = partial / run_state.RESULT_FILE
        facts["training"] = json.loads(result_file.read_text(encoding="utf-8"))
        result_file.unlink()
        curve.plot(curve.read(partial)).savefig(partial / "curve.png", dpi=110)
        config.write(partial / CONFIG_FILE)
        if facts["training"]["ended"] == "max_hours" and (last := store.newest()) is not None:
            _copy(last, partial / checkpoints.IN_STAGE)
    store.delete()
    return final


def _copy(checkpoint: Path, target: Path) -> None:
    try:
        shutil.copytree(checkpoint, target)
    except OSError as error:
        raise SaigaError(
            f"{checkpoint} cannot be copied into the stage ({error}). It is whole where it is: make room, then call it "
            "again with the same run_dir."
        ) from None


def _run_child(
    job: Job,
    found: Mapping[str, Path],
    store: Store,
    start: Path | None,
    directory: Path,
    processes: int,
    nodes: launch.Nodes | None,
) -> None:
    """Writes into `directory`; the job that it reads names the files that were found."""
    paths: dict[str, Any] = {"output_dir": str(directory), "resume_from": start and str(start)}
    for key, name in (("train_file", "train"), ("eval_file", "held_out"), ("replay_file", "replay")):
        if name in found:
            paths[key] = str(found[name])
    job_file = replace(job, config=replace(job.config, **paths)).write(directory)
    store_file = store.for_child(directory)
    launch.distributed("saigakit.train", [str(job_file)], processes=processes, nodes=nodes)
    job_file.unlink()
    store_file.unlink()


def _parameters(config: TrainConfig) -> dict[str, Any]:
    """Those that say what is made: a finished stage is the same one whatever time it was given, and is kept."""
    how = {*checkpoints.NOT_IDENTITY} - {"adapter", "base_source"}
    named = {
        name: value
        for name, value in config.to_json().items()
        if not name.endswith(("_file", "_dir")) and name not in how
    }
    return named | config.start


def _as_formatted(config: TrainConfig, directory: Path) -> TrainConfig:
    """Records that 01_format made are of one model and one longest length, and it is not asked for again."""
    if not (directory / manifest.NAME).is_file():
        return config
    formatted = manifest.require_stage(directory, "01_format", model=config.model)
    return replace(config, max_seq_length=config.max_seq_length or formatted["parameters"]["max_seq_length"])


def _system_prompt(train_file: Path, hashes: Mapping[str, str]) -> str | None:
    """As 01_format noted it; a file that it did not write, or wrote without this note, is read."""
    if (train_file.parent / manifest.NAME).is_file():
        formatted = manifest.read(train_file.parent)
        is_its = hashes == {report.TRAIN_FILE: formatted["outputs"].get(report.TRAIN_FILE)}
        if is_its and "system_prompt" in formatted:
            prompt: str | None = formatted["system_prompt"]
            return prompt
    return common_system_prompt(data.read_conversations(train_file))
