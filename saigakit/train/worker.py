"""The child process of 02_train: rows, model and plan into the trained adapter, its log and its samples.

More than one GPU: one such process each.
"""

import contextlib
import io
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from datasets import Dataset

from saigakit import data
from saigakit.config import TrainConfig
from saigakit.core import launch
from saigakit.data import rows
from saigakit.errors import SaigaError
from saigakit.prompt import encoding
from saigakit.train import checkpoints, curve, distributed, preflight, run_state, samples, steps, trainer
from saigakit.train.checkpoints import Store
from saigakit.train.job import Job
from saigakit.train.loading import Loaded
from saigakit.train.run_state import RESULT_FILE, HeldOut, Log, Run
from saigakit.train.steps import Plan
from saigakit.weights import fold, load

_LOCK_PATIENCE_S = 5.0


def main(job_file: Path) -> None:
    """Loads, trains, writes the adapter, the log, the samples and how it ended next to the job."""
    load.silence_libraries()
    job = Job.read(job_file)
    config = job.config
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    on_gpu, device = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
    preflight.process(torch.cuda.device_count() if on_gpu else 0, processes, job.number_format)
    if on_gpu:
        torch.cuda.set_device(device)
    start = None if config.resume_from is None else Path(config.resume_from)
    directory = Path(config.output_dir)
    log = Log(directory / curve.LOG_FILE, quiet=rank > 0, resumed_from=start and start / checkpoints.LOG)
    tokenizer = encoding.load_tokenizer(config.model, config.base_source)
    asked = None if config.eval_file is None else data.read_conversations(config.eval_file)
    with contextlib.redirect_stdout(io.StringIO()) if rank > 0 else contextlib.nullcontext():  # the first one says it
        plan = Plan(config, _training_rows(config, tokenizer, asked, log), processes=processes, process=rank)
        log.say(f"{len(plan.rows)} rows, {plan.tokens:,} tokens in {config.epochs:g} epochs: {len(plan)} steps.")
        held_out = _held_out(config, asked, tokenizer, plan, log)
    transformers.set_seed(config.seed)  # a new adapter begins at random
    loaded = Loaded.of(job, plan, "cpu" if not on_gpu else f"cuda:{device}", log)
    run = Run(config, plan, held_out, Store.of_parent(job_file.parent), log)
    if start is not None:
        run.saved_step = checkpoints.step_of(start)
        if (wrote := checkpoints.processes_of(start)) != processes:
            log.say(f"The checkpoint is of {wrote} processes and this run of {processes}: dropout will differ.")
    if config.is_sharded:
        log.say(f"{samples.FILE} is not written with sharding='fsdp': no process has the whole model.")
    elif asked is not None and rank == 0:
        _write_samples(run, samples.Samples(tokenizer, asked, directory / samples.FILE), start)
    with run.store.alone(_LOCK_PATIENCE_S) if rank == 0 else contextlib.nullcontext(), launch.ending_gently():
        step = _train(run, loaded, start)
        if rank == 0:
            _finish(run, loaded, step)
    distributed.leave_together()


def _train(run: Run, loaded: Loaded, start: Path | None) -> int:
    """The number of steps made. Raises SaigaError where the run was asked to end."""
    # It may have been killed between that checkpoint and its end.
    if start is not None and run.saved_step < len(run.plan) and trainer.is_stopped_early(run):
        return run.saved_step
    made = trainer.build(run, loaded.model, loaded.job.number_format, resumed=start is not None)
    if run.config.is_sharded:
        made.add_callback(distributed.WhenReady(lambda: loaded.try_out(made, run.log)))
    else:
        loaded.try_out(made, run.log)
    made.train(resume_from_checkpoint=None if start is None else str(start / checkpoints.STATE))
    step = made.state.global_step
    if run.ending == "asked":
        raise SaigaError(
            f"Training was asked to end and did at step {step} of {len(run.plan)}, which is saved. "
            "Call it again with the same run_dir to go on from there."
        )
    if run.ending == "max_hours":
        run.log.say(
            f"max_hours={run.config.max_hours:g} end training at step {step} of {len(run.plan)}, which is saved. "
            "Call it again with the same run_dir, or in another session with resume_from, to go on from there."
        )
    if run.held_out and run.ending == "finished" and run.log.held_out[-1]["step"] != step:
        made.evaluate()
    return step


def _finish(run: Run, loaded: Loaded, step: int) -> None:
    """The best adapter by held-out loss, the last one where nothing was held out."""
    directory, best, folded_rank = Path(run.config.output_dir), curve.best(run.log.held_out), 0
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        trained = run.store.best_dir
        if best is None:
            trained = Path(scratch) / "last"
            trainer.save_adapter(loaded.model, trained)
        if run.config.is_folded:
            released = loaded.job.adapter_dir
            assert released is not None
            trained, folded_rank = fold.combine(released, trained, Path(scratch) / "both"), fold.adapter_rank(released)
        shutil.copytree(trained, directory, dirs_exist_ok=True)
    if best is not None:
        run.log.say(f"The adapter is that of step {best.step}, with the best held-out loss: {best.loss:.4f} per token.")
        if best.loss >= run.log.held_out[0]["held_out_loss"]:
            run.log.say("That is not better than before training: use a smaller learning_rate or more records.")
        if run.config.is_folded and run.config.weights_as != "none":
            run.log.say(
                "It is for the base as published. In training the sum of base and released adapter was "
                f"{run.config.weights_as}, so its held-out loss elsewhere differs a little from this one."
            )
    result = {"ended": run.ending, "step": step, "steps": len(run.plan), "best_step": best and best.step}
    result |= {"folded_rank": folded_rank} if folded_rank else {}
    content = json.dumps({**result, "reserve_s": run.reserve_s})
    (directory / RESULT_FILE).write_text(content, encoding="utf-8")


def _write_samples(run: Run, written: samples.Samples, start: Path | None) -> None:
    """At each evaluation of `run`; a resumed one goes on with the file in its checkpoint."""
    if start is not None and (start / samples.FILE).is_file():
        shutil.copyfile(start / samples.FILE, written.file)
        written.restart_at(run.saved_step)
    run.on_evaluation, run.kept = written.write, [written.file]


def _held_out(
    config: TrainConfig, asked: Dataset | None, tokenizer: encoding.Tokenizer, plan: Plan, log: Log
) -> HeldOut:
    if asked is None:
        return HeldOut(None, 0)
    found = rows.tokenise(asked, tokenizer, config.sequence_budget, name=Path(str(config.eval_file)).name)
    count = run_state.count_evaluated(
        rows.column(found, "length"), steps=len(plan), tokens=plan.tokens, eval_steps=config.eval_steps
    )
    log.say(f"{count} of {len(found)} held-out conversations are evaluated each time.")
    return HeldOut(found, count)


def _training_rows(config: TrainConfig, tokenizer: encoding.Tokenizer, asked: Dataset | None, log: Log) -> Dataset:
    def stored(conversations: Dataset, file: str) -> Dataset:
        return rows.tokenise(conversations, tokenizer, config.sequence_budget, name=Path(file).name)

    training = stored(data.read_conversations(config.train_file), config.train_file)
    if config.replay_file is None:
        return training
    general = steps.read_replay(config.replay_file, asked, Path(config.output_dir).parent)  # the stage's run_dir
    replay = stored(general, config.replay_file)
    log.say(steps.replay_in_words(len(training), len(replay), config.replay_fraction))
    return steps.join(training, replay)
