"""Train the adapter with transformers' Trainer: steps, evaluations, checkpoints and early ends."""

import contextlib
import math
import random
import shutil
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from saigakit.core import launch
from saigakit.data.rows import read_column
from saigakit.errors import SaigaError
from saigakit.train import checkpoints, curve, distributed, layers
from saigakit.train.run_state import Run
from saigakit.train.steps import Step, best_fit, collate
from saigakit.weights import load
from saigakit.weights.load import NumberFormat


def build(run: Run, model: PeftModel, number_format: NumberFormat, *, resumed: bool) -> Trainer:
    config, steps = run.config, len(run.plan)
    on_gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=config.output_dir,
        per_device_train_batch_size=1,  # one step, whose packs training_step loops over
        num_train_epochs=1,  # the plan has the steps of all epochs
        learning_rate=config.peak_learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=steps // 20,
        max_grad_norm=1.0,
        neftune_noise_alpha=config.neftune_alpha,
        fp16=number_format == "float16",
        bf16=number_format == "bfloat16",
        use_cpu=not on_gpu,
        eval_strategy="steps" if run.held_out else "no",
        eval_steps=run.eval_steps,
        eval_on_start=bool(run.held_out) and not resumed,
        logging_steps=1,
        logging_nan_inf_filter=False,  # would log a NaN loss as 0
        save_strategy="no",  # RunCallback requests checkpoints
        report_to="none",
        disable_tqdm=True,
        seed=config.seed,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        **(distributed.fsdp_options(min(model._no_split_modules)) if config.is_sharded else {}),
    )
    if config.is_sharded:
        distributed.complete_fsdp_options(arguments)
    return StepTrainer(run, model, arguments)


