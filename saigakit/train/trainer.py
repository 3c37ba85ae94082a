"""Steps into a trained adapter: the Trainer of a run, what it saves, when it ends and what it says of itself."""

import contextlib
import math
import random
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from saigakit.core import launch
from saigakit.errors import SaigaError
from saigakit.train import checkpoints, curve, distributed, layers
from saigakit.train.run_state import OnEvaluation, Run
from saigakit.train.steps import Step, best_fit, collate
from saigakit.weights import load
from saigakit.weights.load import NumberFormat


def build(run: Run, model: PeftModel, number_format: NumberFormat, *, resumed: bool) -> Trainer:
    config, steps = run.config, len(run.plan)
    on_gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=config.output_dir,
        per_device_train_batch_size=1,  # one step: its packs are looped over in training_step
        gradient_accumulation_steps=1,
        num_train_epochs=1,  # the plan holds the steps of all epochs
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
        logging_nan_inf_filter=False,  # it would log a broken loss as 0
        save_strategy="no",  # Watch asks for checkpoints
        report_to="none",
        disable_tqdm=True,
        seed=config.seed,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        **(distributed.fsdp_options(distributed.layer_class_name(model)) if config.is_sharded else {}),
    )
    if config.is_sharded:
        distributed.complete_fsdp_options(arguments)
    return StepTrainer(run, model, arguments)


