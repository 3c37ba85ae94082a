"""The memory estimate against the resident memory of a process in which llama.cpp has read a prompt."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from saigakit.export import fit
from saigakit.weights.model_shape import ModelShape

LLAMA2 = ModelShape(
    hidden=4096,
    layers=32,
    heads=32,
    kv_heads=32,
    head_dim=128,
    intermediate=11008,
    vocabulary=32000,
    tied=False,
)
SIZES = {"Q8_0": 7_161_089_728, "Q4_K_M": 4_081_004_224, "IQ4_XS": 3_616_608_960, "Q4_0": 3_825_806_912}


def model(sizes=SIZES, *, longest=4096, shape=LLAMA2):
    return fit.ModelFiles(shape=shape, longest=longest, files=sizes)


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("fit_benchmark", Path(__file__).parents[2] / "benchmarks" / "fit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
def test_the_predicted_memory_is_within_a_tenth_of_the_resident_memory(benchmark, tmp_path, cache_type):
    shape = benchmark.SHAPES["Llama-2's, small"]
    file = benchmark.random_model(tmp_path / "model.gguf", shape)
    resident, _ = benchmark.measured(file, 512, cache_type, copies=False)
    predicted = fit.Needs.of(shape, file.stat().st_size, 512, cache_type).resident
    assert predicted == pytest.approx(resident, rel=0.1)


def test_the_cache_has_the_size_of_llama_cpps():
    """512 KiB per token in Llama-2-7B; q8_0 has 34 bytes for 32 numbers."""
    assert fit.Needs.of(LLAMA2, 0, 4096).cache == 4096 * 512 * 2**10
    assert fit.Needs.of(LLAMA2, 0, 4096, "q8_0").cache == 4096 * 512 * 2**10 * 34 // 64


def test_the_best_choice_is_the_highest_quality_that_fits_and_then_the_longest_context():
    found = model().best_on(6)
    assert (found.quant_type, found.n_ctx, found.cache_type) == ("Q4_K_M", 2048, "q8_0")
    assert model().best_on(16).quant_type == "Q8_0"
    assert model().best_on(16).n_ctx == 4096
    assert not model().best_on(4).fits
    larger_but_worse = {"Q4_0": SIZES["Q4_0"], "IQ4_XS": SIZES["IQ4_XS"]}
    assert model(larger_but_worse).best_on(6).quant_type == "IQ4_XS"


@pytest.mark.parametrize("machine", [6, 8, 16])
def test_the_choice_fits_and_no_better_quant_type_does(machine):
    found = model().best_on(machine)
    assert found.needs.total <= machine * 2**30
    better = list(SIZES)[: list(SIZES).index(found.quant_type)]
    for quant_type in better:
        assert not fit.Needs.of(LLAMA2, SIZES[quant_type], 2048, "q8_0").fits(machine)


def test_the_recommendation_is_one_sentence_with_its_numbers():
    text = model().recommend()
    assert text.startswith("On 6 GiB: Q4_K_M with 2048 tokens of context, KV cache in q8_0: 4.4")
    assert "1.5 GiB are left for the system" in text
    assert "Nothing fits 6 GiB" in model({"Q8_0": SIZES["Q8_0"]}).recommend()


def test_the_table_has_every_type_and_context_with_the_smallest_machine():
    table = model().table()
    assert [row[:2] for row in table.rows[:4]] == [
        ("Q8_0", "2048"),
        ("Q8_0", "4096"),
        ("Q4_K_M", "2048"),
        ("Q4_K_M", "4096"),
    ]
    assert [row[-1] for row in table.rows[:4]] == ["16 GB", "16 GB", "6 GB with KV q8_0", "8 GB"]
    assert "On 6 GiB" in table.note


def test_the_parts_in_the_table_add_up_to_the_totals():
    for row in model().table().rows:
        weights, *caches, buffers, system, with_f16, with_q8_0 = map(float, row[2:-1])
        for cache, total in zip(caches, (with_f16, with_q8_0), strict=True):
            assert weights + cache + buffers + system == pytest.approx(total, abs=0.021)  # each is rounded


def test_a_model_with_a_short_context_has_a_row_of_that_length():
    assert [row[1] for row in model({"Q4_0": 10}, longest=1024).table().rows] == ["1024"]
    assert model({"Q4_0": 10}, longest=1024).best_on(6).n_ctx == 1024


def test_a_model_too_large_for_6_gib_is_chosen_for_a_larger_machine_or_reported_not_to_fit():
    found = model({"Q8_0": SIZES["Q8_0"]}).choose()
    assert (found.machine_gib, found.n_ctx, found.cache_type) == (16, 4096, "f16")
    recommendation = model({"Q8_0": SIZES["Q8_0"]}).recommend()
    assert recommendation.endswith("On 16 GiB: Q8_0 with 4096 tokens of context.")
    found = model({"F32": 27 * 10**9}).choose()
    assert not found.fits and found.free_mib == 0
    assert "DOES NOT FIT a machine with 16 GiB; it needs 27.3 GiB" in found.describe()


def test_the_plot_has_a_bar_for_every_part_and_a_line_for_every_machine():
    (axes,) = model().plot().axes
    bars = ["Q8_0", "Q4_K_M", "Q4_K_M, KV q8_0", "IQ4_XS", "Q4_0", "Q4_0, KV q8_0"]  # q8_0 where 6 GB need it
    assert [text.get_text() for text in axes.get_yticklabels()] == bars
    assert len(axes.patches) == 4 * len(bars)
    assert [text.get_text() for text in axes.texts] == ["6 GB", "8 GB", "16 GB"]


def test_a_head_dim_that_is_not_a_multiple_of_32_allows_no_q8_0_cache():
    narrow = {"shape": replace(LLAMA2, head_dim=80), "sizes": {"Q4_K_M": SIZES["Q4_K_M"]}}  # as llama.cpp refuses it
    assert model(**narrow).choose().cache_type == "f16"
    rows = model(**narrow, longest=2048).table().rows
    assert [(row[4], row[8], row[9]) for row in rows] == [("–", "–", "8 GB")]
    (axes,) = model(**narrow).plot().axes
    assert len(axes.patches) == 4
