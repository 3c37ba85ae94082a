"""Publish a trained adapter on the Hub, with a card of how it was trained and what was measured."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saigakit import evaluate, train
from saigakit.config import TrainConfig
from saigakit.core import hub, manifest
from saigakit.export import markdown
from saigakit.prompt import encoding, template
from saigakit.prompt.encoding import Tokenizer
from saigakit.publish import upload
from saigakit.train import curve

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", template.FILE)
_SHOWN = ("log.jsonl", "curve.png")  # what the card shows; samples.md contains records and stays here


def push_adapter(stage_dir: str | Path, repo_id: str, *, private: bool = True, replace: bool = False) -> str:
    """Push the adapter of a finished 02_train and its card to `repo_id` in one commit; returns the address.

    Of the records only their SHA-256 and common system prompt are published. Needs the secret HF_TOKEN. Without
    `replace`, raises SaigaError if the repository holds anything but an earlier adapter of this model and base.
    """
    directory = Path(stage_dir)
    content = upload.require_unchanged(directory, train.STAGE)
    repository = upload.HubRepository(repo_id)
    model = content["parameters"]["model"]
    upload.print_terms(model)
    chosen = directory / template.FILE  # of 01_format
    source = content["parameters"].get("base_source")
    tokenizer = encoding.load_tokenizer(model, source, str(chosen) if chosen.is_file() else None)
    with tempfile.TemporaryDirectory() as scratch:
        files = {name: directory / name for name in (*ADAPTER_FILES, *_SHOWN) if (directory / name).is_file()}
        published = upload.public_manifest(content, ADAPTER_FILES, directory.parent)
        card = build_card(directory, repo_id, tokenizer)
        files |= upload.write_texts(Path(scratch), published, {"README.md": card})
        message = f"Adapter of {model}, trained with saigakit"
        return repository.push(files, published, message, private=private, replace=replace)


def build_card(stage_dir: Path, repo_id: str, tokenizer: Tokenizer) -> str:
    """The card of the adapter in `stage_dir`, with the results of 04_infer if it compared this very adapter."""
    content = manifest.read(stage_dir)
    config = TrainConfig.read(stage_dir / train.CONFIG_FILE)
    base = markdown.linked(config.spec.base_model)
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
        markdown.of_table(curve.summary(stage_dir)),
        _about_losses(config, curve.evaluations(curve.read_log(stage_dir))),
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
    start = _started_from(config, stage_dir.parent)
    continued = "" if start is None else f"; it {'includes' if config.is_folded else 'continues'} {start}"
    english = f"A LoRA adapter for {base}, trained with saigakit{continued}."
    russian = (
        f"Это адаптер LoRA для {base}, обученный с saigakit. Он работает только с этой базовой моделью и с шаблоном "
        "диалога, который приведён ниже."
    )
    return card.text(english, russian, sections)


def _started_from(config: TrainConfig, run_dir: Path) -> str | None:
    """The public name of the adapter that was continued; None for a new one."""
    name = config.start_adapter
    is_public = name is not None and hub.is_hub_id(name.partition("@")[0]) and upload.public(name, run_dir) == name
    return name if name is None or is_public else "another adapter"


def _about_losses(config: TrainConfig, evaluations: Sequence[tuple[int, float]]) -> str:
    if not evaluations:
        return "There was no evaluation set."
    note = "The evaluation set was not trained on, but the step of this adapter was chosen by its loss."
    if config.is_folded and config.weights_as != "none":
        note += f" The loss was measured on the sum of the base and the released adapter in {config.weights_as}."
    return note


def _settings(config: TrainConfig, stage_dir: Path, content: Mapping[str, Any]) -> list[tuple[str, str]]:
    lora = json.loads((stage_dir / "adapter_config.json").read_text(encoding="utf-8"))
    folded = ", the released adapter's rank included" if config.is_folded else ""
    return [
        ("base weights", f"{config.weights_as}, {content.get('number_format', '?')}"),
        ("LoRA", f"r {lora['r']}, alpha {lora['lora_alpha']}, dropout {lora['lora_dropout']}{folded}"),
        ("layers", ", ".join(sorted(lora["target_modules"]))),
        ("learning rate", f"{config.peak_learning_rate:g}"),
        ("epochs", f"{config.epochs:g}"),
        ("conversations per step", f"{config.batch_size}"),
        ("longest conversation", f"{config.sequence_budget} tokens"),
        ("seed", f"{config.seed}"),
    ]
