"""A finished 02_train into its model card: what it is, what it was trained with, what was measured."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from saigakit import evaluate, train
from saigakit.config import TrainConfig
from saigakit.core import hub, manifest
from saigakit.evaluate import results
from saigakit.export import markdown
from saigakit.prompt.encoding import Tokenizer
from saigakit.train import curve

_CARD = Template("""---
$metadata
---
# $title

A LoRA adapter for $base, trained with saigakit$continued. The base model's licence ($licence) applies to it.

Это адаптер LoRA для $base, обученный с saigakit. Он работает только вместе с этой базовой моделью и с шаблоном диалога,
который приведён ниже. Всё измеренное измерил его автор; независимой проверки не было. Ответы бывают неверны.
Действует лицензия базовой модели: $licence.

## Measured

$losses

$compared
![Training and held-out loss](curve.png)

Measured by its author alone. Nothing else was tested: not facts, not safety, no other tasks. It may give wrong answers
in confident words.

## Trained with

$training

The records are not published. SHA-256 of the training records: $data.

## Prompt

Chat template (SHA-256 `$template_hash`):

```jinja
$template
```

$system_prompt
## Versions

$versions
""")


def write(stage_dir: Path, repo_id: str, tokenizer: Tokenizer) -> str:
    """The card of the adapter in `stage_dir`, with the numbers of 04_infer where it compared this very adapter."""
    content = manifest.read(stage_dir)
    config = TrainConfig.read(stage_dir / train.CONFIG_FILE)
    template, prompt = tokenizer.chat_template, content.get("system_prompt")
    return _CARD.substitute(
        metadata=markdown.metadata(config.spec, "peft", ["lora", "saiga", "saigakit"]),
        title=repo_id.split("/")[1],
        base=markdown.linked(config.spec.base_model),
        continued=_continued(config),
        licence=config.spec.licence or "see there",
        losses=_losses(config, curve.read_log(stage_dir), content.get("training", {}).get("best_step")),
        compared=_compared(stage_dir),
        training=markdown.table(("setting", "value"), _settings(config, stage_dir, content)),
        data=", ".join(f"`{digest}`" for digest in content["inputs"]["train"].values()),
        template_hash=hashlib.sha256(template.encode("utf-8")).hexdigest(),
        template=template.replace("```", "` ` `"),
        system_prompt="" if not prompt else f"System prompt of the records: {markdown.code(prompt)}\n",
        versions=markdown.table(("package", "version"), content.get("versions", {}).items()),
    )


def _started_from(config: TrainConfig) -> str | None:
    """The adapter that was continued, by its public name; None for a new one."""
    name = config.start_adapter
    return None if name is None else name if hub.is_hub_id(name) else "another adapter"


def _continued(config: TrainConfig) -> str:
    if (start := _started_from(config)) is None:
        return ""
    return f"; {start} is added to it, and is a part of this adapter" if config.is_folded else f"; it continues {start}"


def _losses(config: TrainConfig, log: list[curve.Entry], kept: int | None) -> str:
    held_out = curve.evaluations(log)
    if not held_out:
        return "There were no held-out texts: no loss was measured."
    chosen = [entry for entry in held_out if entry[0] == kept]
    named = [("before training", held_out[0]), *(("this adapter", entry) for entry in chosen), ("last", held_out[-1])]
    rows = ((name, f"{step}", f"{loss:.4f}") for name, (step, loss) in named)
    table = markdown.table(("held-out loss, nats per token", "step", "loss"), rows)
    note = "The held-out texts were not trained on; the step of this adapter was chosen by them."
    if config.is_folded and config.weights_as != "none":
        note += f" They were measured on the sum of base and released adapter in {config.weights_as}."
    return f"{table}\n\n{note}"


def _compared(stage_dir: Path) -> str:
    """The table of 04_infer beside the stage; empty where it is missing or of another adapter."""
    directory = stage_dir.parent / evaluate.STAGE
    if not (directory / manifest.NAME).is_file():
        return ""
    if manifest.read(directory)["inputs"].get("adapter") != manifest.hashes(stage_dir):
        print(f"{directory} compared another adapter: its numbers are not in the model card.", flush=True)
        return ""
    found = results.show_table(results.read(directory))
    return f"{markdown.table(found.header, found.rows)}\n\n{found.note}\n"


def _settings(config: TrainConfig, stage_dir: Path, content: Mapping[str, Any]) -> list[tuple[str, str]]:
    lora = json.loads((stage_dir / "adapter_config.json").read_text(encoding="utf-8"))
    steps = [entry for entry in curve.read_log(stage_dir) if "loss" in entry]
    training = content.get("training", {})
    kept = training.get("best_step")
    of = f" of {training['steps']}, ended by max_hours" if training.get("ended") == "max_hours" else ""
    parts = ", the released adapter's rank included" if config.is_folded else ""
    return [
        ("base weights", f"{config.weights_as}, {content.get('number_format', '?')}"),
        ("LoRA", f"r {lora['r']}, alpha {lora['lora_alpha']}, dropout {lora['lora_dropout']}{parts}"),
        ("layers", ", ".join(sorted(lora["target_modules"]))),
        ("learning rate", f"{config.peak_learning_rate:g}"),
        ("epochs", f"{config.epochs:g}"),
        ("conversations per step", f"{config.batch_size}"),
        ("longest conversation", f"{config.sequence_budget} tokens"),
        ("steps", f"{steps[-1]['step']}{of}" + (f", adapter of step {kept}" if kept is not None else "")),
        ("tokens", f"{steps[-1]['tokens']:,}"),
        ("seed", f"{config.seed}"),
    ]
