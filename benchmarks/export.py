"""Compare the export with llama.cpp's own chain of tools and with the machine's limit, on random weights.

python benchmarks/export.py [--shape 2b] [--types Q4_0 Q4_K_M Q8_0] [--rounds 3] [--cold] [--scratch DIR]
python benchmarks/export.py --shape 7b --types Q4_K_M     (only the export: time and memory)

The chain is what users run: peft merges and saves, convert_hf_to_gguf.py --outtype f16, llama_model_quantize; each step
is a separate process. The limit reads the base's bytes, quantises tensors of the same shapes to the same types and
writes the results, with the same threads and chunks as the export, and does nothing else. Memory is sampled from
/proc/PID/smaps_rollup: anonymous memory, and mapped file pages, which the system can reclaim.
"""

import argparse
import bisect
import ctypes
import importlib.metadata
import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from saigakit import export, registry
from saigakit.core.display import Table
from saigakit.export import gguf_export
from saigakit.export.merge_plan import MergePlan
from saigakit.llamacpp import libggml, quantization, streaming
from saigakit.registry import ALL_LINEAR
from saigakit.weights import find

MODEL = "saiga_tiny"  # its tokenizer is copied next to the random weights
THREADS = 2
SHAPES = {  # hidden, intermediate, layers, heads, kv_heads, vocabulary
    "tiny": (256, 704, 2, 2, 2, 32_000),
    "small": (1024, 2816, 8, 16, 16, 32_000),
    "head": (4096, 14_336, 1, 32, 8, 128_256),  # Llama 3's embeddings and head, and one layer
    "2b": (2560, 6912, 22, 20, 20, 32_000),
    "7b": (4096, 11_008, 32, 32, 32, 32_000),
    "8b": (4096, 14_336, 32, 32, 8, 128_256),
}
ONLY_EXPORTED = ("7b", "8b", "head")
RANK = 16
SHARD_LAYERS = 8
BLOCK = 1 << 22  # random numbers, repeated to fill the weights


@dataclass
class Run:
    """Measurements of a finished process, and the JSON object that it printed last."""

    seconds: float
    anonymous: int
    mapped: int
    written: int
    reported: dict[str, Any]


def shard_shapes(shape: str) -> list[dict[str, tuple[int, ...]]]:
    """List the shards of a Llama; each maps the names of its tensors to their shapes."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    key_rows = hidden // heads * kv_heads
    ends = {"model.embed_tokens": (vocabulary, hidden), "model.norm": (hidden,), "lm_head": (vocabulary, hidden)}
    shards = [{f"{name}.weight": size for name, size in ends.items()}]
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (key_rows, hidden),
        "self_attn.v_proj": (key_rows, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    for index in range(layers):
        if index % SHARD_LAYERS == 0:
            shards.append({})
        shards[-1] |= {f"model.layers.{index}.{name}.weight": size for name, size in layer.items()}
    return shards


def make_base(directory: Path, shape: str) -> Path:
    """Write a float16 base from one random block, repeated, as fast as the disk allows."""
    import numpy as np

    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    directory.mkdir(parents=True)
    block = np.random.default_rng(1).normal(0, 0.02, BLOCK).astype(np.float16).tobytes()
    shards = shard_shapes(shape)
    names = [f"model-{index:05d}-of-{len(shards):05d}.safetensors" for index in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        header, offset = {}, 0
        for tensor, size in shard.items():
            header[tensor] = {"dtype": "F16", "shape": size, "data_offsets": [offset, offset + 2 * prod(size)]}
            offset += 2 * prod(size)
        text = json.dumps(header).encode()
        with (directory / name).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for _ in range(offset // len(block)):
                stream.write(block)
            stream.write(block[: offset % len(block)])
    index = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (directory / "config.json").write_text(json.dumps(config))
    tokenizer = find.tokenizer_dir(registry.find(MODEL), None)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, directory / name)
    if not (directory / "chat_template.jinja").is_file():
        from saigakit.prompt import template

        (directory / "chat_template.jinja").write_text(template.read_chat_template(registry.find(MODEL), tokenizer))
    return directory


def make_adapter(directory: Path, base_dir: Path, shape: str) -> Path:
    import torch
    from safetensors.torch import save_file

    directory.mkdir()
    tensors = {}
    for shard in shard_shapes(shape):
        for name, size in shard.items():
            module = name.removesuffix(".weight")
            if module.rpartition(".")[2] in ALL_LINEAR:
                tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(RANK, size[1]) * 0.01
                tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(size[0], RANK) * 0.01
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": list(ALL_LINEAR),
        "base_model_name_or_path": str(base_dir),
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def step_export(base: str, adapter: str, output: str, into: str, *quant_types: str) -> dict[str, float]:
    fill, took = streaming.write_tensors, {}

    def timed(*given: Any, **named: Any) -> Any:
        start = time.monotonic()
        made = fill(*given, **named)
        took["stream_s"] = time.monotonic() - start
        return made

    streaming.write_tensors = timed
    export.to_gguf(
        model=base, adapter=adapter, output=output, quant_type=quant_types[0], quant_types=quant_types[1:],
        merge_into=into,
    )  # fmt: skip
    return took


def step_limit(base: str, adapter: str, output: str, _: str, quant_type: str) -> dict[str, float]:
    """Use the export's threads, chunks and byte counts, with buffers made once and the same numbers throughout."""
    import gguf
    import numpy as np

    made = gguf_export.Export.of(MergePlan.of(base, adapter), [quant_type])
    types, whole_rows = made.types(quant_type), made.architecture.shape.head_dim
    largest = max(chunk.numbers for chunk in streaming._chunks(made.shapes, whole_rows))
    numbers = np.random.default_rng(2).normal(0, 0.02, largest).astype(np.float32)
    chunks, lock = streaming._chunks(made.shapes, whole_rows), threading.Lock()
    sources = [os.open(file, os.O_RDONLY) for file in made.merged.base.files]
    ends = list(itertools.accumulate(os.fstat(source).st_size for source in sources))
    out, places = os.open(output, os.O_WRONLY | os.O_CREAT), {"read": 0, "written": 0}
    ggml = libggml.load()

    def advance(which: str, size: int) -> int:
        with lock:
            places[which] += size
            return places[which] - size

    def read_at(place: int, into: memoryview) -> None:
        """Read from the files as if they were concatenated."""
        while into and place < ends[-1]:
            index = bisect.bisect_right(ends, place)
            got = os.preadv(sources[index], [into], place - (ends[index - 1] if index else 0))
            into, place = into[got:], place + got

    def run() -> None:
        stored, written = np.zeros(2 * largest, np.uint8), np.zeros(4 * largest, np.uint8)
        while True:
            with lock:
                if (chunk := next(chunks, None)) is None:
                    return
            size = 2 * chunk.numbers
            read_at(advance("read", size), stored[:size].data)
            kind = gguf.GGMLQuantizationType[types[chunk.name]]
            content = numbers[: chunk.numbers].view(np.uint8)
            if kind != gguf.GGMLQuantizationType.F32:
                rows, addresses = chunk.numbers // chunk.columns, (numbers.ctypes.data, written.ctypes.data)
                size = ggml.ggml_quantize_chunk(int(kind), *addresses, 0, rows, chunk.columns, None)
                content = written[:size]
            streaming._write_at(out, content.data, advance("written", content.nbytes))

    start = time.monotonic()
    with streaming._flushing([out]), ThreadPoolExecutor(streaming.workers()) as pool:
        for one in [pool.submit(run) for _ in range(streaming.workers())]:
            one.result()
    return {"stream_s": time.monotonic() - start}


