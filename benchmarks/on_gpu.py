"""Measure in one run what only a machine with a GPU can show: nf4 training, its memory, resume, two GPUs, offloading.

    python benchmarks/on_gpu.py [--json on_gpu.json] [--minutes 8]

It needs no network: the weights are random numbers in the shapes of Llama-2 7B. Each measurement runs in a separate
process and gets what is left of the minutes. One that fails or takes too long becomes a row that says so, and the
others go on. Training is measured on dialogues of usual lengths, after a warm-up, and compared with the 2023 tutorial's
batches (two padded conversations, a head over all positions) on the same nf4 base and the same conversations. Without a
GPU tiny shapes are used, to check that everything runs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import export as export_benchmark
import kill_resume
import torch
import train_throughput
from train_throughput import Clock

from saigakit import export
from saigakit.config import TrainConfig
from saigakit.core import workspace
from saigakit.core.display import Table
from saigakit.data import rows
from saigakit.registry import ATTENTION, Lora
from saigakit.train import checkpoints, preflight, run_state, steps, trainer
from saigakit.train.loading import Loaded
from saigakit.weights import load
from saigakit.weights.model_shape import ModelShape

ON_GPU = torch.cuda.is_available()
LORA = Lora(target_modules=ATTENTION, dropout=0.0)
Measured = dict[str, Any]


def formats() -> list[str]:
    """The number formats that are fast on this machine."""
    if not ON_GPU:
        return ["float32"]
    return ["float16", "bfloat16"] if torch.cuda.get_device_capability() >= (8, 0) else ["float16"]


def train_tutorial(base: Path, scratch: Path, made: list, number_format: str) -> Measured:
    from peft import LoraConfig, get_peft_model

    model: Any = load.base_model(base, "nf4", getattr(torch, number_format), "cuda" if ON_GPU else "cpu")
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    lora = LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules=list(ATTENTION), task_type="CAUSAL_LM")
    autocast = {"fp16": number_format == "float16", "bf16": number_format == "bfloat16"}
    run = train_throughput.build_padded(get_peft_model(model, lora), made, str(scratch), grouped=False, **autocast)
    return measure_steps(run, made)


def train_saigakit(base: Path, scratch: Path, made: list, number_format: Any) -> Measured:
    """As 02_train does it: the memory is estimated, tried out on the largest pack and measured."""
    stored = rows.as_dataset(enumerate(made, start=1))
    config = TrainConfig(
        model=str(base), train_file="", output_dir=str(scratch), quantization="nf4", lora=LORA, batch_size=len(made),
        max_seq_length=train_throughput.PACK_7B, epochs=1,
    )  # fmt: skip
    job = preflight.Job(
        config=config, train_file=Path(), eval_file=None, replay_files=(), base_dir=base, tokenizer_dir=base,
        adapter_dir=None, lora=LORA, shape=ModelShape.from_config(base), number_format=number_format,
    )  # fmt: skip
    plan, log = steps.Plan(config, stored), run_state.Log(scratch / "log.jsonl", quiet=False)
    loaded = Loaded.of(job, plan, "cuda:0" if ON_GPU else "cpu", log)
    run = trainer.build(
        run_state.Run(config, plan, None, checkpoints.Store(scratch / "checkpoints", {}), log),
        loaded.model, number_format, resumed=False,
    )  # fmt: skip
    loaded.run_trial(run, log)
    tried = [json.loads(line) for line in log.file.read_text().splitlines()] if log.file.is_file() else []
    memory = {key: value for entry in tried for key, value in entry.items() if key.startswith("memory_")}
    return measure_steps(run, made) | memory


def measure_steps(run: Any, made: list) -> Measured:
    """Two optimizer steps over all conversations; the second one is timed."""
    clock = Clock.on(run)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    run.train()
    tokens = sum(len(row["input_ids"]) for row in made)
    peak = {"memory_whole_run": torch.cuda.max_memory_allocated()} if ON_GPU else {}
    return {"loss": losses[0], "tokens_per_s": tokens / clock.seconds[-1], **peak}


def resume(scratch: Path, kills: int = 2) -> Measured:
    """Kill a training of the tiny Saiga at random moments; each must end like one that was not killed."""
    command = [sys.executable, str(Path(__file__).with_name("kill_resume.py")), "--kills", str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=scratch)
    return {"kills": kills, "bit_identical": done.returncode == 0, "printed": done.stdout[-600:] + done.stderr[-600:]}


def two_processes(scratch: Path) -> Measured:
    """The losses of the tiny Saiga on one and on two GPUs (on a CPU: processes), without dropout."""
    if ON_GPU and torch.cuda.device_count() < 2:
        return {"skipped": "this machine has one GPU"}
    lora = Lora(rank=4, alpha=8, dropout=0.0)
    ended = [
        kill_resume.finished(kill_resume.config_for(scratch / str(count), processes=count, lora=lora))[0]
        for count in (1, 2)
    ]
    one, two = ([entry["loss"] for entry in each.log if "loss" in entry] for each in ended)
    return {"largest_difference": max(abs(a - b) for a, b in zip(one, two, strict=True)), "steps": len(one)}


def offload(base: Path, scratch: Path) -> Measured:
    """Export to Q4_0 and answer with all layers on the GPU."""
    import llama_cpp
    import llama_speed

    start = time.monotonic()
    file = export.to_gguf(model=str(base), adapter=None, output=scratch / "model.gguf", quant_type="Q4_0")
    seconds = time.monotonic() - start
    if ON_GPU and not llama_cpp.llama_supports_gpu_offload():
        return {"export_s": seconds, "skipped": "this build of llama-cpp-python has no CUDA"}
    reading, generating = llama_speed.measure(str(file), rounds=3, n_gpu_layers=-1 if ON_GPU else 0)
    return {"export_s": seconds, "prompt_tokens_per_s": reading, "generated_tokens_per_s": generating}


def run_step(name: str, base: Path, conversations: int) -> Measured:
    hidden = ModelShape.from_config(base).hidden
    with tempfile.TemporaryDirectory(dir=base.parent) as directory:
        scratch, (what, _, number_format) = Path(directory), name.partition(" ")
        if what in ("tutorial", "saigakit"):
            made = train_throughput.make_conversations(conversations, hidden)
            return {"tutorial": train_tutorial, "saigakit": train_saigakit}[what](base, scratch, made, number_format)
        return {"resume": resume, "two": two_processes}[what](scratch) if what != "offload" else offload(base, scratch)


def measure_in_child(name: str, base: Path, conversations: int, seconds_left: float) -> Measured:
    command = [sys.executable, __file__, "--step", name, "--base", str(base), "--conversations", str(conversations)]
    if seconds_left < 10:
        return {"failed": "no time was left"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds_left)
    except subprocess.TimeoutExpired:
        return {"failed": f"stopped after {seconds_left:.0f} s"}
    if done.returncode:
        return {"failed": "; ".join(done.stderr.strip().splitlines()[-3:])}
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def format_value(key: str, value: Any) -> str:
    if key.startswith("memory_"):
        return f"{key.removeprefix('memory_').replace('_', ' ')} {value / workspace.GB:.2f} GB"
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    return f"{key.replace('_per_s', '/s').replace('_', ' ')} {shown}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--shape", choices=export_benchmark.SHAPES, default="7b" if ON_GPU else "tiny")
    parser.add_argument("--conversations", type=int, help="default: 12 on a GPU without bfloat16, else 48")
    parser.add_argument("--scratch", type=Path, help="directory for the weights: 18 GB for 7b")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        print(json.dumps(run_step(given.step, given.base, given.conversations)))
        return
    start, count = time.monotonic(), given.conversations or (48 if "bfloat16" in formats() or not ON_GPU else 12)
    machine = torch.cuda.get_device_name() if ON_GPU else f"{os.cpu_count()} CPU cores"
    names = [f"{what} {name}" for name in formats() for what in ("saigakit", "tutorial")]
    found: dict[str, Measured] = {}
    with tempfile.TemporaryDirectory(dir=given.scratch) as directory:
        base = export_benchmark.make_base(Path(directory) / "base", given.shape)
        for name in (*names, "offload", "resume", "two GPUs"):
            found[name] = measure_in_child(name, base, count, 60 * given.minutes - (time.monotonic() - start))
            print(f"{name}: {found[name]}", flush=True)
    for number_format in formats():
        pair = [found[f"{what} {number_format}"].get("tokens_per_s") for what in ("saigakit", "tutorial")]
        if all(pair):
            found[f"saigakit {number_format}"]["times_the_tutorial"] = pair[0] / pair[1]
    shown = [(name, ", ".join(format_value(*item) for item in each.items() if item[0] != "printed"))
             for name, each in found.items()]  # fmt: skip
    seconds = time.monotonic() - start
    print(
        f"\n{Table(('measured', 'result'), shown, f'{machine}, {given.shape}, {count} conversations, {seconds:.0f} s')}"
    )
    if given.json:
        report = {"machine": machine, "shape": given.shape, "conversations": count, "seconds": seconds, "found": found}
        given.json.write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    if any("failed" in each for each in found.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
