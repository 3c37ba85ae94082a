"""Compare merging an adapter trained in nf4 into the published weights with merging it into the dequantised ones.

python benchmarks/merge_into.py [--steps 60] [--held-out 40]

On SmolLM2-135M: train an adapter on all linear layers for the demo's task, on the base in nf4 (double-quantised,
computed in float32). bitsandbytes on a CPU is many times slower than plain matrices, so training runs on the same
weights dequantised once; the script checks that the real nf4 model with this adapter has the same loss. Then it
measures the loss per trained token on the evaluation set, for that trained model and for both merged models in float32
and quantised to GGUF types. The merged models run in llama.cpp, with keys and values in float32.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, get_args

from saigakit import export, registry, train
from saigakit.config import TrainConfig
from saigakit.core import launch, manifest
from saigakit.core.display import Table
from saigakit.data import read_conversations
from saigakit.data.conversations import spread
from saigakit.demo.wordnet_records import packaged_records
from saigakit.export.merge_plan import MergePlan
from saigakit.export.other_formats import write_merged
from saigakit.prompt import encoding
from saigakit.prompt.encoding import IGNORE_INDEX, Example
from saigakit.registry import ALL_LINEAR, Lora
from saigakit.train import worker
from saigakit.weights import find, load
from saigakit.weights.merge import Into, Merged

MODEL, BATCH, LENGTH = "smollm2_135m", 4, 768
RATE = 5e-4
QUANT_TYPES = ("F32", "Q8_0", "Q4_K_M")
CHECKED = 2  # conversations on which the real nf4 model must have the same loss
Logits = Callable[[Sequence[int]], Any]  # token ids to an array [tokens, vocabulary] in float32


def run_training(directory: Path, base_dir: Path, records: Path, held_out: Path, steps: int) -> Path:
    """Run 02_train for `steps` steps on `base_dir` and record it as a run in nf4."""
    count = len(records.read_text(encoding="utf-8").splitlines())
    config = TrainConfig(
        model=MODEL,
        train_file=str(records),
        eval_file=str(held_out),
        output_dir=str(directory / "02_train"),
        base_source=str(base_dir),
        adapter=None,
        lora=Lora(rank=16, alpha=16, target_modules=ALL_LINEAR),
        quantization="none",
        batch_size=BATCH,
        max_seq_length=LENGTH,
        epochs=steps * BATCH / count,
        learning_rate=RATE,
        eval_steps=steps,
    )
    made = train.train_adapter(config)
    content = json.loads((made / manifest.NAME).read_text(encoding="utf-8"))
    content["parameters"]["quantization"] = "nf4"
    (made / manifest.NAME).write_text(json.dumps(content), encoding="utf-8")
    return made


def loss(logits: Logits, examples: Sequence[Example]) -> float:
    """Average over all trained tokens."""
    import torch

    total, count = 0.0, 0
    for example in examples:
        targets = torch.tensor(example["labels"][1:])
        found = torch.as_tensor(logits(example["input_ids"]))[:-1]
        total += torch.nn.functional.cross_entropy(
            found.double(), targets, ignore_index=IGNORE_INDEX, reduction="sum"
        ).item()
        count += int((targets != IGNORE_INDEX).sum())
    return total / count


def loss_of_gguf(file: Path, examples: Sequence[Example]) -> float:
    import llama_cpp

    options = {"n_ctx": LENGTH, "logits_all": True, "type_k": 0, "type_v": 0, "verbose": False}
    with closing(llama_cpp.Llama(str(file), **options)) as llm:

        def logits(ids: Sequence[int]) -> Any:
            llm.reset()
            llm.eval(ids)
            return llm.scores[: len(ids)].copy()

        return loss(logits, examples)


def loss_of(base_dir: Path, adapter_dir: Path | None, quantization: str, examples: Sequence[Example]) -> float:
    """Load the base as training does, with the adapter if one is given, and compute the loss."""
    import torch

    model = load.base_model(base_dir, quantization, torch.float32, "cpu")
    if adapter_dir is not None:
        model = load.with_adapter(model, adapter_dir, Lora())
    model.eval()

    def logits(ids: Sequence[int]) -> Any:
        with torch.no_grad():
            return model(torch.tensor([list(ids)])).logits[0]

    return loss(logits, examples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--held-out", type=int, default=40)
    given = parser.parse_args()
    launch.distributed = lambda _, arguments, **__: worker.main(Path(arguments[0]))
    packaged = packaged_records()
    tokenizer = encoding.load_tokenizer(MODEL)
    talks = list(read_conversations(packaged / "held_out.jsonl"))
    chosen = [talks[index] for index in spread(range(len(talks)), given.held_out)]
    examples = [row for rows in encoding.encode_rows(chosen, tokenizer, limit=LENGTH) for row in rows]
    examples = [example for example in examples if len(example["input_ids"]) <= LENGTH]
    base_dir = find.base_dir(registry.find(MODEL), None)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        dequantised = Merged.open(base_dir, None, into="dequantized", number_format="float32")
        nf4_dir = write_merged(dequantised, MergePlan.of(MODEL, None), directory / "nf4", "float32")
        adapter_dir = run_training(
            directory, nf4_dir, packaged / "train.jsonl", packaged / "held_out.jsonl", given.steps
        )
        few = examples[:CHECKED]
        real, same = (loss_of(base, adapter_dir, how, few) for base, how in ((base_dir, "nf4"), (nf4_dir, "none")))
        print(
            f"Loss on {CHECKED} conversations: {real:.6f} in nf4 by bitsandbytes, {same:.6f} dequantised once.",
            flush=True,
        )
        assert abs(real - same) < 1e-3
        rows: list[tuple[str, ...]] = [
            ("base", f"{loss_of(base_dir, None, 'none', examples):.4f}"),
            ("base in nf4", f"{loss_of(nf4_dir, None, 'none', examples):.4f}"),
            ("base in nf4 + adapter, as trained", f"{loss_of(nf4_dir, adapter_dir, 'none', examples):.4f}"),
        ]
        print(rows, flush=True)
        for quant_type in QUANT_TYPES:
            for into in get_args(Into):
                file = export.to_gguf(
                    model=MODEL,
                    adapter=adapter_dir,
                    output=directory / "model.gguf",
                    quant_type=quant_type,
                    merge_into=into,
                )
                rows.append((f"merged into {into}, {quant_type}", f"{loss_of_gguf(file, examples):.4f}"))
                print(rows[-1], flush=True)
                file.unlink()
    tokens = sum(label != IGNORE_INDEX for example in examples for label in example["labels"])
    note = f"{tokens} trained tokens in {len(examples)} rows of the evaluation set; {given.steps} steps of {BATCH}."
    print(Table(("model", "loss per trained token"), rows, note))


if __name__ == "__main__":
    main()
