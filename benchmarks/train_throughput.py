"""Compare four ways of training by real tokens per second, on the same model, adapter and conversations.

python benchmarks/train_throughput.py [--hidden 1024] [--layers 4] [--conversations 48] [--rounds 4] [--threads 2]

- tutorial: the 2023 tutorial's collator and batches: two conversations padded to a multiple of 8, in random order, the
  language-model head on all positions, all tokens trained.
- grouped: the same, with conversations of similar length in one batch.
- TRL: SFTTrainer with packing="bfd", if trl and datasets are installed (`pip install trl datasets`).
- saigakit: packs without padding, attention within each document, the head on trained positions only.

Lengths are log-normal as in dialogues (mean 598 tokens, median 417), scaled with the model's width so that attention
has the same share of the work as in a 7B model. Each way makes one optimizer step over all conversations, in a separate
process and in alternating rounds; activation checkpointing is always on. The script also compares the speed of the
operations that saigakit executes, recomputation included, with that of torch.mm at the model's shapes.
"""

import argparse
import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import util
from pathlib import Path

from saigakit.config import TrainConfig
from saigakit.core.display import Table
from saigakit.data import rows
from saigakit.prompt.encoding import IGNORE_INDEX
from saigakit.registry import ATTENTION
from saigakit.train import checkpoints, layers, run_state, steps, trainer

WAYS = ("tutorial", "grouped", "TRL", "saigakit")
VOCABULARY, WIDTH_7B, PACK_7B = 32_000, 4096, 3584
TRAINED = 0.3  # share of a conversation, at its end


def make_conversations(count: int, hidden: int, seed: int = 0) -> list[dict[str, list[int]]]:
    rng = random.Random(seed)
    sigma = math.sqrt(2 * math.log(598 / 417))
    made = []
    for _ in range(count):
        length = min(3500, max(50, rng.lognormvariate(math.log(417), sigma)))
        length = max(8, round(length * hidden / WIDTH_7B))
        ids = [rng.randrange(3, VOCABULARY) for _ in range(length)]
        answer = round(TRAINED * length)
        made.append({"input_ids": ids, "labels": [IGNORE_INDEX] * (length - answer) + ids[length - answer :]})
    return made


def make_model(hidden: int, layers: int):
    """Make a Llama of random weights with a LoRA on its attention, like Saiga's adapters."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=round(hidden * 11008 / 4096),
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        attn_implementation="sdpa",
        use_cache=False,
    )
    base = LlamaForCausalLM(config)
    base.gradient_checkpointing_enable({"use_reentrant": False})
    base.enable_input_require_grads()
    lora = LoraConfig(r=16, lora_alpha=16, lora_dropout=0.0, target_modules=list(ATTENTION), task_type="CAUSAL_LM")
    return get_peft_model(base, lora)


def training_arguments(directory: str, **more):
    from transformers import TrainingArguments

    return TrainingArguments(**_settings(directory), **more)


def _settings(directory: str) -> dict:
    import torch

    return {
        "output_dir": directory,
        "num_train_epochs": 1,
        "learning_rate": 1e-4,
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "remove_unused_columns": False,
    }


def build_padded(model, made, directory: str, *, grouped: bool, **more):
    """Build the tutorial's Trainer: all tokens are trained, rows are padded to a multiple of 8."""
    import torch
    from transformers import Trainer

    def collate(batch):
        width = -(-max(len(row["input_ids"]) for row in batch) // 8) * 8
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        labels = torch.full((len(batch), width), IGNORE_INDEX)
        mask = torch.zeros(len(batch), width, dtype=torch.long)
        for number, row in enumerate(batch):
            length = len(row["input_ids"])
            ids[number, :length] = labels[number, :length] = torch.tensor(row["input_ids"])
            mask[number, :length] = 1
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    order = random.Random(1).sample(made, len(made))
    if grouped:
        order.sort(key=lambda row: -len(row["input_ids"]))

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(order)

    settings = training_arguments(
        directory, per_device_train_batch_size=2, gradient_accumulation_steps=math.ceil(len(order) / 2), **more
    )
    return InOrder(model=model, args=settings, train_dataset=order, data_collator=collate)


def build_trl(model, made, directory: str, budget: int):
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>")),
        bos_token="<s>", eos_token="</s>", pad_token="<unk>",
    )  # fmt: skip
    lengths = [len(row["input_ids"]) for row in made]
    settings = SFTConfig(
        **_settings(directory),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=len(steps.best_fit(lengths, budget)),
        packing=True,
        packing_strategy="bfd",
        max_length=budget,
        bf16=False,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        dataset_num_proc=1,
    )
    return SFTTrainer(model=model, args=settings, train_dataset=Dataset.from_list(made), processing_class=tokenizer)


def build_saigakit(model, made, directory: str, budget: int):
    layers.use_packed_attention(model.get_base_model())
    stored = rows.as_dataset(enumerate(made, start=1))
    config = TrainConfig(
        model=directory, train_file="", output_dir=directory, batch_size=len(made), max_seq_length=budget, epochs=1
    )
    place = Path(directory)
    run = run_state.Run(
        config,
        steps.Plan(config, stored),
        None,
        checkpoints.Store(place / "checkpoints", {}),
        run_state.Log(place / "log.jsonl", quiet=True),
    )
    return trainer.build(run, model, "float32", resumed=False)


