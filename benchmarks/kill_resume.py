"""Kill training with SIGKILL at random moments and check that the resumed run is bit-identical.

python benchmarks/kill_resume.py [--kills 50] [--processes 1]

Most kills hit while a checkpoint is being saved. Each killed run of the tiny Saiga (nf4, dropout 0.05, a checkpoint
after every step) is started again and must end with the same adapter and logged losses as a run that was never killed.
Each call of train_adapter runs in a separate process, forked from one that has already imported the libraries; it
trains in that process and in forks of it.
"""

import argparse
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import psutil

from saigakit import train
from saigakit.config import TrainConfig
from saigakit.core import launch
from saigakit.core.display import Table
from saigakit.core.files import sha256
from saigakit.demo import packages
from saigakit.errors import SaigaError
from saigakit.train import checkpoints, curve, worker

STEPS = 12  # in a run; no kill is planned for the last one
SAVING_S = 0.02  # about how long saving a checkpoint of the tiny Saiga takes
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["torch", "transformers.trainer", "peft", "bitsandbytes", "saigakit.train", __name__])


class Result(NamedTuple):
    adapter: str  # SHA-256
    log: list[dict[str, float]]  # without the seconds


class Kill(NamedTuple):
    """Kill `after_s` seconds after the checkpoint of `step` is begun or, if not `saving`, after the step is logged."""

    step: int
    saving: bool
    after_s: float


def config_for(directory, **settings):
    records = str(packages.tiny_saiga() / "records.jsonl")
    files = {"train_file": records, "eval_file": records, "output_dir": str(Path(directory) / "02_train")}
    length = {"epochs": 1, "batch_size": 5, "save_steps": 1, "eval_steps": 4}
    return TrainConfig(**{"model": "saiga_tiny", "adapter": None, "quantization": "nf4", **files, **length, **settings})


def start(config):
    """Start a run; return its process and the file that holds its output."""
    file = Path(config.output_dir).with_name("config.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    printed = file.with_name("printed.txt")
    process = _FORKS.Process(target=_call, args=(str(config.write(file)), str(printed)))
    process.start()
    return process, printed


def _call(config_file, printed):
    with open(printed, "wb") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    launch.distributed = _forked
    try:
        train.train_adapter(TrainConfig.read(Path(config_file)))
    except SaigaError as error:
        sys.exit(str(error))


def _forked(_, arguments, *, processes, **__):
    """Replace torch.distributed.run, which would import the libraries again in each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rank = next((number for number in range(1, processes) if os.fork() == 0), 0)
    if processes > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    try:
        worker.main(Path(arguments[0]))
    finally:
        if rank > 0:
            os._exit(0)


def finished(config):
    """Run to the end; return (result, printed output)."""
    process, printed = start(config)
    process.join()
    if process.exitcode:
        raise RuntimeError(printed.read_text(encoding="utf-8"))
    return read_result(config), printed.read_text(encoding="utf-8")


def read_result(config):
    made = Path(config.output_dir)
    log = [{key: value for key, value in entry.items() if key != "seconds"} for entry in curve.read_log(made)]
    return Result(sha256(made / "adapter_model.safetensors"), log)


def plan_kill(generator):
    saving = generator.random() < 0.8
    return Kill(generator.randrange(1, STEPS), saving, generator.uniform(0, SAVING_S if saving else 2 * SAVING_S))


def kill(config, moment):
    """Start the run, kill all its processes at `moment` and return what they were doing."""
    began, stage = time.time(), Path(config.output_dir)
    process, _ = start(config)
    store = checkpoints.directory_for(stage)
    step = f"step-{moment.step:08d}"
    while process.is_alive():
        if moment.saving and ((store / step).exists() or any(store.glob(f".{step}.*.partial"))):
            break
        if not moment.saving and losses_in(stage, since=began) >= moment.step:
            break
    time.sleep(moment.after_s)
    family = [psutil.Process(process.pid)] if process.is_alive() else []
    family += [child for one in family for child in one.children(recursive=True)]
    for one in family:
        one.send_signal(signal.SIGKILL)
    process.join()
    psutil.wait_procs(family)
    if not family:
        return "too late: it had ended"
    return "while saving" if list(store.glob(".step-*.*.partial")) else "between two saves"


def losses_in(stage, *, since):
    """Count the losses in the log of this run; a killed run leaves an older one."""
    logs = stage.parent.glob(f".{stage.name}.*.partial/files/{stage.name}/{curve.LOG_FILE}")
    try:
        return sum(log.read_text(encoding="utf-8").count('"loss"') for log in logs if log.stat().st_mtime > since)
    except FileNotFoundError:  # the stage has just got its name
        return 0


def survive(directory, moments, **settings):
    """Kill one run at each of `moments` and let it finish; return (result, what each kill hit, printed output)."""
    config = config_for(directory, **settings)
    where = [kill(config, moment) for moment in moments]
    result, printed = finished(config)
    return result, where, printed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    generator = random.Random(wanted.seed)
    seen, equal, resumed = Counter(), Counter(), Counter()
    with tempfile.TemporaryDirectory() as scratch:
        unkilled, _ = finished(config_for(Path(scratch) / "unkilled", processes=wanted.processes))
        for number in range(wanted.kills):
            moment = plan_kill(generator)
            made, (where,), printed = survive(Path(scratch) / str(number), [moment], processes=wanted.processes)
            seen[where] += 1
            equal[where] += made == unkilled
            resumed[where] += "Resuming from step" in printed
            print(f"{number + 1} of {wanted.kills}: {moment}, {where}: {'equal' if made == unkilled else 'DIFFERS'}")
    rows = [(where, f"{count}", f"{resumed[where]}", f"{equal[where]}") for where, count in sorted(seen.items())]
    header = ("killed", "times", "resumed from a checkpoint", "adapter and losses bit-identical")
    note = (
        f"Tiny Saiga, nf4, {len(unkilled.log)} entries in the log; "
        "runs killed before the first save started again from the beginning."
    )
    print("", Table(header, rows, note), sep="\n")
    if sum(equal.values()) < wanted.kills:
        sys.exit(1)


if __name__ == "__main__":
    main()
