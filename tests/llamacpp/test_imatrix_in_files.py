"""Compare files quantised with an importance matrix byte for byte with those of llama.cpp's own quantiser."""

import ctypes

import gguf
import llama_cpp
import numpy as np
import pytest
import small_models
from matrix import matrix

from saigakit import export
from saigakit.core.files import sha256
from saigakit.errors import SaigaError
from saigakit.llamacpp import imatrix
from saigakit.llamacpp.imatrix import Importance, Squares

pytestmark = pytest.mark.usefixtures("one_thread")
# Enough layers for the rules about eighths, and shared keys.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 9, "num_attention_heads": 8}
ODD = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 9, "num_key_value_heads": 1}
ROWS = [[1, *range(300 + 10 * index, 360 + 10 * index)] for index in range(8)]


@pytest.fixture(scope="module", params=[WIDE, ODD], ids=["wide", "odd"])
def made(request, tiny, tmp_path_factory):
    """Base directory, adapter directory, float file, importance matrix."""
    directory = tmp_path_factory.mktemp("made")
    base_dir = small_models.base(directory / "base", tiny / "base", **request.param)
    adapter_dir = small_models.adapter(directory / "adapter", base_dir)
    whole = export.to_gguf(model=str(base_dir), adapter=adapter_dir, output=directory / "f32.gguf", quant_type="F32")
    matrix = imatrix.compute_importance(whole, ROWS, dataset="train.jsonl").write(directory / "imatrix.gguf")
    return base_dir, adapter_dir, whole, matrix


def quantised_by_llama_cpp(source, quant_type, matrix_file, output):
    matrix = Importance.read(matrix_file)
    arrays = {name: np.ascontiguousarray(mean) for name, mean in matrix.items()}
    pointer = ctypes.POINTER(ctypes.c_float)
    entries = (llama_cpp.llama_model_imatrix_data * (len(arrays) + 1))(
        *((name.encode(), mean.ctypes.data_as(pointer), mean.size) for name, mean in arrays.items())
    )
    keys = (llama_cpp.llama_model_kv_override * 5)()
    for entry, (key, value) in zip(
        keys,
        {
            "quantize.imatrix.file": f"sha256:{sha256(matrix_file)}",
            "quantize.imatrix.entries_count": len(matrix),
            "quantize.imatrix.chunks_count": matrix.chunks,
        }.items(),
        strict=False,
    ):
        entry.key = key.encode()
        if isinstance(value, str):
            entry.tag, entry.value.val_str = 3, value.encode()
        else:
            entry.tag, entry.value.val_i64 = 0, value
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = gguf.LlamaFileType[f"MOSTLY_{quant_type}"], 1
    params.imatrix, params.kv_overrides = entries, keys
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(output).encode(), ctypes.byref(params)) == 0
    return output


TYPES = ["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "Q4_0", "IQ4_XS", "Q3_K_M", "Q2_K"]


@pytest.mark.parametrize("quant_type", matrix(TYPES, ["Q4_K_M"]))
def test_the_file_equals_llama_cpps_with_the_same_matrix(made, quant_type, tmp_path):
    base_dir, adapter_dir, whole, matrix = made
    options = {"model": str(base_dir), "adapter": adapter_dir, "quant_type": quant_type}
    ours = export.to_gguf(**options, output=tmp_path / "ours.gguf", importance=matrix)
    theirs = quantised_by_llama_cpp(whole, quant_type, matrix, tmp_path / "theirs.gguf")
    tensors = [{tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors} for file in (ours, theirs)]
    types = [{name: tensor.tensor_type.name for name, tensor in found.items()} for found in tensors]
    assert types[0] == types[1]
    assert [name for name in types[0] if tensors[0][name].data.tobytes() != tensors[1][name].data.tobytes()] == []
    assert ours.read_bytes() == theirs.read_bytes()


def test_the_matrix_changes_only_layer_weights(made, tmp_path):
    base_dir, _, _, matrix = made
    options = {"model": str(base_dir), "adapter": None, "quant_type": "Q4_K_S"}
    plain = export.to_gguf(**options, output=tmp_path / "plain.gguf")
    weighed = export.to_gguf(**options, output=tmp_path / "weighed.gguf", importance=matrix)
    tensors = [{tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors} for file in (plain, weighed)]
    changed = {name for name in tensors[0] if tensors[0][name].tobytes() != tensors[1][name].tobytes()}
    assert {name.split(".", 2)[2] for name in changed} == {
        f"{part}.weight" for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    }


def test_refuses_the_matrix_of_another_model_before_writing(made, tmp_path):
    name = "blk.0.attn_q.weight"
    other = Importance({name: Squares(np.ones(7, dtype=np.float32), 1.0)}).write(tmp_path / "other.gguf")
    with pytest.raises(SaigaError, match=rf"other.gguf belongs to another model: {name} has 7 columns"):
        export.to_gguf(model=str(made[0]), adapter=None, output=tmp_path / "made.gguf", importance=other)
    assert not (tmp_path / "made.gguf").exists()
