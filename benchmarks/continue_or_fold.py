"""Compare two ways to build on a released adapter: continue it, or fold it into the base and train a new LoRA.

python benchmarks/continue_or_fold.py [--steps 80] [--released-steps 60]

On SmolLM2-135M: first train an adapter on the attention modules only (rank 16, like Saiga's) to explain words in
Russian, and treat it as the released adapter. Then train on the demo's task in three ways, with the same records,
steps, batches and learning rate: continue the released adapter; fold it into the base and train a new LoRA on all seven
linear layers; train such a LoRA on the base, without the released adapter.
"""

import argparse
import dataclasses
import json
import random
import tempfile
from pathlib import Path

from saigakit import registry, train
from saigakit.config import TrainConfig
from saigakit.core import launch
from saigakit.core.display import Table
from saigakit.demo import wordnet_records
from saigakit.registry import ALL_LINEAR, ATTENTION, Lora
from saigakit.train import curve, worker

MODEL, BATCH, LENGTH = "smollm2_135m", 4, 768
RATE = 5e-4


def write_explanations(file: Path, count: int) -> Path:
    """Write records of another task in the same language: explain what a word means."""
    known = random.Random(1).sample(list(wordnet_records.definitions()), count)
    talks = [{"user": f"Что значит «{term}»?", "bot": f"{term} — это {text}."} for term, text in known]
    file.write_text("\n".join(json.dumps(talk, ensure_ascii=False) for talk in talks), encoding="utf-8")
    return file


def run_training(directory: Path, name: str, records: Path, held_out: Path, steps: int, **settings) -> Path:
    """Run 02_train for `steps` steps."""
    count = len(records.read_text(encoding="utf-8").splitlines())
    config = TrainConfig(
        model=MODEL,
        train_file=str(records),
        eval_file=str(held_out),
        output_dir=str(directory / name),
        batch_size=BATCH,
        max_seq_length=LENGTH,
        epochs=steps * BATCH / count,
        learning_rate=RATE,
        **settings,
    )
    return train.train_adapter(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--released-steps", type=int, default=60)
    given = parser.parse_args()
    # Train in this process: a child would not see the changed registry.
    launch.distributed = lambda _, arguments, **__: worker.main(Path(arguments[0]))
    packaged = wordnet_records.packaged_records()
    task, held_out = packaged / "train.jsonl", packaged / "held_out.jsonl"
    attention = Lora(rank=16, alpha=16, target_modules=ATTENTION)
    everything = Lora(rank=16, alpha=16, target_modules=ALL_LINEAR)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        general = write_explanations(directory / "general.jsonl", 1000)
        unseen = write_explanations(directory / "unseen.jsonl", 40)
        released = run_training(
            directory, "released", general, unseen, given.released_steps, adapter=None, lora=attention
        )
        registry.MODELS[MODEL] = dataclasses.replace(registry.MODELS[MODEL], released_adapter=str(released))
        ways = {
            "continue the released adapter": {"adapter": "released"},
            "fold it and train a new LoRA on all layers": {"adapter": "folded", "lora": everything},
            "train a new LoRA on all layers without it": {"adapter": None, "lora": everything},
        }
        rows = []
        for number, (name, settings) in enumerate(ways.items()):
            made = run_training(directory, str(number), task, held_out, given.steps, **settings)
            held = [entry["held_out_loss"] for entry in curve.read_log(made) if "held_out_loss" in entry]
            seconds = [entry["seconds"] for entry in curve.read_log(made) if "seconds" in entry][-1]
            size = (made / "adapter_model.safetensors").stat().st_size / 1e6
            rows.append((name, *(f"{loss:.4f}" for loss in (held[0], *held[1:])), f"{seconds:.0f}", f"{size:.1f}"))
    evaluations = [f"loss {index}/{len(rows[0]) - 4}" for index in range(len(rows[0]) - 3)]
    note = (
        f"Loss per token on the evaluation set; {given.steps} steps of {BATCH} conversations, learning rate {RATE:g}."
    )
    print(Table(("method", *evaluations, "seconds", "adapter MB"), rows, note))


if __name__ == "__main__":
    main()