def measure(way: str, given: argparse.Namespace) -> dict:
    """Measure the loss of the first step, the seconds of the second and this process's peak memory."""
    import torch
    import transformers

    torch.set_num_threads(given.threads)
    transformers.logging.set_verbosity_error()
    made = make_conversations(given.conversations, given.hidden)
    budget = round(PACK_7B * given.hidden / WIDTH_7B)
    model = make_model(given.hidden, given.layers)
    with tempfile.TemporaryDirectory() as directory:
        build = {
            "tutorial": lambda: build_padded(model, made, directory, grouped=False),
            "grouped": lambda: build_padded(model, made, directory, grouped=True),
            "TRL": lambda: build_trl(model, made, directory, budget),
            "saigakit": lambda: build_saigakit(model, made, directory, budget),
        }[way]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run = build()
        clock = Clock.on(run)
        run.train()  # warms up, and its loss is that of the untrained adapter
        loss = next(entry["loss"] for entry in run.state.log_history if "loss" in entry)
        run.train()
        seconds = clock.seconds[-1]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        flops = count_flops(run) if way == "saigakit" else 0
    return {
        "loss": loss,
        "seconds": seconds,
        "tokens": sum(len(row["input_ids"]) for row in made),
        "peak_mb": (peak - before) / 1024,
        "tflop": flops / 1e12,
    }


class Clock:
    """Seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    @classmethod
    def on(cls, run) -> "Clock":
        from transformers import TrainerCallback

        clock = cls()

        class Watch(TrainerCallback):
            def on_step_begin(self, *_, **__):
                self.start = time.perf_counter()

            def on_step_end(self, *_, **__):
                clock.seconds.append(time.perf_counter() - self.start)

        run.add_callback(Watch())
        return clock


def count_flops(run) -> int:
    """Count the floating-point operations of one more step, recomputation included."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run.train()
    return counter.get_total_flops()


def measure_torch_mm(hidden: int, threads: int, tokens: int) -> float:
    """Measure the FLOP/s of torch.mm at the shapes of a layer."""
    import torch

    torch.set_num_threads(threads)
    wide = round(hidden * 11008 / 4096)
    shapes = [(tokens, hidden, hidden)] * 4 + [(tokens, hidden, wide)] * 2 + [(tokens, wide, hidden)]
    pairs = [(torch.randn(m, k), torch.randn(k, n)) for m, k, n in shapes]
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        for first, second in pairs:
            torch.mm(first, second)
        best = min(best, time.perf_counter() - start)
    return sum(2 * m * k * n for m, k, n in shapes) / best


def measure_in_child(way: str, given: argparse.Namespace) -> dict:
    command = [sys.executable, __file__, "--way", way]
    for name in ("hidden", "layers", "conversations", "threads"):
        command += [f"--{name}", str(getattr(given, name))]
    quiet = {**os.environ, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    ended = subprocess.run(command, capture_output=True, text=True, env=quiet, check=False)
    if ended.returncode:
        sys.exit(f"{way} failed:\n{ended.stderr[-3000:]}")
    return json.loads(ended.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--conversations", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--way", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        print(json.dumps(measure(given.way, given)))
        return
    ways = [way for way in WAYS if way != "TRL" or (util.find_spec("trl") and util.find_spec("datasets"))]
    found: dict[str, list[dict]] = {way: [] for way in ways}
    reached: list[float] = []
    for number in range(given.rounds):
        for way in ways if number % 2 == 0 else ways[::-1]:
            found[way].append(measure_in_child(way, given))
        reached.append(measure_torch_mm(given.hidden, given.threads, round(PACK_7B * given.hidden / WIDTH_7B)))
        print(f"round {number + 1} of {given.rounds} is done", flush=True)
    print(table(found, given))
    work = [
        one["tflop"] * 1e12 / one["seconds"] / products
        for one, products in zip(found["saigakit"], reached, strict=True)
    ]
    print(
        f"\nsaigakit executes {found['saigakit'][0]['tflop']:.2f} TFLOP per step, recomputation included, at "
        f"{statistics.median(work):.0%} ({min(work):.0%} to {max(work):.0%}) of the speed of torch.mm at these shapes "
        f"({statistics.median(reached) / 1e9:.0f} GFLOP/s)."
    )


def table(found: dict[str, list[dict]], given: argparse.Namespace) -> Table:
    lines = []
    for way, runs in found.items():
        ratios = [theirs["seconds"] / one["seconds"] for theirs, one in zip(found["tutorial"], runs, strict=True)]
        lines.append(
            (
                way,
                f"{statistics.median(one['tokens'] / one['seconds'] for one in runs):.0f}",
                f"{statistics.median(ratios):.2f}",
                f"{min(ratios):.2f} to {max(ratios):.2f}",
                f"{statistics.median(one['peak_mb'] for one in runs):.0f}",
                f"{runs[0]['loss']:.5f}",
            )
        )
    if "TRL" in found:
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(found["TRL"], found["saigakit"], strict=True)]
        comparison = f" saigakit / TRL: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})."
    else:
        comparison = " TRL is not installed."
    note = (
        f"{found['saigakit'][0]['tokens']:,} real tokens, {given.conversations} conversations, hidden {given.hidden}, "
        f"{given.layers} layers, {given.threads} threads, {given.rounds} rounds.{comparison}\n"
        "tutorial and grouped train all tokens, so their loss is not comparable."
    )
    header = ("way", "real tokens/s", "relative to tutorial", "in single rounds", "peak MB above the model", "loss")
    return Table(header, lines, note)


if __name__ == "__main__":
    main()
