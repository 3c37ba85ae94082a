"""Train an adapter: the stage 02_train. Child processes do the work, one per GPU: see train.worker."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from saigakit import data
from saigakit.config import TrainConfig
from saigakit.core import launch, manifest, workspace
from saigakit.data import sources
from saigakit.errors import SaigaError
from saigakit.train import checkpoints, curve, loading, preflight, resuming, training_run
from saigakit.train.checkpoints import Store
from saigakit.weights import base_files, find, memory

STAGE = "02_train"
CONFIG_FILE = "train_config.json"


def train_adapter(config: TrainConfig) -> Path:
    """The stage 02_train in `config.output_dir`: adapter, log.jsonl, curve.png, samples.md and the config.

    A run that was killed or asked to end goes on from its last checkpoint when it is called again; one that ended by
    max_hours is a stage with checkpoint/ in it, and goes on from there, or elsewhere with `resume_from`.
    Everything that can be known in the first minute is refused in it. On the machines of SAIGAKIT_NODES but the first
    it only lends its processes. Raises SaigaError.
    """
    config = resuming.resumed(config)
    final = Path(config.output_dir)
    files = {"train": config.train_file, "held_out": config.eval_file}
    found = {name: workspace.find_input(file, run_dir=final.parent) for name, file in files.items() if file}
    config = _as_formatted(config, found["train"].parent)
    number_format = preflight.machine(config, workspace.gpus())
    gpus = workspace.gpus()[: config.processes]
    nodes = launch.Nodes.of_environment()
    machines = 1 if nodes is None else nodes.count
    preflight.sharding(config, gpus, machines)
    processes = config.processes or len(gpus) or 1
    base_dir = find.base_dir(config.spec, config.base_source)
    adapter_dir = None if config.start_adapter is None else find.adapter_dir(config.spec, config.start_adapter)
    lora = preflight.model(config, base_dir, adapter_dir)
    shape = memory.Shape.of(base_dir)
    needed = loading.memory_needed(config, shape, lora, number_format, processes=processes * machines)
    preflight.fits(needed, gpus, processes, pack="one conversation of max_seq_length")
    preflight.sharded_lora(config, lora)
    preflight.sharded_loading(config, shape, processes)
    preflight.disk(final, shape, lora)
    inputs: dict[str, Any] = {name: manifest.hashes(file) for name, file in found.items()}
    if config.replay_file is not None:
        general = sources.records_files(config.replay_file, final.parent)
        inputs["replay"] = {str(number): manifest.sha256(file) for number, file in enumerate(general)}
        found |= {"replay": general[0]} if len(general) == 1 else {}  # several are looked up again by their name
    inputs["base"] = base_files.hashes(base_dir)
    inputs["adapter"] = None if adapter_dir is None else manifest.hashes(adapter_dir)
    identity: dict[str, Any] = {"stage": STAGE, "parameters": _parameters(config), "inputs": inputs}
    store = Store(checkpoints.beside(final), checkpoints.identity(identity["parameters"], inputs))
    goes_on = resuming.goes_on(final, identity, config)
    if not goes_on and manifest.is_kept(final, **identity):
        if manifest.read(final).get("training", {}).get("ended") != "max_hours":
            store.delete()  # else a run that went on from it may have been killed
        return final
    with store.alone(launch.SAVING_PATIENCE_S):
        start = resuming.start(config, store, final if goes_on else None)
    prompt = data.common_system_prompt(data.read_conversations(found["train"]))
    facts: dict[str, Any] = {"number_format": number_format, "system_prompt": prompt}
    if nodes is not None and nodes.rank > 0:
        with tempfile.TemporaryDirectory() as scratch:
            _run_child(config, found, store, start, Path(scratch), processes, nodes)
        return final
    with manifest.making(final, **identity, facts=facts, goes_on=goes_on) as partial:
        _run_child(config, found, store, start, partial, processes, nodes)
        result_file = partial / training_run.RESULT_FILE
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
    config: TrainConfig,
    found: Mapping[str, Path],
    store: Store,
    start: Path | None,
    directory: Path,
    processes: int,
    nodes: launch.Nodes | None,
) -> None:
    """Writes into `directory`; the config that it reads names the files that were found."""
    paths: dict[str, Any] = {"output_dir": str(directory), "resume_from": start and str(start)}
    for key, name in (("train_file", "train"), ("eval_file", "held_out"), ("replay_file", "replay")):
        if name in found:
            paths[key] = str(found[name])
    child_config = replace(config, **paths).write(directory / CONFIG_FILE)
    store_file = store.for_child(directory)
    launch.distributed("saigakit.train.worker", [str(child_config)], processes=processes, nodes=nodes)
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
