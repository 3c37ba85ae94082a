"""The child process of 02_train: rows, model and plan into the trained adapter, its log and its samples.

More than one GPU: one such process each.
"""

import contextlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from saigakit import (
    attention,
    checkpoints,
    curve,
    data,
    evaluation,
    fold,
    head,
    launch,
    memory,
    packing,
    preflight,
    ranks,
    replay,
    rows,
    samples,
    sources,
    tokenization,
    trainer,
    trial,
    weights,
    workspace,
)
from saigakit.checkpoints import Store
from saigakit.config import TrainConfig
from saigakit.conversations import Conversations
from saigakit.errors import SaigaError
from saigakit.evaluation import HeldOut
from saigakit.memory import Pack, Shape
from saigakit.models import Lora
from saigakit.steps import Plan
from saigakit.tokenization import Example
from saigakit.training_log import Log
from saigakit.training_run import Run
from saigakit.weights import NumberFormat

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, Trainer

_LOCK_PATIENCE_S = 5.0
RESULT_FILE = "result.json"  # for the manifest of the stage


def memory_needed(
    config: TrainConfig,
    shape: Shape,
    lora: Lora,
    number_format: NumberFormat,
    *,
    pack: Pack | None = None,
) -> dict[str, int]:
    """Bytes by what they are for; without `pack` for one document of the whole budget."""
    on_gpu = number_format != "float32"
    return memory.training(
        shape,
        quantization=config.weights_as,
        lora=lora,
        pack_tokens=config.sequence_budget,
        itemsize=2 if on_gpu else 4,
        checkpointing=on_gpu,
        pack=pack,
    )


def main(config_file: Path) -> None:
    """Loads, trains, writes the adapter, the log, the samples and how it ended beside the config."""
    import torch
    import transformers

    weights.quiet()
    config = TrainConfig.read(config_file)
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    on_gpu, device = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
    preflight.process(torch.cuda.device_count() if on_gpu else 0, processes)
    if on_gpu:
        torch.cuda.set_device(device)
    weights.cpu_threads()
    start = None if config.resume_from is None else Path(config.resume_from)
    directory = Path(config.output_dir)
    log = Log(directory / curve.LOG_FILE, quiet=rank > 0, resumed_from=start and start / checkpoints.LOG)
    tokenizer = tokenization.load_tokenizer(config.model, config.base_source)
    asked = None if config.eval_file is None else data.read_conversations(config.eval_file)
    with contextlib.redirect_stdout(io.StringIO()) if rank > 0 else contextlib.nullcontext():  # the first one says it
        plan = Plan(config, _training_rows(config, tokenizer, asked, log), processes=processes, process=rank)
        log.say(f"{len(plan.rows)} rows, {plan.tokens:,} tokens in {config.epochs:g} epochs: {len(plan)} steps.")
        held_out = _held_out(config, asked, tokenizer, plan, log)
    transformers.set_seed(config.seed)  # a new adapter begins at random
    loaded = Loaded.of(config, plan, "cpu" if not on_gpu else f"cuda:{device}", log)
    run = Run(config, plan, held_out, Store.of_parent(config_file.parent), log)
    if start is not None:
        run.saved_step = checkpoints.step_of(start)
        if (wrote := checkpoints.processes_of(start)) != processes:
            log.say(f"The checkpoint is of {wrote} processes and this run of {processes}: dropout will differ.")
    if asked is not None and rank == 0:
        _write_samples(run, samples.Samples(tokenizer, asked, directory / samples.FILE), start)
    with run.store.alone(_LOCK_PATIENCE_S) if rank == 0 else contextlib.nullcontext(), launch.ending_gently():
        step = _train(run, loaded, start)
        if rank == 0:
            _finish(run, loaded.model, step)
    ranks.leave_together()


def _train(run: Run, loaded: "Loaded", start: Path | None) -> int:
    """The number of steps made. Raises SaigaError where the run was asked to end."""
    is_unfinished = run.saved_step < len(run.plan)
    if (
        start is not None and is_unfinished and trainer.is_stopped_early(run)
    ):  # it was killed between that checkpoint and its end
        return run.saved_step
    made = trainer.build(run, loaded.model, resumed=start is not None)
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


def _finish(run: Run, model: "PeftModel", step: int) -> None:
    """The best adapter by held-out loss, the last one where nothing was held out."""
    directory, best = Path(run.config.output_dir), evaluation.best(run.log.held_out)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        trained = run.store.best_dir
        if best is None:
            trained = Path(scratch) / "last"
            trainer.save_adapter(model, trained)
        if run.config.is_folded:
            trained = fold.combined(_adapter_dir(run.config), trained, Path(scratch) / "both")
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
    content = json.dumps({**result, "reserve_s": run.reserve_s})
    (directory / RESULT_FILE).write_text(content, encoding="utf-8")


def _write_samples(run: Run, written: samples.Samples, start: Path | None) -> None:
    """At each evaluation of `run`; a resumed one goes on with the file in its checkpoint."""
    if start is not None and (start / samples.FILE).is_file():
        shutil.copyfile(start / samples.FILE, written.file)
        written.restart_at(run.saved_step)
    run.on_evaluation, run.kept = written.write, [written.file]


