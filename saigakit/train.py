"""Conversations into an adapter: the stage 02_train, and the child process that does its work.

As a module (`python -m saigakit.train config.json`) it is that child; more than one GPU: one child each.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saigakit import (
    attention,
    curve,
    data,
    launch,
    manifest,
    memory,
    rows,
    sources,
    tokenization,
    trainer,
    weights,
    workspace,
)
from saigakit.config import TrainConfig
from saigakit.errors import SaigaError
from saigakit.trainer import Log, Plan

if TYPE_CHECKING:
    from peft import PeftModel

STAGE = "02_train"
EVALUATED = 24  # held-out conversations, evenly over the file: enough for a curve, seconds on a CPU
CONFIG_FILE = "train_config.json"


def train_adapter(config: TrainConfig) -> Path:
    """The stage 02_train in `config.output_dir`: adapter, log.jsonl, curve.png and the config.

    Everything that can be known in the first minute is refused in it. Raises SaigaError.
    """
    spec, final = config.spec, Path(config.output_dir)
    files = {"train": config.train_file, "held_out": config.eval_file}
    found = {name: workspace.find_input(file, run_dir=final.parent) for name, file in files.items() if file}
    config = _as_formatted(config, found["train"].parent)
    gpus = workspace.gpus()[: config.processes]
    number_format = weights.number_format(spec, gpus)
    base_dir = sources.base_dir(spec, config.base_source)
    adapter_dir = None if config.start_adapter is None else sources.adapter_dir(spec, config.start_adapter)
    if adapter_dir is not None:
        weights.require_fitting(adapter_dir, base_dir)
    needed = _memory_needed(config, base_dir, on_gpu=bool(gpus), float32=number_format == "float32")
    _require_memory(needed, gpus, config.processes or 1)
    workspace.require_disk(final, needed["adapter and optimizer"] + 10 * 10**6, "The adapter with its log")
    parameters = {name: value for name, value in config.to_json().items() if not name.endswith(("_file", "_dir"))}
    identity: dict[str, Any] = {
        "stage": STAGE,
        "parameters": parameters,
        "inputs": {name: manifest.hashes(file) for name, file in found.items()}
        | {"base": manifest.hashes(base_dir), "adapter": None if adapter_dir is None else manifest.hashes(adapter_dir)},
    }
    if manifest.is_kept(final, **identity):
        return final
    prompt = data.common_system_prompt(data.read_conversations(found["train"]))
    with manifest.making(final, **identity, facts={"number_format": number_format, "system_prompt": prompt}) as partial:
        paths = {"train_file": str(found["train"]), "output_dir": str(partial)}
        paths |= {"eval_file": str(found["held_out"])} if "held_out" in found else {}
        child_config = TrainConfig(**{**_fields(config), **paths}).write(partial / CONFIG_FILE)
        launch.distributed("saigakit.train", [str(child_config)], processes=config.processes or len(gpus) or 1)
        curve.plot(curve.read(partial)).savefig(partial / "curve.png", dpi=110)
        config.write(partial / CONFIG_FILE)
    return final


def _as_formatted(config: TrainConfig, directory: Path) -> TrainConfig:
    """Records that 01_format made are of one model and one longest length, and it is not asked for again."""
    if not (directory / manifest.NAME).is_file():
        return config
    formatted = manifest.require_stage(directory, "01_format", model=config.model)
    return replace(config, max_seq_length=config.max_seq_length or formatted["parameters"]["max_seq_length"])


def _fields(config: TrainConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in (field.name for field in fields(config))}


def _memory_needed(config: TrainConfig, base_dir: Path, *, on_gpu: bool, float32: bool) -> dict[str, int]:
    return memory.training(
        memory.Shape.of(base_dir),
        quantization=config.weights_as,
        lora=config.new_lora,
        pack_tokens=config.sequence_budget,
        itemsize=4 if float32 else 2,
        checkpointing=on_gpu,
    )


def _require_memory(needed: dict[str, int], gpus: Sequence[workspace.Gpu], processes: int) -> None:
    """Raises SaigaError with the number needed and the number there."""
    remedy = "Use a smaller max_seq_length, quantization='nf4' or a smaller model."
    total, parts = sum(needed.values()), memory.in_words(needed)
    print(f"Memory: about {total / 1e9:.1f} GB for each process ({parts}).", flush=True)
    for gpu in gpus:
        if gpu.free < total:
            raise SaigaError(
                f"Training needs about {total / 1e9:.1f} GB on {gpu.name} ({parts}), and {gpu.free / 1e9:.1f} GB of "
                f"its {gpu.memory / 1e9:.1f} GB are free. {remedy}"
            )
    if not gpus:
        workspace.require_memory(total * processes, f"Training ({parts})", remedy)


def main(config_file: Path) -> None:
    """In the child: loads, trains, writes the adapter and the log beside the config."""
    import torch
    import transformers

    weights.quiet()
    config = TrainConfig.read(config_file)
    rank, processes = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(rank)
    weights.cpu_threads()
    tokenizer = tokenization.load_tokenizer(config.model, config.base_source)
    train_rows = _rows(config.train_file, tokenizer, config)
    held_out = data.spread(_rows(config.eval_file, tokenizer, config), EVALUATED) if config.eval_file else []
    log = Log(Path(config.output_dir) / curve.LOG_FILE, quiet=rank > 0)
    plan = Plan(config, train_rows, processes)
    log.say(
        f"{len(train_rows)} conversations, {sum(plan.tokens):,} tokens in {config.epochs:g} epochs: {plan.steps} steps."
    )
    transformers.set_seed(config.seed)  # a new adapter begins at random
    log.say(f"Loading {config.spec.base_model} …")
    model = _model(config, on_gpu=on_gpu, device=f"cuda:{rank}" if on_gpu else "cpu")
    run = trainer.build(config, model, plan, held_out, log)
    run.train()
    evaluated = [entry["step"] for entry in run.state.log_history if "eval_loss" in entry]
    if held_out and run.state.global_step not in evaluated:
        run.evaluate()
    if run.is_world_process_zero():
        _save(model, config)


def _rows(file: str, tokenizer: tokenization.Tokenizer, config: TrainConfig) -> rows.Rows:
    path = Path(file)
    return rows.store(data.read_conversations(path), tokenizer, config.sequence_budget, name=path.name)


def _model(config: TrainConfig, *, on_gpu: bool, device: str) -> "PeftModel":
    import torch

    spec, gpus = config.spec, workspace.gpus() if on_gpu else []
    dtype: torch.dtype = getattr(torch, weights.number_format(spec, gpus))
    base_dir = sources.base_dir(spec, config.base_source)
    base = weights.load_base(base_dir, config.weights_as, dtype, device)
    base.config.use_cache = False
    attention.use(base)
    if on_gpu:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
        for parameter in base.parameters():
            if parameter.ndim == 1:  # norms, a few MB: their statistics overflow float16
                parameter.data = parameter.data.float()
    adapter_dir = None if config.start_adapter is None else sources.adapter_dir(spec, config.start_adapter)
    return weights.with_adapter(base, adapter_dir, config.new_lora)


def _save(model: "PeftModel", config: TrainConfig) -> None:
    """The adapter alone; its config names the base by its public name, not by a path of this machine."""
    model.peft_config["default"].base_model_name_or_path = config.spec.base_model
    model.save_pretrained(config.output_dir, save_embedding_layers=False)  # "auto" would ask the Hub for the base
    (Path(config.output_dir) / "README.md").unlink(missing_ok=True)  # peft's empty model card


if __name__ == "__main__":
    with launch.child():
        main(Path(sys.argv[1]))
