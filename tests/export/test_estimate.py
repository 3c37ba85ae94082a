"""The estimate of an export against the work that follows."""

import re
import time
from pathlib import Path
from types import SimpleNamespace

import llama_cpp
import numpy as np
import pytest
import small_models

from saigakit.export import estimate
from saigakit.llamacpp import streaming
from saigakit.weights.merge import Merged

COLUMNS, ROWS = 2048, 8192


@pytest.fixture(scope="module")
def base_dir(tiny, tmp_path_factory):
    """One large matrix: 17 million numbers."""
    sizes = {"hidden_size": COLUMNS, "intermediate_size": ROWS, "num_hidden_layers": 1, "vocab_size": 1200}
    return small_models.base(tmp_path_factory.mktemp("estimate") / "base", tiny / "base", **sizes)


def export_of(base, shapes, read, **types):
    """What the estimate asks of an export."""
    sizes = {"types": types.__getitem__, "bytes": lambda _: 10**6, "memory": 10**6, "quant_types": list(types)}
    return SimpleNamespace(merged=SimpleNamespace(base=base), shapes=shapes, read=read, **sizes)


@pytest.mark.slow
@pytest.mark.parametrize("into", ["original", "dequantized"])
def test_the_estimated_time_of_merging_is_about_what_merging_takes(base_dir, tmp_path, into):
    merged = Merged.open(base_dir, None, into=into)
    name = "model.layers.0.mlp.gate_proj.weight"
    shapes = {"blk.0.ffn_gate.weight": (ROWS, COLUMNS)}
    types = {"blk.0.ffn_gate.weight": "Q8_0"}

    def read(_, rows):
        return merged.read(name, rows)

    read(None, slice(0, 1))
    estimated = estimate._seconds_per_number({"Q8_0"}, shapes, read)["read"] * ROWS * COLUMNS
    merged._scales.clear()
    start = time.perf_counter()
    for first in range(0, ROWS, 512):
        read(None, slice(first, first + 512))
    took = time.perf_counter() - start
    assert 0.1 * took < estimated < 10 * took  # timed next to other work
    table = str(estimate.estimate_table(export_of(merged.base, shapes, read, Q8_0=types)))
    assert float(re.search(r"merge.* (\d+) s", table)[1]) < 10


def test_the_estimate_warns_of_a_build_without_avx2(base_dir, monkeypatch):
    if " avx2 " not in Path("/proc/cpuinfo").read_text(encoding="utf-8").replace("\n", " "):
        pytest.skip("This CPU has no AVX2.")
    base = Merged.open(base_dir, None).base
    for built, is_slow in ((b"AVX = 1 | AVX2 = 1 | ", False), (b"AVX = 1 | ", True)):
        monkeypatch.setattr(llama_cpp, "llama_print_system_info", lambda built=built: built)
        ones = np.ones((4, 256), np.float32)
        table = estimate.estimate_table(export_of(base, {"x": ones.shape}, lambda _, rows, ones=ones: ones[rows]))
        assert ("This build of llama-cpp-python does not use AVX2" in table.note) == is_slow


def test_the_memory_of_an_export_does_not_grow_with_the_largest_matrix():
    few, many = ({"x": (rows, 4096)} for rows in (4096, 400_000))
    assert streaming.memory_needed(few, 128, 1) == streaming.memory_needed(many, 128, 1)
