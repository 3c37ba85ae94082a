"""Packs into optimizer steps: the Trainer of a run, its plan, its log and its progress lines."""

import json
import math
import time
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from saigakit import packing, weights, workspace
from saigakit.config import TrainConfig
from saigakit.errors import SaigaError
from saigakit.rows import Rows
from saigakit.tokenization import Example

if TYPE_CHECKING:
    from peft import PeftModel
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

EVALUATIONS = 4  # in a run, unless eval_steps says otherwise
REPORT_S = 15  # between two lines of progress
Pack = list[Example]


class Packs(Sequence[Pack]):
    """Rows by their indices, read when a pack is asked for."""

    def __init__(self, rows: Sequence[Example], packs: Sequence[Sequence[int]]) -> None:
        self.rows, self.packs = rows, packs

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> Pack:  # type: ignore[override]  # no slices
        return [self.rows[row] for row in self.packs[index]]


class Plan:
    """The packs of the whole run and how many make one optimizer step: about batch_size conversations."""

    def __init__(self, config: TrainConfig, rows: Rows, processes: int) -> None:
        lengths = rows.lengths
        most = max(1, config.batch_size // processes)
        budget = config.sequence_budget
        packs = packing.schedule(lengths, budget=budget, most=most, epochs=config.epochs, seed=config.seed)
        per_pack = sum(map(len, packs)) / len(packs)
        self.accumulation = max(1, round(config.batch_size / per_pack / processes))
        per_step = self.accumulation * processes
        self.steps = math.ceil(len(packs) / per_step)
        self.packs = Packs(rows, packs)
        sizes = [sum(lengths[index] for index in pack) for pack in packs]
        self.tokens = [sum(sizes[start : start + per_step]) for start in range(0, len(sizes), per_step)]  # of each step


class Log:
    """log.jsonl, and a sparse line for whoever watches."""

    def __init__(self, file: Path, *, quiet: bool) -> None:
        self.file, self.quiet = file, quiet

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, flush=True)

    def write(self, **entry: float) -> None:
        if not self.quiet:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(entry) + "\n")


def build(config: TrainConfig, model: "PeftModel", plan: Plan, held_out: Pack, log: Log) -> "Trainer":
    from transformers import PrinterCallback, TrainingArguments

    number_format = weights.number_format(config.spec, workspace.gpus() if model.device.type == "cuda" else [])
    arguments = TrainingArguments(
        output_dir=config.output_dir,
        per_device_train_batch_size=1,  # one pack
        gradient_accumulation_steps=plan.accumulation,
        num_train_epochs=1,  # the plan holds the packs of all epochs
        learning_rate=config.peak_learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=plan.steps // 20,
        max_grad_norm=1.0,
        fp16=number_format == "float16",
        bf16=number_format == "bfloat16",
        use_cpu=model.device.type == "cpu",
        eval_strategy="steps" if held_out else "no",
        eval_steps=config.eval_steps or math.ceil(plan.steps / EVALUATIONS),
        eval_on_start=bool(held_out),
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would log a broken loss as 0
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=config.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=model.device.type == "cuda",
        ddp_find_unused_parameters=False,
    )
    lengths = [len(row["input_ids"]) for row in held_out]
    packs = Packs(held_out, packing.best_fit(lengths, config.sequence_budget))
    trainer = _trainer_class(plan.packs, packs)(
        model=model,
        args=arguments,
        train_dataset=plan.packs,
        eval_dataset=packs if held_out else None,
        data_collator=lambda batch: packing.collate(batch[0]),
        callbacks=[_progress(config, plan, log)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _any_process(here: bool, args: "TrainingArguments") -> bool:
    """The same answer in all processes: one that stopped alone would leave the others waiting for it."""
    if args.world_size == 1:
        return here
    import torch

    flag = torch.tensor([float(here)], device=args.device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag.item())


def _trainer_class(planned: Packs, held_out: Packs) -> type["Trainer"]:
    """Trainer that keeps the plan's order and whose held-out loss is the mean over learned tokens.

    The stock eval_loss depends on the batch size and is wrong on two processes.
    """
    import torch
    from torch.utils.data import SequentialSampler
    from transformers import Trainer

    class PackTrainer(Trainer):
        model: "PeftModel"

        def _get_train_sampler(self, train_dataset: object = None) -> "SequentialSampler":
            return SequentialSampler(planned)

        @torch.no_grad()
        def evaluate(self, *_: object, **__: object) -> dict[str, float]:
            self.model.eval()
            start = time.monotonic()
            total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
            for index in range(self.args.process_index, len(held_out), self.args.world_size):
                batch = self._prepare_inputs(packing.collate(held_out[index]))
                with self.accelerator.autocast():
                    loss_sum = self.model(**batch, use_cache=False, num_items_in_batch=1).loss
                total += torch.tensor([loss_sum.item(), batch["logits_to_keep"].numel()], device=total.device)
            loss, tokens = self.accelerator.reduce(total, "sum").tolist()
            metrics = {"eval_loss": loss / tokens, "eval_seconds": time.monotonic() - start}
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    return PackTrainer


def _progress(config: TrainConfig, plan: Plan, log: Log) -> "TrainerCallback":
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        """The log, a line now and then, and an end in time."""

        began = shown = time.monotonic()
        seconds = 0.0  # of training, evaluations left out
        evaluation_s = 0.0  # of the last evaluation

        def on_step_begin(self, *_: object, **__: object) -> None:
            self.began = time.monotonic()

        def on_log(
            self,
            args: "TrainingArguments",
            state: "TrainerState",
            control: "TrainerControl",
            logs: dict[str, float] | None = None,
            **_: object,
        ) -> None:
            step, logs = state.global_step, logs or {}
            if "eval_loss" in logs:
                self.evaluation_s = logs["eval_seconds"]
                log.write(step=step, held_out_loss=logs["eval_loss"])
                log.say(f"step {step}: held-out loss {logs['eval_loss']:.4f} per token")
            elif "loss" in logs:
                if not math.isfinite(logs["loss"]):
                    raise SaigaError(f"The loss is {logs['loss']} at step {step}. Use a smaller learning_rate.")
                tokens = sum(plan.tokens[:step])
                log.write(step=step, loss=logs["loss"], tokens=tokens, seconds=round(self.seconds, 2))
                self.tell(step, logs["loss"], tokens / self.seconds, int(args.eval_steps or plan.steps))

        def tell(self, step: int, loss: float, speed: float, eval_steps: int) -> None:
            now = time.monotonic()
            if now - self.shown < REPORT_S and step < plan.steps:
                return
            self.shown = now
            evaluations = math.ceil(plan.steps / eval_steps) - step // eval_steps
            left = timedelta(seconds=round(sum(plan.tokens[step:]) / speed + evaluations * self.evaluation_s))
            ends = (datetime.now().astimezone() + left).strftime("%H:%M")
            log.say(f"step {step} of {plan.steps}: loss {loss:.3f}, {speed:.0f} tokens/s, {left} left, ends at {ends}")

        def on_step_end(
            self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **_: object
        ) -> None:
            self.seconds += time.monotonic() - self.began
            over = time.time() - workspace.session_start() > config.max_hours * 3600
            if _any_process(over, args) and state.global_step < plan.steps:
                log.say(f"max_hours={config.max_hours:g} are over: training ends at step {state.global_step}.")
                control.should_training_stop = True

    return Progress()
