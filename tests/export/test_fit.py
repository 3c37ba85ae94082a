"""What is said to fit, against the resident memory of a process in which llama.cpp has read a prompt."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from saigakit.errors import SaigaError
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


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("fit_benchmark", Path(__file__).parents[2] / "benchmarks" / "fit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
def test_a_process_has_the_predicted_memory_within_a_tenth(benchmark, tmp_path, cache_type):
    shape = benchmark.SHAPES["Llama-2's, small"]
    file = benchmark.random_model(tmp_path / "model.gguf", shape)
    resident, _ = benchmark.measured(file, 512, cache_type, copies=False)
    predicted = fit.Needs.of(shape, file.stat().st_size, 512, cache_type).resident
    assert predicted == pytest.approx(resident, rel=0.1)


def test_keys_and_values_are_those_of_llama_cpp():
    """512 KiB a token in Llama-2-7B, 128 KiB with eight heads of 32; q8_0 has 34 bytes for 32 numbers."""
    assert fit.Needs.of(LLAMA2, 0, 4096).cache == 4096 * 512 * 2**10
    assert fit.Needs.of(LLAMA2, 0, 4096, "q8_0").cache == 4096 * 512 * 2**10 * 34 // 64


def test_the_best_is_the_highest_quality_that_fits_and_then_the_longest_context():
    found = fit.best(LLAMA2, SIZES, longest=4096, machine_gib=6)
    assert (found.quant_type, found.n_ctx, found.cache_type) == ("Q4_K_M", 2048, "q8_0")
    assert fit.best(LLAMA2, SIZES, longest=4096, machine_gib=16).quant_type == "Q8_0"
    assert fit.best(LLAMA2, SIZES, longest=4096, machine_gib=16).n_ctx == 4096
    assert not fit.best(LLAMA2, SIZES, longest=4096, machine_gib=4).fits
    larger_but_worse = {"Q4_0": SIZES["Q4_0"], "IQ4_XS": SIZES["IQ4_XS"]}
    assert fit.best(LLAMA2, larger_but_worse, longest=4096).quant_type == "IQ4_XS"


@pytest.mark.parametrize("machine", [6, 8, 16])
def test_what_is_recommended_fits_and_what_is_better_does_not(machine):
    found = fit.best(LLAMA2, SIZES, longest=4096, machine_gib=machine)
    assert found.needs.total <= machine * 2**30
    better = list(SIZES)[: list(SIZES).index(found.quant_type)]
    for quant_type in better:
        assert not fit.Needs.of(LLAMA2, SIZES[quant_type], 2048, "q8_0").fits(machine)


def test_the_recommendation_is_one_sentence_with_its_numbers():
    text = fit.in_words(LLAMA2, SIZES, longest=4096)
    assert text.startswith("On 6 GiB: Q4_K_M with 2048 tokens of context, keys and values in q8_0: 4.4")
    assert "1.5 GiB are left to the system" in text
    assert "Nothing of this model fits 2 GiB" in fit.in_words(LLAMA2, SIZES, longest=4096, machine_gib=2)


def test_the_table_has_each_type_and_context_and_the_smallest_machine():
    table = fit.table(LLAMA2, SIZES, longest=4096)
    assert [row[:2] for row in table.rows[:4]] == [
        ("Q8_0", "2048"),
        ("Q8_0", "4096"),
        ("Q4_K_M", "2048"),
        ("Q4_K_M", "4096"),
    ]
    assert [row[-1] for row in table.rows[:4]] == ["16 GB", "16 GB", "6 GB with KV q8_0", "8 GB"]
    assert "On 6 GiB" in table.note


def test_the_tables_parts_add_up_to_what_is_needed_in_all():
    for row in fit.table(LLAMA2, SIZES, longest=4096).rows:
        weights, *caches, buffers, system, with_f16, with_q8_0 = map(float, row[2:-1])
        for cache, total in zip(caches, (with_f16, with_q8_0), strict=True):
            assert weights + cache + buffers + system == pytest.approx(total, abs=0.021)  # each is rounded


def test_a_model_of_a_short_context_has_a_row_of_its_own_length():
    assert [row[1] for row in fit.table(LLAMA2, {"Q4_0": 10}, longest=1024).rows] == ["1024"]
    assert fit.best(LLAMA2, {"Q4_0": 10}, longest=1024).n_ctx == 1024


def test_what_fits_no_small_machine_is_chosen_for_a_larger_one_and_what_fits_none_is_said_not_to():
    found = fit.chosen(LLAMA2, {"Q8_0": SIZES["Q8_0"]}, longest=4096)
    assert (found.machine_gib, found.n_ctx, found.cache_type) == (16, 4096, "f16")
    assert fit.in_words(LLAMA2, {"Q8_0": SIZES["Q8_0"]}, longest=4096).endswith(
        "On 16 GiB: Q8_0 with 4096 tokens of context."
    )
    found = fit.chosen(LLAMA2, {"F32": 27 * 10**9}, longest=4096)
    assert not found.fits and found.left_mib == 0
    assert "DOES NOT FIT a machine of 16 GiB; needs 27.3 GiB" in found.in_words()


def test_the_picture_has_a_bar_for_each_part_and_a_line_for_each_machine():
    (axes,) = fit.plot(LLAMA2, SIZES).axes
    bars = ["Q8_0", "Q4_K_M", "Q4_K_M, KV q8_0", "IQ4_XS", "Q4_0", "Q4_0, KV q8_0"]  # q8_0 where 6 GB need it
    assert [text.get_text() for text in axes.get_yticklabels()] == bars
    assert len(axes.patches) == 4 * len(bars)
    assert [text.get_text() for text in axes.texts] == ["6 GB", "8 GB", "16 GB"]


def test_heads_that_are_no_whole_blocks_of_q8_0_have_no_such_cache():
    narrow = replace(LLAMA2, head_dim=80)  # as llama.cpp refuses it
    assert fit.chosen(narrow, {"Q4_K_M": SIZES["Q4_K_M"]}, longest=4096).cache_type == "f16"
    rows = fit.table(narrow, {"Q4_K_M": SIZES["Q4_K_M"]}, longest=2048).rows
    assert [(row[4], row[8], row[9]) for row in rows] == [("–", "–", "8 GB")]
    (axes,) = fit.plot(narrow, {"Q4_K_M": SIZES["Q4_K_M"]}).axes
    assert len(axes.patches) == 4


def test_an_unknown_type_is_refused():
    with pytest.raises(SaigaError, match="quant_type='Q9'"):
        fit.table(LLAMA2, {"Q9": 1}, longest=2048)
    with pytest.raises(SaigaError, match="no quant type"):
        fit.plot(LLAMA2, {})