class StepTrainer(Trainer):
    """A Trainer whose training and evaluation losses are means over the trained tokens of all processes.

    The stock eval_loss depends on the batch size and is wrong with two processes.
    """

    model: PeftModel

    def __init__(self, run: Run, model: PeftModel, args: TrainingArguments) -> None:
        self.run, self.is_sharded = run, run.config.is_sharded
        lengths = read_column(run.held_out, "length") if run.held_out else []
        self.held_out_packs = best_fit(lengths, run.config.sequence_budget)
        super().__init__(
            model=model,
            args=args,
            train_dataset=run.plan,
            eval_dataset=run.held_out or None,
            callbacks=[RunCallback(run)],
        )
        self.remove_callback(PrinterCallback)

    def get_train_dataloader(self) -> DataLoader[Step]:
        """Replace accelerate's loader, which would distribute whole steps over the processes."""
        plan = cast("Dataset[Step]", self.run.plan)
        return DataLoader(plan, batch_size=1, collate_fn=lambda one: one[0])

    def training_step(  # type: ignore[override]  # a Step, where Trainer has a dict
        self, model: torch.nn.Module, inputs: Step, num_items_in_batch: object = None
    ) -> torch.Tensor:
        model.train()
        # Gradients are averaged over processes by DDP or below, losses when they are logged.
        weight = self.args.world_size / inputs.learned
        total = torch.zeros((), dtype=torch.float64, device=self.args.device)
        for number, pack in enumerate(inputs.packs, 1):
            syncs = number == len(inputs.packs) or self.is_sharded
            with contextlib.nullcontext() if syncs else self.accelerator.no_sync(model), load.fast_matmul():
                loss = self._loss_sum(model, pack) * (weight if number <= inputs.counted else 0.0)
                self.accelerator.backward(loss)
            total += loss.detach()
        if self.is_sharded:
            distributed.average_gradients(self.model)
        self.run.step_loss = total.item()
        return total.float()

    def _loss_sum(self, model: torch.nn.Module, pack: dict[str, Any]) -> torch.Tensor:
        with self.accelerator.autocast(), load.fast_matmul():
            return model(**self._prepare_inputs(pack), use_cache=False, num_items_in_batch=1).loss  # type: ignore[no-any-return]

    def floating_point_ops(self, *_: object) -> int:
        return 0  # Trainer's own expects input_ids in a step

    @torch.no_grad()
    def evaluate(self, *_: object, **__: object) -> dict[str, float]:
        """Log the evaluation loss, keep the adapter if it is the best, write samples and check early stopping."""
        run, step, start = self.run, self.state.global_step, time.monotonic()
        loss = self._evaluation_loss()
        if not math.isfinite(loss):
            raise SaigaError(_divergence(run, step, f"The evaluation loss is {loss} after"))
        run.log.write(step=step, held_out_loss=loss)
        run.log.print(f"step {step}: evaluation loss {loss:.4f}")
        best = curve.find_best(run.log.held_out)
        if best is not None and best.step == step:
            fill, needed = partial(save_adapter, self.model), _adapter_bytes(self.model)
            distributed.on_first_process(lambda: run.store.keep_best(fill, needed=needed))
        distributed.on_first_process(lambda: self._write_samples(step, loss))
        run.evaluation_s = time.monotonic() - start
        self.control.should_evaluate = False
        if step < len(run.plan) and run.ending == "finished" and check_early_stopping(run):
            self.control.should_training_stop = True
        return {"eval_loss": loss}

    def _write_samples(self, step: int, loss: float) -> None:
        """Ask the model without changing the random numbers of training."""
        if self.run.samples is not None:
            python = random.getstate()
            with torch.random.fork_rng():
                self.run.samples.write(step, loss, self.model)
            random.setstate(python)

    def _evaluation_loss(self) -> float:
        self.model.eval()
        packs, processes = self.held_out_packs, self.args.world_size
        assert self.run.held_out is not None  # or there would be no evaluation
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        with layers.chunked_loss_in_eval(self.model):
            last = math.ceil(len(packs) / processes) * processes if self.is_sharded else len(packs)
            for number in range(self.args.process_index, last, processes):
                pack = collate([self.run.held_out[row] for row in packs[number % len(packs)]])
                loss_sum = self._loss_sum(self.model, pack).item()
                counted = torch.tensor([loss_sum, pack["logits_to_keep"].numel()], device=total.device)
                total += counted * (number < len(packs))
        loss, tokens = self.accelerator.reduce(total, "sum").tolist()
        return float(loss / tokens)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Trainer's own ignores missing files, and in transformers 5.0 fails with two processes on CPU."""
        for part, name in ((self.optimizer, "optimizer.pt"), (self.lr_scheduler, "scheduler.pt")):
            if checkpoint is not None and part is not None:
                part.load_state_dict(torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True))

    def _load_from_checkpoint(self, checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if self.is_sharded:
            self.model.load_adapter(checkpoint, "default", is_trainable=True)
        else:
            super()._load_from_checkpoint(checkpoint, model)

    def _save_checkpoint(self, *_: object) -> None:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:  # processes may have different disks
            self._save_rng_state(scratch)
            mine = {file.name: file.read_bytes() for file in Path(scratch).iterdir()}
        rng_states = gather_object([mine])

        def fill(directory: Path) -> None:
            state = directory / checkpoints.STATE
            save_adapter(self.model, state)
            # The LoRA is never sharded, so the first process has all of this.
            torch.save(self.optimizer.state_dict(), state / "optimizer.pt")  # type: ignore[union-attr]
            torch.save(self.lr_scheduler.state_dict(), state / "scheduler.pt")  # type: ignore[union-attr]
            self._save_scaler(str(state))
            for files in rng_states:
                for name, content in files.items():
                    (state / name).write_bytes(content)
            self.state.save_to_json(str(state / "trainer_state.json"))
            self.run.log.file.touch()  # nothing may have been written yet
            shutil.copyfile(self.run.log.file, directory / checkpoints.LOG)
            if self.run.samples is not None and self.run.samples.file.is_file():
                shutil.copyfile(self.run.samples.file, directory / self.run.samples.file.name)

        step, run = self.state.global_step, self.run
        needed = 3 * _adapter_bytes(self.model)  # with AdamW's two moments
        distributed.on_first_process(lambda: run.store.write(step, fill, needed=needed))
        run.saved_at, run.saved_step = time.monotonic(), step
        run.save_s = max(run.save_s, run.saved_at - start)
        run.log.print(f"step {step}: checkpoint saved in {run.saved_at - start:.1f} s")


class RunCallback(TrainerCallback):
    """Logs each step, requests checkpoints and ends training when time is up or the user asks."""

    def __init__(self, run: Run) -> None:
        self.run, self.step_start = run, 0.0

    def on_step_begin(self, *_: object, **__: object) -> None:
        self.step_start = time.monotonic()
        launch.report_needed(self.run.ending_s)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        run = self.run
        step, took = state.global_step, time.monotonic() - self.step_start
        run.log.seconds += took
        run.slowest_step_s = max(run.slowest_step_s, took)
        here = (run.is_out_of_time(), launch.is_asked_to_end(), run.is_save_due(step))
        is_over, is_asked, control.should_save = map(any, zip(*gather_object([here]), strict=True))
        control.should_save |= step == len(run.plan)  # what comes after it may be interrupted
        if step < len(run.plan) and (is_over or is_asked):
            run.ending = "interrupted" if is_asked else "max_hours"
            control.should_save = control.should_training_stop = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        logs = state.log_history[-1]
        if "loss" not in logs:
            return
        run, step, steps = self.run, state.global_step, len(self.run.plan)
        loss = statistics.fmean(gather_object([run.step_loss]))
        # A gradient may overflow with a GradScaler, which skips the step and halves the scale.
        if not math.isfinite(loss if args.fp16 else loss + logs.get("grad_norm", 0.0)):
            what = "The gradient is not finite" if math.isfinite(loss) else f"The loss is {loss}"
            raise SaigaError(_divergence(run, step, f"{what} at"))
        tokens = run.plan.tokens_until[step]
        run.log.write(step=step, loss=loss, tokens=tokens, seconds=round(run.log.seconds, 2))
        evaluations = (math.ceil(steps / run.eval_steps) - step // run.eval_steps) * run.evaluation_s
        run.log.report_progress(step, steps, loss, tokens=tokens, of=run.plan.tokens, more_s=evaluations)


def check_early_stopping(run: Run) -> bool:
    """Whether the evaluation loss has not improved for early_stopping evaluations; if so, note and report it."""
    best, patience = curve.find_best(run.log.held_out), run.config.early_stopping
    if best is None or patience is None or best.worse_since < patience:
        return False
    run.ending = "early_stopping"
    run.log.print(f"Stopping early: no better evaluation loss since step {best.step} (early_stopping={patience}).")
    return True


def _divergence(run: Run, step: int, what: str) -> str:
    numbers = ", ".join(str(number) for number in run.plan.numbers(max(step, 1) - 1) if number > 0)  # negative: replay
    saved = f"the checkpoint of step {run.saved_step} is intact" if run.saved_step >= 0 else "no checkpoint was saved"
    return (
        f"{what} step {step}, which trains on conversations {numbers} of {Path(run.config.train_file).name}; {saved}. "
        "Use a smaller learning_rate, or check these conversations."
    )


def save_adapter(model: PeftModel, directory: Path) -> None:
    """Save the adapter without the base."""
    # Only trained parameters: a sharded base cannot be read from one process.
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.save_pretrained(str(directory), state_dict=trained, save_embedding_layers=False)  # "auto" queries the Hub
    (directory / "README.md").unlink(missing_ok=True)  # peft's empty model card


def _adapter_bytes(model: PeftModel) -> int:
    return sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
