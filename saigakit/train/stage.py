"""Train an adapter: the stage 02_train. Child processes do the work, one per GPU."""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from saigakit import data
from saigakit.config import TrainConfig
from saigakit.core import launch, manifest, workspace
from saigakit.core.files import replacing, scratch, sha256, sha256_of_text, write_text
from saigakit.core.launch import Nodes
from saigakit.core.manifest import Manifest
from saigakit.data import report
from saigakit.data.conversations import common_system_prompt
from saigakit.errors import SaigaError
from saigakit.prompt import template
from saigakit.train import checkpoints, curve, preflight
from saigakit.train.checkpoints import Store
from saigakit.train.preflight import Job
from saigakit.weights import base_files

STAGE = "02_train"
CONFIG_FILE = "train_config.json"


def train_adapter(config: TrainConfig) -> Path:
    """Make the stage 02_train in `config.output_dir`: adapter, log.jsonl, curve.png, samples.md and the config.

    Called again, it resumes a run that was killed, interrupted or ended by max_hours. Everything that can be checked
    before training is checked first. With SAIGAKIT_NODES only the first machine writes the stage. Raises SaigaError.
    """
    final, nodes = Path(config.output_dir), Nodes.from_environment()
    job = preflight.resolve(config, nodes)
    parameters, inputs = _identity_parameters(job.config), _hash_inputs(job)
    identity: dict[str, Any] = {"stage": STAGE, "parameters": parameters, "inputs": inputs}
    store = Store(checkpoints.directory_for(final), checkpoints.identity(parameters, inputs))
    config = with_resume_point(config, store.identity)
    resumes = can_resume(final, identity, config)
    if not resumes and manifest.is_up_to_date(final, **identity):
        if not _has_ended_by_max_hours(manifest.read(final)):
            store.delete()  # otherwise a run that resumed it may have been killed and left its checkpoints
        return final
    with store.lock(launch.SAVING_PATIENCE_S):
        checkpoint = find_checkpoint(config, store, final if resumes else None)
    if nodes is not None and nodes.rank > 0:
        with scratch() as directory:
            _run_children(job, store, checkpoint, directory, nodes)
        return final
    system_prompt = _system_prompt(job.train_file, inputs["train"])
    facts: dict[str, Any] = {"number_format": job.number_format, "system_prompt": system_prompt}
    with manifest.making(final, **identity, facts=facts, may_replace=resumes) as partial:
        _run_children(job, store, checkpoint, partial, nodes)
        result_file = partial / preflight.RESULT_FILE
        facts["training"] = json.loads(result_file.read_text(encoding="utf-8"))
        result_file.unlink()
        curve.plot(curve.read_log(partial)).savefig(partial / "curve.png", dpi=110)
        job.config.write(partial / CONFIG_FILE)
        if job.chat_template is not None:  # where 03_merge_gguf and other programs look for it
            write_text(partial / template.FILE, job.chat_template)
        if facts["training"]["ended"] == "max_hours" and (last := store.find_newest()) is not None:
            with replacing(partial / checkpoints.IN_STAGE) as copied:
                shutil.copytree(last, copied)
    store.delete()
    return final


def with_resume_point(config: TrainConfig, identity: Manifest) -> TrainConfig:
    """Set resume_from to the one attached training of this identity that did not reach its end."""
    if config.resume_from is not None or Path(config.output_dir).exists():
        return config
    found: dict[Path, tuple[Path, str]] = {}  # checkpoints next to a stage are those of its continuation
    for path, content, ending in _attached():
        if differing := manifest.differences(checkpoints.identity(content["parameters"], content["inputs"]), identity):
            print(f"Not resuming {path}, which is another run ({'; '.join(differing)}).", flush=True)
        else:
            found[path.parent] = path, ending
    if len(found) > 1:
        raise SaigaError(
            f"More than one attached {STAGE} can be resumed: {', '.join(str(path) for path, _ in found.values())}. "
            "Detach all but the last, or name its directory in resume_from."
        )
    for path, ending in found.values():
        print(f"Resuming {path}, {ending}.", flush=True)
        config = replace(config, resume_from=str(path))
    return config


def _attached() -> Iterator[tuple[Path, Manifest, str]]:
    """The attached trainings that can be resumed: a stage that ended by max_hours, or the checkpoints of a kill."""
    for root in workspace.input_roots():
        for file in sorted(root.rglob(f"{STAGE}/{manifest.NAME}")):
            if _has_ended_by_max_hours(content := manifest.read(file.parent)):
                yield file.parent, content, "which ended by max_hours"
        for store in sorted(root.rglob(checkpoints.directory_for(Path(STAGE)).name)):
            if (newest := next(checkpoints.intact(store), None)) is not None:
                yield store, checkpoints.read_mark(newest), "whose session was killed"


