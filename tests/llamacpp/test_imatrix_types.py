"""Compare types and bytes of tensors quantised with an importance matrix with llama.cpp's own quantiser."""

import ctypes

import gguf
import llama_cpp
import numpy as np
import pytest
import small_models
from matrix import matrix

from saigakit import export
from saigakit.llamacpp import quantization
from saigakit.weights.model_shape import ModelShape

SETTINGS = {
    "wide": {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8},
    "narrow": {"hidden_size": 288, "intermediate_size": 96, "num_hidden_layers": 8, "tie_word_embeddings": True},
}
QUANT_TYPES = [name for name in quantization.QUANT_TYPES if name not in ("F32", "F16", "BF16")]


@pytest.fixture(scope="module", params=SETTINGS)
def source(request, tiny, tmp_path_factory):
    """The model as a float32 GGUF, its shape, an importance for each matrix of a layer."""
    directory = tmp_path_factory.mktemp(request.param)
    base_dir = small_models.base(directory / "base", tiny / "base", **SETTINGS[request.param])
    file = export.to_gguf(model=str(base_dir), adapter=None, output=directory / "float.gguf", quant_type="F32")
    rng = np.random.default_rng(1)
    importance = {
        tensor.name: rng.exponential(size=int(tensor.shape[0])).astype(np.float32) ** 3
        for tensor in gguf.GGUFReader(file).tensors
        if len(tensor.shape) == 2 and tensor.name != "token_embd.weight"
    }
    return file, ModelShape.from_config(base_dir), importance


def quantised_by_llama_cpp(file, quant_type, importance, made):
    entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()  # the last has no name
    for entry, (name, numbers) in zip(entries, importance.items(), strict=False):
        entry.name, entry.size = name.encode(), numbers.size
        entry.data = numbers.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.imatrix = gguf.LlamaFileType[f"MOSTLY_{quant_type}"], 1, entries
    assert llama_cpp.llama_model_quantize(str(file).encode(), str(made).encode(), ctypes.byref(params)) == 0
    return {tensor.name: tensor for tensor in gguf.GGUFReader(made).tensors}


@pytest.mark.parametrize("quant_type", matrix(QUANT_TYPES, ["Q4_K_M", "Q2_K"]))
def test_tensors_equal_llama_cpps_with_the_same_importance(source, quant_type, tmp_path):
    file, model, importance = source
    floats = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(file).tensors}
    shapes = {name: data.shape for name, data in floats.items()}
    types = quantization.tensor_types(shapes, quant_type, model, "llama", with_importance=True)
    theirs = quantised_by_llama_cpp(file, quant_type, importance, tmp_path / "reference.gguf")
    assert types == {name: tensor.tensor_type.name for name, tensor in theirs.items()}
    ours = {
        name: quantization.quantise(data, types[name], importance.get(name)) if data.ndim == 2 else data
        for name, data in floats.items()
    }
    assert [name for name in ours if ours[name].tobytes() != theirs[name].data.tobytes()] == []


def test_the_importance_changes_the_bytes():
    matrix = np.random.default_rng(3).normal(size=(4, 256)).astype(np.float32)
    plain = quantization.quantise(matrix, "Q4_K").tobytes()
    assert quantization.quantise(matrix, "Q4_K", np.geomspace(1, 1e4, 256)).tobytes() != plain