def step_merge(base: str, adapter: str, output: str) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)
    for file in Path(base).iterdir():
        if file.name.startswith(("tokenizer", "special", "chat")):
            shutil.copy(file, output)


def step_quantise(source: str, output: str, quant_type: str) -> None:
    import gguf
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = gguf.LlamaFileType[f"MOSTLY_{quant_type}"], THREADS
    if llama_cpp.llama_model_quantize(source.encode(), output.encode(), ctypes.byref(params)) != 0:
        raise SystemExit(f"llama.cpp cannot quantise {source}")


STEPS = {"export": step_export, "limit": step_limit, "merge": step_merge, "quantise": step_quantise}


def run(*command: str) -> Run:
    """Run a step of this file, or a script, and sample its memory until it ends."""
    line = [sys.executable, __file__, "--step", *command] if command[0] in STEPS else [sys.executable, *command]
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "OPENBLAS_NUM_THREADS": str(THREADS)}
    start = time.monotonic()
    child = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak = {"Anonymous": 0, "mapped": 0}
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(0.2):  # each sample stalls the process for a moment
            try:
                text = Path(f"/proc/{child.pid}/smaps_rollup").read_text(encoding="ascii")
            except OSError:
                continue
            found = {row.split(":")[0]: int(row.split()[1]) * 1024 for row in text.splitlines()[1:]}
            peak["Anonymous"] = max(peak["Anonymous"], found["Anonymous"])
            peak["mapped"] = max(peak["mapped"], found["Rss"] - found["Anonymous"])

    sampler = threading.Thread(target=sample)
    sampler.start()
    before = _written()
    out, errors = child.communicate()
    seconds = time.monotonic() - start
    ended.set()
    sampler.join()
    if child.returncode != 0:
        raise SystemExit(f"{' '.join(line)} failed:\n{errors[-3000:]}")
    last = out.strip().splitlines()[-1] if out.strip() else ""
    reported = json.loads(last) if last.startswith("{") else {}
    return Run(seconds, peak["Anonymous"], peak["mapped"], _written() - before, reported)


def _written() -> int:
    """Count the bytes that finished child processes have written to files."""
    import resource

    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_oublock * 512


def download_converter(directory: Path) -> Path:
    """Get llama.cpp's directory with convert_hf_to_gguf.py from the source of the installed llama-cpp-python."""
    version = importlib.metadata.version("llama-cpp-python")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*pip, "--dest", str(directory), f"llama-cpp-python=={version}"], check=True)
    with tarfile.open(next(directory.glob("*.tar.gz"))) as archive:
        archive.extractall(directory, filter="data")
    return next(directory.glob("*/vendor/llama.cpp"))


