"""Compare the importance matrix from llama.cpp's graph with transformers' forward hooks on the same weights."""

import ctypes
import logging

import gguf
import llama_cpp
import numpy as np
import pytest
import small_models
import torch
from transformers import AutoModelForCausalLM

from saigakit import export
from saigakit.errors import SaigaError
from saigakit.llamacpp import imatrix, libggml
from saigakit.llamacpp.architecture import Architecture

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = ([1, 404, 505, 606, 7, 8, 9, 300], [1, 5], list(range(10, 90)) * 4, [1, 260, 261, 700, 2, 13, 1, 300, 301])
SHAPE = {"hidden_size": 256, "intermediate_size": 288, "num_attention_heads": 8, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def base_dir(tiny, tmp_path_factory):
    return small_models.base(tmp_path_factory.mktemp("model") / "base", tiny / "base", **SHAPE)


@pytest.fixture(scope="module")
def float_file(base_dir, tmp_path_factory):
    output = tmp_path_factory.mktemp("float") / "float.gguf"
    return export.to_gguf(model=str(base_dir), adapter=None, output=output, quant_type="F32")


@pytest.fixture
def exact_attention(monkeypatch):
    """Attention in float32 as in transformers; llama.cpp rounds to float16 by default."""
    usual = llama_cpp.llama_context_default_params

    def params():
        made = usual()
        made.type_k = made.type_v = gguf.GGMLQuantizationType.F32
        made.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        return made

    monkeypatch.setattr(llama_cpp, "llama_context_default_params", params)


def by_transformers(base_dir, rows):
    """Mean squared inputs by the GGUF name of the weight, and the number of tokens."""
    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    sums = {}

    def add(name):
        def hook(_module, inputs):
            squares = inputs[0].reshape(-1, inputs[0].shape[-1]).double().square().sum(0).numpy()
            sums[name] = sums.get(name, 0) + squares

        return hook

    names = {
        old: new for new, old in Architecture.from_config(base_dir).source_names(dict(model.named_parameters())).items()
    }
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(add(names[f"{name}.weight"]))
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([row]))
    tokens = sum(map(len, rows))
    return {name: total / tokens for name, total in sums.items()}, tokens


def test_equals_the_mean_squared_input_of_each_column(base_dir, float_file, exact_attention):
    expected, tokens = by_transformers(base_dir, ROWS)
    made = imatrix.compute_importance(float_file, ROWS, dataset="train.jsonl")
    assert set(made) == set(expected) == {name for name in expected if name.startswith("blk.")}
    assert {squares.count for squares in made.squares.values()} == {tokens}
    for name, squares in expected.items():
        np.testing.assert_allclose(made[name], squares, rtol=1e-3, err_msg=name)


def test_every_row_starts_a_new_sequence(float_file):
    alone = [imatrix.compute_importance(float_file, [row], dataset="one") for row in ROWS[:2]]
    both = imatrix.compute_importance(float_file, ROWS[:2], dataset="two")
    for name in both:
        sums = alone[0].squares[name].sums + alone[1].squares[name].sums
        np.testing.assert_allclose(both.squares[name].sums, sums, rtol=1e-5, err_msg=name)


def test_every_row_is_a_chunk_of_the_dataset(float_file):
    rows = [[1, 300 + index] for index in range(10)]
    made = imatrix.compute_importance(float_file, rows, dataset="many")
    assert (made.chunks, made.datasets) == (10, ("many",))
    assert {squares.count for squares in made.squares.values()} == {20}


def test_refuses_the_ids_of_another_tokenizer(float_file):
    with pytest.raises(SaigaError, match=r"up to id 768.*vocabulary of 768"):
        imatrix.compute_importance(float_file, [[1, 768]], dataset="other")


def test_llama_cpp_prints_nothing(float_file, capfd):
    logging.getLogger("llama-cpp-python").setLevel(logging.NOTSET)  # as before its class is used
    imatrix.compute_importance(float_file, ROWS[:1], dataset="one")
    assert capfd.readouterr() == ("", "")


def test_refuses_an_unknown_layout_of_ggmls_tensors(monkeypatch):
    class Shifted(ctypes.Structure):
        _fields_ = (*libggml.Tensor._fields_[:-1], ("new", ctypes.c_int64), libggml.Tensor._fields_[-1])

    monkeypatch.setattr(libggml, "Tensor", Shifted)
    with pytest.raises(SaigaError, match="has an unknown tensor layout"):
        imatrix._require_layout()
