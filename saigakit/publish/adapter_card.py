"""Build the model card of a trained adapter: what it is, how it was trained and what was measured."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saigakit import evaluate, train
from saigakit.config import TrainConfig
from saigakit.core import hub, manifest
from saigakit.export import markdown
from saigakit.prompt.encoding import Tokenizer
from saigakit.train import curve


def build_card(stage_dir: Path, repo_id: str, tokenizer: Tokenizer) -> str:
    """The card of the adapter in `stage_dir`, with the results of 04_infer if it compared this very adapter."""
    content = manifest.read(stage_dir)
    config = TrainConfig.read(stage_dir / train.CONFIG_FILE)
    base, training = markdown.linked(config.spec.base_model), content.get("training", {})
    card = markdown.Card(
        spec=config.spec,
        title=repo_id.split("/")[1],
        library="peft",
        tags=["lora", "saiga", "saigakit"],
        chat_template=tokenizer.chat_template,
        system_prompt=content.get("system_prompt"),
        versions=content.get("versions", {}),
    )
    comparison = evaluate.table_about(stage_dir, "adapter", manifest.hashes(stage_dir))
    measured = [
        _losses(config, curve.read_log(stage_dir), training.get("best_step")),
        markdown.of_table(comparison) if comparison else "",
        "![Training and evaluation loss](curve.png)",
        "Measured by the author alone. Nothing else was tested: not facts, not safety, no other tasks. It may give "
        "wrong answers in confident words.",
    ]
    settings = markdown.table(("setting", "value"), _settings(config, stage_dir, content))
    records = ", ".join(f"`{digest}`" for digest in content["inputs"]["train"].values())
    sections = {
        "Measured": "\n\n".join(filter(None, measured)),
        "Trained with": f"{settings}\n\nThe records are not published. SHA-256 of the training records: {records}.",
    }
    english = f"A LoRA adapter for {base}, trained with saigakit{_continued(config)}."
    russian = (
        f"Это адаптер LoRA для {base}, обученный с saigakit. Он работает только с этой базовой моделью и с шаблоном "
        "диалога, который приведён ниже."
    )
    return card.text(english, russian, sections)


def _started_from(config: TrainConfig) -> str | None:
    """The public name of the adapter that was continued; None for a new one."""
    name = config.start_adapter
    return name if name is None or hub.is_hub_id(name) else "another adapter"


def _continued(config: TrainConfig) -> str:
    if (start := _started_from(config)) is None:
        return ""
    return f"; it includes {start}" if config.is_folded else f"; it continues {start}"


def _losses(config: TrainConfig, log: list[curve.Entry], best_step: int | None) -> str:
    evaluations = curve.evaluations(log)
    if not evaluations:
        return "There was no evaluation set, so no loss was measured."
    best = [("this adapter", entry) for entry in evaluations if entry[0] == best_step]
    named = [("before training", evaluations[0]), *best, ("last", evaluations[-1])]
    rows = ((name, f"{step}", f"{loss:.4f}") for name, (step, loss) in named)
    note = "The evaluation set was not trained on, but the step of this adapter was chosen by its loss."
    if config.is_folded and config.weights_as != "none":
        note += f" The loss was measured on the sum of the base and the released adapter in {config.weights_as}."
    return f"{markdown.table(('evaluation loss, nats per token', 'step', 'loss'), rows)}\n\n{note}"


def _settings(config: TrainConfig, stage_dir: Path, content: Mapping[str, Any]) -> list[tuple[str, str]]:
    lora = json.loads((stage_dir / "adapter_config.json").read_text(encoding="utf-8"))
    last = [entry for entry in curve.read_log(stage_dir) if "loss" in entry][-1]
    training = content.get("training", {})
    best_step = training.get("best_step")
    of_all = f" of {training['steps']}, ended by max_hours" if training.get("ended") == "max_hours" else ""
    folded = ", the released adapter's rank included" if config.is_folded else ""
    return [
        ("base weights", f"{config.weights_as}, {content.get('number_format', '?')}"),
        ("LoRA", f"r {lora['r']}, alpha {lora['lora_alpha']}, dropout {lora['lora_dropout']}{folded}"),
        ("layers", ", ".join(sorted(lora["target_modules"]))),
        ("learning rate", f"{config.peak_learning_rate:g}"),
        ("epochs", f"{config.epochs:g}"),
        ("conversations per step", f"{config.batch_size}"),
        ("longest conversation", f"{config.sequence_budget} tokens"),
        ("steps", f"{last['step']}{of_all}" + (f", adapter of step {best_step}" if best_step is not None else "")),
        ("tokens", f"{last['tokens']:,}"),
        ("seed", f"{config.seed}"),
    ]
