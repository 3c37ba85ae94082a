"""Compare the predicted memory of llama.cpp inference with what its process uses, on models of random weights.

    python benchmarks/fit.py

Each model is loaded in a child process by `infer.load` and reads a prompt that fills the context. "resident" is the
memory of that process when tensors are used where they lie in the mapped file. "copied" is the same when llama.cpp
keeps copies of them in another order, as it does by default. "needed" is what is resident after all pages of the file
are evicted and the prompt is read again, as on a machine short of memory: the file's pages of copied tensors are not
needed any more, and of the embeddings only the rows of the prompt's tokens are.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import get_args

from saigakit.core import workspace
from saigakit.export import fit
from saigakit.llamacpp import quantization
from saigakit.weights.memory import CacheType
from saigakit.weights.model_shape import ModelShape

SHAPES = {
    "Llama-2's, small": ModelShape(
        hidden=1024, layers=12, heads=16, kv_heads=16, head_dim=64, intermediate=2816, vocabulary=32000, tied=False
    ),
    "Llama-3's, small": ModelShape(
        hidden=1024, layers=12, heads=16, kv_heads=4, head_dim=64, intermediate=3584, vocabulary=128256, tied=False
    ),
    "wide": ModelShape(
        hidden=2048, layers=4, heads=16, kv_heads=8, head_dim=128, intermediate=8192, vocabulary=32000, tied=False
    ),
}
_CHILD = """
import ctypes, json, re, sys
from pathlib import Path
import llama_cpp
from saigakit import infer
file, n_ctx, copies, cache_type = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "copies", sys.argv[4]
if not copies:  # infer.load makes no copies if llama.cpp has AMX kernels
    llama_cpp.llama_print_system_info = lambda: b"AMX_INT8 = 1"

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def evict_pages():
    libc = ctypes.CDLL(None)
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(file):
            begin, end = (int(text, 16) for text in line.split()[0].split("-"))
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), 21)  # MADV_PAGEOUT

llama_cpp.llama_backend_init()
before = resident()
llm = infer.load(file, n_ctx=n_ctx, cache_type=cache_type)
prompt = [300 + i * 37 % (llm.n_vocab() - 300) for i in range(n_ctx - 4)]
llm.eval(prompt)
mapped = resident() - before
if copies:
    evict_pages()
    llm.reset()
    llm.eval(prompt)
print(json.dumps([mapped, resident() - before]))
"""


def random_model(file: Path, shape: ModelShape, quant_type: str = "Q4_K_M") -> Path:
    """Write a GGUF of `shape`; its rows repeat, since only their number matters."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(shape.layers)
    writer.add_context_length(32768)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_tokenizer_model("llama")
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    words = [f"слово{number}" for number in range(shape.vocabulary - 259)]
    writer.add_token_list(["<unk>", "<s>", "</s>", *bytes_, *words])
    writer.add_token_scores([0.0] * shape.vocabulary)
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * len(words)])
    names = dict(zip(shape.linear, ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
                     strict=True))  # fmt: skip
    whole = (shape.vocabulary, shape.hidden)
    shapes = {"token_embd.weight": whole, "output.weight": whole, "output_norm.weight": (shape.hidden,)}
    for layer in range(shape.layers):
        shapes |= {f"blk.{layer}.{names[name]}.weight": size for name, size in shape.linear.items()}
        shapes |= {f"blk.{layer}.{name}.weight": (shape.hidden,) for name in ("attn_norm", "ffn_norm")}
    numbers = np.random.default_rng(0).standard_normal((64, max(shape.hidden, shape.intermediate))).astype(np.float32)
    types = quantization.tensor_types(shapes, quant_type, shape, "llama")
    for name, size in shapes.items():
        if len(size) == 1:
            writer.add_tensor(name, np.ones(size, np.float32))
            continue
        rows = quantization.quantise(0.02 * numbers[:, : size[1]], types[name])
        tensor = np.tile(rows, (-(-size[0] // 64), 1))[: size[0]]
        writer.add_tensor(name, tensor, raw_dtype=gguf.GGMLQuantizationType[types[name]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def measured(file: Path, n_ctx: int, cache_type: str, *, copies: bool) -> tuple[int, int]:
    """Return the bytes resident in a child process: with all pages of the file, and with only those that it needs."""
    command = [sys.executable, "-c", _CHILD, str(file), str(n_ctx), "copies" if copies else "none", cache_type]
    mapped, needed = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return mapped, needed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048])
    contexts = parser.parse_args().contexts
    print(f"{'model, sizes in MB':18}  context cache predicted resident  ratio  copied  needed")
    with tempfile.TemporaryDirectory(dir=workspace.scratch_dir()) as scratch:
        for name, shape in SHAPES.items():
            file = random_model(Path(scratch) / "model.gguf", shape)
            for n_ctx, cache_type in itertools.product(contexts, get_args(CacheType)):
                predicted = fit.Needs.of(shape, file.stat().st_size, n_ctx, cache_type).resident
                resident, _ = measured(file, n_ctx, cache_type, copies=False)
                copied, needed = measured(file, n_ctx, cache_type, copies=True)
                sizes = f"{predicted / 1e6:9.0f} {resident / 1e6:8.0f} {predicted / resident:6.3f}"
                given = f"{name:18} {n_ctx:8} {cache_type:>5}"
                print(f"{given} {sizes} {copied / 1e6:7.0f} {needed / 1e6:7.0f}", flush=True)


if __name__ == "__main__":
    main()