def format_row(name: str, done: Run, ratio: str) -> tuple[str, ...]:
    sizes = [f"{size / 1e9:.2f}" for size in (done.anonymous, done.mapped, done.written)]
    stream = f"{done.reported['stream_s']:.1f}" if "stream_s" in done.reported else ""
    return (name, f"{done.seconds:.1f}", stream, *sizes, ratio)


HEADER = ("", "seconds", "streaming", "anonymous GB", "mapped GB", "written GB", "ratio")


def drop_from_page_cache(directory: Path) -> None:
    """Make the next reader load the files from the disk, as with a base that was just attached."""
    for file in directory.iterdir():
        opened = os.open(file, os.O_RDONLY)
        os.fsync(opened)  # pages not yet written to the disk would stay in memory
        os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(opened)


def median(runs: Sequence[Run]) -> Run:
    return sorted(runs, key=lambda run: run.reported["stream_s"])[len(runs) // 2]


def compare(scratch: Path, base: Path, adapter: Path, given: argparse.Namespace, converter_dir: Path) -> Table:
    merged = run("merge", str(base), str(adapter), str(scratch / "merged"))
    whole = scratch / "f16.gguf"
    script = str(converter_dir / "convert_hf_to_gguf.py")
    converted = run(script, str(scratch / "merged"), "--outfile", str(whole), "--outtype", "f16")
    shutil.rmtree(scratch / "merged")
    rows = [format_row("peft merges and saves", merged, ""), format_row("convert_hf_to_gguf.py", converted, "")]
    for quant_type in given.types:
        file = scratch / "x.gguf"
        theirs = run("quantise", str(whole), str(file), quant_type)
        file.unlink()
        took: dict[str, list[Run]] = {"limit": [], "export": []}
        for step in list(took) * given.rounds:
            if given.cold:
                drop_from_page_cache(base)
            took[step].append(run(step, str(base), str(adapter), str(file), "original", quant_type))
            file.unlink()
        limit, ours = map(median, took.values())
        ratios = [x.reported["stream_s"] / y.reported["stream_s"] for x, y in zip(*took.values(), strict=True)]
        steps = (merged, converted, theirs)
        chain = Run(
            sum(step.seconds for step in steps),
            max(step.anonymous for step in steps),
            max(step.mapped for step in steps),
            sum(step.written for step in steps),
            {},
        )
        spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if given.rounds > 1 else ""
        ratio = f"{limit.reported['stream_s'] / ours.reported['stream_s']:.2f}{spread}"
        rows += [
            format_row(
                f"{quant_type}: llama.cpp's chain", chain, f"{chain.seconds / ours.seconds:.1f} times the export's time"
            ),
            format_row(f"{quant_type}: export", ours, f"{ratio} of the limit's speed"),
            format_row(f"{quant_type}: limit", limit, ""),
        ]
        print(*rows[-3:], sep="\n", flush=True)
    if len(given.types) > 1:
        together = run("export", str(base), str(adapter), str(scratch / "y.gguf"), "original", *given.types)
        rows.append(format_row(f"export of {', '.join(given.types)} at once", together, ""))
    kept = "the base is read from the disk" if given.cold else "the base is in the page cache"
    note = "times of complete processes; streaming excludes startup, prior checks and reading the file back."
    return Table(HEADER, rows, f"{THREADS} threads; {kept}; medians of {given.rounds} rounds; {note}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="2b", choices=SHAPES)
    parser.add_argument("--types", nargs="+", default=["Q4_0", "Q4_K_M", "Q8_0"], choices=quantization.QUANT_TYPES)
    parser.add_argument("--rounds", type=int, default=3, help="alternating runs of limit and export, for the medians")
    parser.add_argument("--cold", action="store_true", help="drop the base from the page cache before each run")
    parser.add_argument("--scratch", type=Path, help="directory for gigabytes of temporary files")
    parser.add_argument("--converter", type=Path, help="directory with convert_hf_to_gguf.py; downloaded if not given")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        took = STEPS[arguments.step[0]](*arguments.step[1:]) or {}
        print(json.dumps(took))
        return
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as directory:
        scratch = Path(directory)
        base = make_base(scratch / "base", arguments.shape)
        adapter = make_adapter(scratch / "adapter", base, arguments.shape)
        if arguments.shape in ONLY_EXPORTED:
            rows = []
            for into in ("original", "dequantized"):
                done = run("export", str(base), str(adapter), str(scratch / "x.gguf"), into, *arguments.types)
                rows.append(
                    format_row(f"export of {', '.join(arguments.types)}, merged into the {into} base", done, "")
                )
                for file in scratch.glob("x*.gguf"):
                    file.unlink()
            table = Table(HEADER, rows)
        else:
            found = arguments.converter or download_converter(scratch)
            table = compare(scratch, base, adapter, arguments, found)
    numbers = sum(prod(size) for shard in shard_shapes(arguments.shape) for size in shard.values())
    print(f"{arguments.shape}: {numbers / 1e9:.2f}·10⁹ parameters\n{table}")


if __name__ == "__main__":
    main()
