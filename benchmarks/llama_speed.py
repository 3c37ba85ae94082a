"""Measure how fast the installed build of llama.cpp reads a prompt and generates, to compare builds on one GGUF.

    python benchmarks/llama_speed.py model.gguf [--rounds 3] [--threads 2]

For another build: pip wheel --no-deps --no-cache-dir llama-cpp-python (with CC, CXX or CMAKE_ARGS), unpack the wheel to
a directory and name it in PYTHONPATH. The ids are arbitrary: only their number matters for the speed.
"""

import argparse
import ctypes
import io
import os
import time
from contextlib import redirect_stderr

import llama_cpp

from saigakit.core.display import Table

PROMPT, ANSWER = 512, 32  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    given = parser.parse_args()
    reading, generating = measure(given.file, rounds=given.rounds, n_threads=given.threads)
    amx = "yes" if "AMX_INT8 = 1" in llama_cpp.llama_print_system_info().decode() else "no"
    row = (amx, f"{reading:.1f}", f"{generating:.2f}")
    print(Table(("AMX kernels", "prompt tokens/s", "generated tokens/s"), [row], f"The best of {given.rounds} rounds."))


def measure(file: str, *, rounds: int, **settings: int) -> tuple[float, float]:
    """Tokens per second of reading a prompt and of generating; `settings`: those of llama_cpp.Llama."""
    with redirect_stderr(io.StringIO()):
        llm = llama_cpp.Llama(file, n_ctx=PROMPT + ANSWER, n_batch=PROMPT, verbose=False, **settings)
    prompt = [10 + 37 * index % (llm.n_vocab() - 10) for index in range(PROMPT)]
    reading, generating = [], []
    for _ in range(rounds):
        llm.reset()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llm.ctx), True)
        start = time.perf_counter()
        decode(llm, prompt)
        read = time.perf_counter()
        for token in prompt[:ANSWER]:
            decode(llm, [token])
        reading.append(PROMPT / (read - start))
        generating.append(ANSWER / (time.perf_counter() - read))
    return max(reading), max(generating)


def decode(llm: llama_cpp.Llama, ids: list[int]) -> None:
    array = (ctypes.c_int32 * len(ids))(*ids)  # kept until the batch is decoded
    batch = llama_cpp.llama_batch_get_one(array, len(ids))
    if llama_cpp.llama_decode(llm.ctx, batch) != 0:
        raise SystemExit("llama.cpp could not decode the batch")
    llama_cpp.llama_synchronize(llm.ctx)


if __name__ == "__main__":
    main()