class StepTrainer(Trainer):
    """Trainer whose losses, of training and held out, are means over the learned tokens of all processes.

    The stock eval_loss depends on the batch size and is wrong on two processes.
    """

    model: PeftModel

    def __init__(self, run: Run, model: PeftModel, args: TrainingArguments) -> None:
        self.run, self.is_sharded = run, run.config.is_sharded
        self.held_out_packs = best_fit(run.held_out.lengths, run.config.sequence_budget)
        super().__init__(
            model=model,
            args=args,
            train_dataset=run.plan,
            eval_dataset=cast(Any, run.held_out) if run.held_out else None,
            callbacks=[Watch(run, model)],
        )
        self.remove_callback(PrinterCallback)

    def get_train_dataloader(self) -> DataLoader[Step]:
        """Not accelerate's, which would deal the steps out to the processes: each takes its part of every step."""
        plan = cast("Dataset[Step]", self.run.plan)
        return DataLoader(plan, batch_size=1, collate_fn=lambda one: one[0])

    def training_step(  # type: ignore[override]  # a Step, where Trainer has a dict
        self, model: torch.nn.Module, inputs: Step, num_items_in_batch: object = None
    ) -> torch.Tensor:
        model.train()
        # The mean over processes is taken of the gradients, by DDP or below, and by the log of the losses.
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
        return 0  # Trainer's looks for input_ids in a step

    @torch.no_grad()
    def evaluate(self, *_: object, **__: object) -> dict[str, float]:
        self.model.eval()
        start = time.monotonic()
        packs, processes = self.held_out_packs, self.args.world_size
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        with layers.deferred(self.model):
            last = math.ceil(len(packs) / processes) * processes if self.is_sharded else len(packs)
            for number in range(self.args.process_index, last, processes):
                pack = collate([self.run.held_out[index] for index in packs[number % len(packs)]])
                loss_sum = self._loss_sum(self.model, pack).item()
                counted = torch.tensor([loss_sum, pack["logits_to_keep"].numel()], device=total.device)
                total += counted * (number < len(packs))
        loss, tokens = self.accelerator.reduce(total, "sum").tolist()
        self.run.evaluation_s = time.monotonic() - start
        metrics = {"eval_loss": loss / tokens}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Trainer's goes on without the files, and in transformers 5.0 fails on two processes without a GPU."""
        for part, name in ((self.optimizer, "optimizer.pt"), (self.lr_scheduler, "scheduler.pt")):
            if checkpoint is not None and part is not None:
                part.load_state_dict(torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True))

    def _load_from_checkpoint(self, checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if self.is_sharded:
            self.model.load_adapter(checkpoint, "default", is_trainable=True)
        else:
            super()._load_from_checkpoint(checkpoint, model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Of the LoRA, which is whole on every process, sharded or not; on the first one alone."""
        for part, name in ((self.optimizer, "optimizer.pt"), (self.lr_scheduler, "scheduler.pt")):
            torch.save(part.state_dict(), Path(output_dir) / name)  # type: ignore[union-attr]

    def _save_checkpoint(self, *_: object) -> None:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:  # each process its own: a machine may have a disk of its own
            self._save_rng_state(scratch)
            mine = {file.name: file.read_bytes() for file in Path(scratch).iterdir()}
        everyones = distributed.gather(mine, self.args)

        def fill(directory: Path) -> None:
            state = directory / checkpoints.STATE
            save_adapter(self.model, state)
            self._save_optimizer_and_scheduler(str(state))
            self._save_scaler(str(state))
            for one in everyones:
                for name, content in one.items():
                    (state / name).write_bytes(content)
            self.state.save_to_json(str(state / "trainer_state.json"))
            self.run.log.copy(directory / checkpoints.LOG)
            for file in filter(Path.is_file, self.run.kept):
                shutil.copyfile(file, directory / file.name)

        step, run = self.state.global_step, self.run
        needed = 3 * _adapter_bytes(self.model)  # with two moments of AdamW
        distributed.by_first(lambda: run.store.write(step, fill, needed=needed), self.args)
        run.saved, run.saved_step = time.monotonic(), step
        run.save_s = max(run.save_s, run.saved - start)
        run.log.say(f"step {step}: checkpoint saved in {run.saved - start:.1f} s")


class Watch(TrainerCallback):
    """The log, the checkpoints, the best adapter, and the end where it comes before the last step."""

    def __init__(self, run: Run, model: PeftModel) -> None:
        self.run, self.model, self.began = run, model, 0.0

    def on_step_begin(self, *_: object, **__: object) -> None:
        self.began = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        run = self.run
        step, took = state.global_step, time.monotonic() - self.began
        run.log.seconds += took
        run.worst_step_s = max(run.worst_step_s, took)
        here = (run.is_time_over(), launch.is_asked_to_end(), run.is_save_due(step))
        is_over, is_asked, control.should_save = distributed.any_process(here, args)
        control.should_save |= step == len(run.plan)  # what follows it may be interrupted, too
        if step < len(run.plan) and (is_over or is_asked):
            run.ending = "asked" if is_asked else "max_hours"
            control.should_save = control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        run = self.run
        step, steps, logs = state.global_step, len(run.plan), logs or {}
        if "eval_loss" in logs:
            if not math.isfinite(logs["eval_loss"]):
                raise SaigaError(_broken(run, step, f"The held-out loss is {logs['eval_loss']} after"))
            run.log.write(step=step, held_out_loss=logs["eval_loss"])
            run.log.say(f"step {step}: held-out loss {logs['eval_loss']:.4f} per token")
        elif "loss" in logs:
            loss = distributed.mean_of_processes(run.step_loss, args)
            # With a GradScaler a gradient may overflow: that step is left out and the scale is halved.
            if not math.isfinite(loss if args.fp16 else loss + logs.get("grad_norm", 0.0)):
                what = "The gradient is not finite" if math.isfinite(loss) else f"The loss is {loss}"
                raise SaigaError(_broken(run, step, f"{what} at"))
            tokens = run.plan.tokens_until[step]
            run.log.write(step=step, loss=loss, tokens=tokens, seconds=round(run.log.seconds, 2))
            evaluations = (math.ceil(steps / run.eval_steps) - step // run.eval_steps) * run.evaluation_s
            run.log.tell(step, steps, loss, tokens=tokens, of=run.plan.tokens, more_s=evaluations)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        run = self.run
        step, loss = state.global_step, (metrics or {})["eval_loss"]
        best = curve.best(run.log.held_out)
        if best is not None and best.step == step:
            needed = _adapter_bytes(self.model)
            distributed.by_first(lambda: run.store.keep_best(partial(save_adapter, self.model), needed=needed), args)
        began = time.monotonic()
        distributed.by_first(lambda: _call(run.on_evaluation, step, loss, self.model), args)
        run.evaluation_s += time.monotonic() - began
        if step < len(run.plan) and run.ending == "finished" and is_stopped_early(run):
            control.should_training_stop = True


def is_stopped_early(run: Run) -> bool:
    """Whether the held-out loss has not become better for early_stopping evaluations; it is then said and kept."""
    best, patience = curve.best(run.log.held_out), run.config.early_stopping
    if best is None or patience is None or best.worse_since < patience:
        return False
    run.ending = "early_stopping"
    run.log.say(f"early_stopping={patience}: the held-out loss was best at step {best.step}; training ends here.")
    return True


def _broken(run: Run, step: int, what: str) -> str:
    numbers = ", ".join(str(number) for number in run.plan.numbers(max(step, 1) - 1) if number > 0)  # below: of replay
    saved = f"the checkpoint of step {run.saved_step} is kept" if run.saved_step >= 0 else "there is no checkpoint yet"
    return (
        f"{what} step {step}, whose conversations are {numbers} of {Path(run.config.train_file).name}; {saved}. "
        "Use a smaller learning_rate, or look at these conversations."
    )


def _call(act: OnEvaluation | None, step: int, loss: float, model: PeftModel) -> None:
    """Without a trace in the random numbers of training."""
    if act is None:
        return
    python = random.getstate()
    with torch.random.fork_rng():
        act(step, loss, model)
    random.setstate(python)


def save_adapter(model: PeftModel, directory: Path) -> None:
    """The adapter alone. Its config names the base as `model` does, see train."""
    # Of the base nothing: where it is sharded, this process cannot even look at it alone.
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.save_pretrained(str(directory), state_dict=trained, save_embedding_layers=False)  # "auto" asks the Hub
    (directory / "README.md").unlink(missing_ok=True)  # peft's empty model card


def _adapter_bytes(model: PeftModel) -> int:
    return sum(
        parameter.numel() * parameter.element_size() for parameter in model.parameters() if parameter.requires_grad
    )