def _has_ended_by_max_hours(content: Manifest) -> bool:
    is_training = content["stage"] == STAGE and manifest.has_objects(content, "training")
    return is_training and content["training"].get("ended") == "max_hours"


def _hash_inputs(job: Job) -> dict[str, Any]:
    inputs: dict[str, Any] = {"train": manifest.hashes(job.train_file)}
    if job.eval_file is not None:
        inputs["held_out"] = manifest.hashes(job.eval_file)
    if job.config.replay_file is not None:
        inputs["replay"] = {str(number): sha256(file) for number, file in enumerate(job.replay_files)}
    if job.chat_template is not None:
        inputs["chat_template"] = sha256_of_text(job.chat_template)
    inputs["base"] = base_files.hashes(job.base_dir)
    inputs["adapter"] = None if job.adapter_dir is None else manifest.hashes(job.adapter_dir)
    return inputs


def _identity_parameters(config: TrainConfig) -> dict[str, Any]:
    """Only what changes the result: a finished stage is reused whatever time or processes it was given."""
    ignored = {*checkpoints.NOT_IDENTITY} - {"adapter", "base_source"}
    kept = {
        name: value
        for name, value in asdict(config).items()
        if not name.endswith(("_file", "_dir")) and name not in ignored
    }
    return kept | config.start


def can_resume(final: Path, identity: dict[str, Any], config: TrainConfig) -> bool:
    """Whether `final` is a stage of this identity that ended by max_hours, and there is time left to resume it."""
    if not final.exists():
        return False
    try:
        content = manifest.read(final)
    except SaigaError:  # manifest.is_up_to_date raises it, with what to do
        return False
    if not _has_ended_by_max_hours(content) or manifest.differences(content, manifest.as_stored(identity)):
        return False
    training = content["training"]
    where = f"{final}, which ended by max_hours at step {training['step']} of {training['steps']}"
    left_s = workspace.session_start() + config.max_hours * 3600 - workspace.uptime()
    if left_s < 2 * training["reserve_s"]:
        print(f"Not resuming {where}: max_hours={config.max_hours:g} leaves no time in this session.", flush=True)
        return False
    print(f"Resuming {where}.", flush=True)
    return True


def find_checkpoint(config: TrainConfig, store: Store, unfinished: Path | None) -> Path | None:
    """Find the checkpoint to resume from, copy it into the store and report it; None to start from the beginning."""
    named = None if config.resume_from is None else workspace.find_input(config.resume_from)
    found = store.find_newest(*(place for place in (unfinished, named) if place is not None))
    if found is None:
        if named is not None:
            raise SaigaError(
                f"resume_from={config.resume_from!r}: {named} has no intact checkpoint. Name a 02_train that ended by "
                "max_hours (it has checkpoint/) or a 02_train.checkpoints, or leave resume_from out to start again."
            )
        return None
    print(f"Resuming from step {checkpoints.step_of(found)} ({found}).", flush=True)
    before, now = checkpoints.read_mark(found)["versions"], manifest.versions()
    if changed := [f"{name} {before[name]} → {now.get(name)}" for name in before if now.get(name) != before[name]]:
        print(f"Library versions have changed, so results may differ slightly: {', '.join(changed)}.", flush=True)
    return store.adopt(found)


def _run_children(job: Job, store: Store, checkpoint: Path | None, directory: Path, nodes: Nodes | None) -> None:
    """Train in child processes, which write into `directory`."""
    resume_from = None if checkpoint is None else str(checkpoint)
    config = replace(job.config, output_dir=str(directory), resume_from=resume_from)
    job_file = replace(job, config=config, store=store).write(directory)
    launch.distributed("saigakit.train", [str(job_file)], processes=job.processes, nodes=nodes)
    job_file.unlink()


def _system_prompt(train_file: Path, hashes: Mapping[str, str]) -> str | None:
    """The common system prompt from the manifest of 01_format, or from the records if that does not describe them."""
    if (train_file.parent / manifest.NAME).is_file():
        formatted = manifest.read(train_file.parent)
        is_described = hashes == {report.TRAIN_FILE: formatted["outputs"].get(report.TRAIN_FILE)}
        if is_described and "system_prompt" in formatted:
            prompt: str | None = formatted["system_prompt"]
            return prompt
    return common_system_prompt(data.read_conversations(train_file))