def _held_out(
    config: TrainConfig, asked: Conversations | None, tokenizer: tokenization.Tokenizer, plan: Plan, log: Log
) -> HeldOut:
    if asked is None:
        return HeldOut(rows.Rows(), 0)
    found = rows.store(asked, tokenizer, config.sequence_budget, name=Path(str(config.eval_file)).name)
    count = evaluation.evaluated(found.lengths, steps=len(plan), tokens=plan.tokens, eval_steps=config.eval_steps)
    log.say(f"{count} of {len(found)} held-out conversations are evaluated each time.")
    return HeldOut(found, count)


def _training_rows(
    config: TrainConfig, tokenizer: tokenization.Tokenizer, asked: Conversations | None, log: Log
) -> rows.Rows | replay.Joined:
    def stored(conversations: Conversations, file: str) -> rows.Rows:
        return rows.store(conversations, tokenizer, config.sequence_budget, name=Path(file).name)

    training = stored(data.read_conversations(config.train_file), config.train_file)
    if config.replay_file is None:
        return training
    general = replay.read(config.replay_file, asked, Path(config.output_dir).parent)  # the stage's run_dir
    joined = replay.Joined(training, stored(general, config.replay_file))
    log.say(joined.in_words(config.replay_fraction))
    return joined


def _adapter_dir(config: TrainConfig) -> Path:
    assert config.start_adapter is not None
    return sources.adapter_dir(config.spec, config.start_adapter)


@dataclass
class Loaded:
    """The model with its adapter, the largest pack that it will see, and the memory that this was foreseen to take."""

    model: "PeftModel"
    pack: list[Example]
    foreseen: dict[str, int]

    @classmethod
    def of(cls, config: TrainConfig, plan: Plan, device: str, log: Log) -> Self:
        """Raises SaigaError where the memory is too small, before anything is loaded."""
        import torch

        gpus = workspace.gpus() if device != "cpu" else []
        number_format = preflight.machine(config, gpus)
        base_dir = sources.base_dir(config.spec, config.base_source)
        lora = preflight.model(config, base_dir, None if config.start_adapter is None else _adapter_dir(config))
        shape = Shape.of(base_dir)
        pack, foreseen = _largest(plan, lambda pack: memory_needed(config, shape, lora, number_format, pack=pack))
        if not log.quiet:
            preflight.fits(foreseen, gpus, plan.processes, pack="the largest pack")
        log.say(f"Loading {config.spec.base_model} …")
        base = _base(config, base_dir, getattr(torch, number_format), device)
        model = weights.with_adapter(base, _adapter_dir(config) if _is_continued(config) else None, lora)
        name = config.spec.base_model  # of a directory its name alone, not a path of this machine
        model.peft_config["default"].base_model_name_or_path = Path(name).name if Path(name).is_dir() else name
        if memory.head_in_chunks(shape, lora) and not head.use(model):
            log.say("The logits of this model are scaled or capped, so they are not made in chunks.")
        weights.require_formats(model, getattr(torch, number_format))
        return cls(model, pack, foreseen)

    def try_out(self, made: "Trainer", log: Log) -> None:
        """Three steps on the largest pack: memory runs out now or never."""
        found = trial.run(
            self.model,
            packing.collate(self.pack),
            predicted=self.foreseen,
            autocast=made.accelerator.autocast,
            scaler=made.accelerator.scaler,
        )
        tokens = sum(len(row["input_ids"]) for row in self.pack)
        peak = ""
        if found.peak_bytes is not None:
            peak = f", {found.peak_bytes / 1e9:.1f} GB at the peak, {sum(self.foreseen.values()) / 1e9:.1f} GB foreseen"
            if not log.file.is_file():  # a run that goes on has it in its log
                log.write(memory_predicted=sum(self.foreseen.values()), memory_peak=found.peak_bytes)
        log.say(f"Trial on the largest pack, {tokens} tokens: {1 / found.seconds_per_token:.0f} tokens/s{peak}.")


def _is_continued(config: TrainConfig) -> bool:
    return config.start_adapter is not None and not config.is_folded


def _largest(plan: Plan, needed: Callable[[Pack], dict[str, int]]) -> tuple[list[Example], dict[str, int]]:
    """The pack of the run that needs the most memory, by the bytes that it needs."""
    packs = [pack for step in range(len(plan)) for packs in plan.layout(step) for pack in packs]
    lengths, learned = plan.rows.lengths, plan.rows.learned

    def tokens(pack: Sequence[int]) -> int:
        return sum(lengths[row] for row in pack)

    def squares(pack: Sequence[int]) -> int:  # what attention keeps on a CPU
        return sum(lengths[row] ** 2 for row in pack)

    def answers(pack: Sequence[int]) -> int:  # what the logits take
        return sum(learned[row] for row in pack)

    candidates = [max(packs, key=tokens), max(packs, key=squares), max(packs, key=answers)]
    shapes = [Pack(documents=tuple(lengths[row] for row in pack), learned=answers(pack)) for pack in candidates]
    bytes_of = [needed(shape) for shape in shapes]
    largest = max(range(len(candidates)), key=lambda index: sum(bytes_of[index].values()))
    return [plan.rows[row] for row in candidates[largest]], bytes_of[largest]


def _base(config: TrainConfig, base_dir: Path, dtype: "torch.dtype", device: str) -> "PreTrainedModel":
    base = weights.load_base(base_dir, config.weights_as, dtype, device)
    if config.is_folded:
        fold.into(base, base_dir, _adapter_dir(config))
    base.config.use_cache = False
    attention.use(base)
    head.sum_exactly(base)
    if device != "cpu":
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
        for parameter in base.parameters():
            if parameter.ndim == 1:  # norms, a few MB: their statistics overflow float16
                parameter.data = parameter.data.float()
    return base
