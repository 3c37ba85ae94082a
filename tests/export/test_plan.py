"""The plan of an export: its figures are those of the work that follows."""

import re
import time
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import small_models

from saigakit.export import plan
from saigakit.llamacpp import streaming
from saigakit.weights.merge import Merged

COLUMNS, ROWS = 2048, 8192


@pytest.fixture(scope="module")
def base_dir(tiny, tmp_path_factory):
    """One large matrix: 17 million numbers."""
    sizes = {"hidden_size": COLUMNS, "intermediate_size": ROWS, "num_hidden_layers": 1, "vocab_size": 1200}
    return small_models.base(tmp_path_factory.mktemp("plan") / "base", tiny / "base", **sizes)


@pytest.mark.parametrize("into", ["original", "dequantized"])
def test_the_time_of_merging_is_about_what_it_then_takes(base_dir, tmp_path, into):
    merged = Merged.open(base_dir, None, into=into)
    name = "model.layers.0.mlp.gate_proj.weight"
    shapes = {"blk.0.ffn_gate.weight": (ROWS, COLUMNS)}
    types = {"blk.0.ffn_gate.weight": "Q8_0"}

    def read(_, rows):
        return merged.read(name, rows)

    read(None, slice(0, 1))
    foreseen = plan._measured({"Q8_0"}, shapes, read)["read"] * ROWS * COLUMNS
    merged._scales.clear()
    start = time.perf_counter()
    for first in range(0, ROWS, 512):
        read(None, slice(first, first + 512))
    took = time.perf_counter() - start
    assert 0.1 * took < foreseen < 10 * took  # timed beside other work
    table = str(plan.plan({"Q8_0": (types, 10**6)}, shapes, merged.base, 10**6, read))
    assert float(re.search(r"merge.* (\d+) s", table)[1]) < 10


def test_a_wheel_without_avx2_is_told_in_the_plan(base_dir, monkeypatch):
    if " avx2 " not in Path("/proc/cpuinfo").read_text(encoding="utf-8").replace("\n", " "):
        pytest.skip("This CPU has no AVX2.")
    base = Merged.open(base_dir, None).base
    for built, is_slow in ((b"AVX = 1 | AVX2 = 1 | ", False), (b"AVX = 1 | ", True)):
        monkeypatch.setattr(llama_cpp, "llama_print_system_info", lambda built=built: built)
        table = plan.plan({}, {"x": (4, 256)}, base, 0, lambda _, rows: np.ones((4, 256), np.float32)[rows])
        assert ("This wheel of llama-cpp-python does not use AVX2" in table.note) == is_slow


def test_what_an_export_holds_does_not_grow_with_a_matrix():
    few, many = ({"x": (rows, 4096)} for rows in (4096, 400_000))
    assert streaming.memory_needed(few, 128, 1) == streaming.memory_needed(many, 128, 1)
