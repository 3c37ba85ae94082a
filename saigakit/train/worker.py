"""Train in a child process of 02_train, of which there is one per GPU."""

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
from saigakit.core import launch
from saigakit.core.display import count
from saigakit.data import rows, store
from saigakit.data.conversations import spread
from saigakit.errors import SaigaError
from saigakit.prompt import encoding
from saigakit.train import answers, checkpoints, curve, distributed, preflight, run_state, steps, trainer
from saigakit.train.loading import Loaded
from saigakit.train.preflight import Job
from saigakit.train.run_state import Log, Run
from saigakit.train.samples import Samples
from saigakit.train.steps import Plan
from saigakit.weights import fold
from saigakit.weights.adapter import Adapter

_LOCK_PATIENCE_S = 5.0


def main(job_file: Path) -> None:
    """Train, and write the adapter, log, samples and result next to the job file."""
    job = Job.read(job_file)
    config = job.config
    assert job.store is not None
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    on_gpu, device = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
    preflight.check_visible_gpus(torch.cuda.device_count() if on_gpu else 0, processes, job.number_format)
    if on_gpu:
        torch.cuda.set_device(device)
    start = None if config.resume_from is None else Path(config.resume_from)
    directory = Path(config.output_dir)
    log = Log(directory / curve.LOG_FILE, quiet=rank > 0, resumed_from=start)
    tokenizer = encoding.read_tokenizer(config.spec, job.tokenizer_dir, job.chat_template)
    questions = None if job.eval_file is None else data.read_conversations(job.eval_file)
    with contextlib.redirect_stdout(io.StringIO()) if rank > 0 else contextlib.nullcontext():  # only the first reports
        plan = Plan(config, _training_rows(job, tokenizer, questions, log), processes=processes, process=rank)
        length = f"{count(len(plan), 'step')}, {plan.tokens:,} tokens (epochs={config.epochs:g})"
        log.print(f"Training set: {count(len(plan.rows), 'row')}; {length}.")
        held_out = _evaluation_rows(job, questions, tokenizer, plan, log)
    transformers.set_seed(config.seed)  # a new adapter is initialised at random
    loaded = Loaded.of(job, plan, "cpu" if not on_gpu else f"cuda:{device}", log)
    run = Run(config, plan, held_out, job.store, log, job.started)
    if start is not None:
        run.saved_step = checkpoints.step_of(start)
        if (before := len([*(start / checkpoints.STATE).glob("rng_state*")])) != processes:
            log.print(f"Resuming with processes={processes} instead of {before}, so dropout will differ.")
    if config.is_sharded:
        log.print(f"{answers.FILE} is not written with sharding='fsdp', because no process has the complete model.")
    elif questions is not None and rank == 0:
        run.samples = Samples(tokenizer, questions, directory / answers.FILE)
        if start is not None:
            run.samples.restart_at(run.saved_step, start / answers.FILE)
    with job.store.lock(_LOCK_PATIENCE_S) if rank == 0 else contextlib.nullcontext(), launch.ending_gently(0):
        step = _train(run, loaded, start)
        if rank == 0:
            _finish(run, loaded, step)
    distributed.shut_down()


def _training_rows(job: Job, tokenizer: encoding.Tokenizer, questions: Dataset | None, log: Log) -> Dataset:
    config = job.config
    training = rows.tokenise(
        data.read_conversations(job.train_file), tokenizer, config.sequence_budget, name=job.train_file.name
    )
    if config.replay_file is None:
        return training
    general = steps.read_replay(config.replay_file, job.replay_files, questions)
    replay = rows.tokenise(general, tokenizer, config.sequence_budget, name=Path(config.replay_file).name)
    log.print(steps.describe_mix(len(training), len(replay), config.replay_fraction))
    return steps.mix_rows(training, replay)


def _evaluation_rows(
    job: Job, questions: Dataset | None, tokenizer: encoding.Tokenizer, plan: Plan, log: Log
) -> Dataset | None:
    """Choose rows from all over the evaluation set."""
    if questions is None or job.eval_file is None:
        return None
    found = rows.tokenise(questions, tokenizer, job.config.sequence_budget, name=job.eval_file.name)
    lengths = rows.read_column(found, "length")
    chosen = run_state.count_evaluated(lengths, steps=len(plan), tokens=plan.tokens, eval_steps=job.config.eval_steps)
    every = run_state.evaluation_interval(len(plan), job.config.eval_steps)
    log.print(f"Evaluation set: {chosen:,} of {count(len(found), 'row')}, evaluated every {count(every, 'step')}.")
    return store.select_rows(found, spread(range(len(found)), chosen))


def _train(run: Run, loaded: Loaded, start: Path | None) -> int:
    """Return the number of steps done. Raises SaigaError if the run was asked to end."""
    # A run may have been killed between stopping early and its end.
    if start is not None and run.saved_step < len(run.plan) and trainer.check_early_stopping(run):
        return run.saved_step
    made = trainer.build(run, loaded.model, loaded.job.number_format, resumed=start is not None)
    if run.config.is_sharded:
        made.add_callback(distributed.BeforeFirstStep(lambda: loaded.run_trial(made, run.log)))
    else:
        loaded.run_trial(made, run.log)
    made.train(resume_from_checkpoint=None if start is None else str(start / checkpoints.STATE))
    step = made.state.global_step
    if run.ending == "interrupted":
        raise SaigaError(
            f"Training was interrupted and saved at step {step} of {len(run.plan)}. Run it again with the same run_dir "
            "to resume."
        )
    if run.ending == "max_hours":
        run.log.print(
            f"Time is up (max_hours={run.config.max_hours:g}): training stops and is saved at step {step} of "
            f"{len(run.plan)}. Run it again with the same run_dir, or in another session with resume_from, to resume."
        )
    if run.held_out and run.ending == "finished" and run.log.held_out[-1]["step"] != step:
        made.evaluate()
    return step


def _finish(run: Run, loaded: Loaded, step: int) -> None:
    """Write the best adapter, or the last one if nothing was evaluated, and how the run ended."""
    directory, best, folded_rank = Path(run.config.output_dir), curve.find_best(run.log.held_out), 0
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        trained = run.store.best_dir
        if best is None:
            trained = Path(scratch) / "last"
            trainer.save_adapter(loaded.model, trained)
        if run.config.is_folded:
            released = loaded.job.adapter_dir
            assert released is not None
            trained, folded_rank = fold.combine(released, trained, Path(scratch) / "both"), Adapter.open(released).rank
        shutil.copytree(trained, directory, dirs_exist_ok=True)
    if best is not None:
        run.log.print(f"Saved the adapter of step {best.step}, which has the best evaluation loss: {best.loss:.4f}.")
        if best.loss >= run.log.held_out[0]["held_out_loss"]:
            run.log.print("It is no better than before training: use a smaller learning_rate or more records.")
        if run.config.is_folded and run.config.weights_as != "none":
            run.log.print(
                f"This loss was measured with base and released adapter merged in {run.config.weights_as}; on the "
                "published base it differs slightly."
            )
    result = {"ended": run.ending, "step": step, "steps": len(run.plan), "best_step": best and best.step}
    result |= {"folded_rank": folded_rank} if folded_rank else {}
    content = json.dumps({**result, "reserve_s": run.reserve_s})
    (directory / preflight.RESULT_FILE).write_text(content, encoding="utf-8")
