import gguf
import numpy as np
import pytest

from saigakit.errors import SaigaError
from saigakit.llamacpp import quantization
from saigakit.weights.model_shape import ModelShape

MODEL = ModelShape(
    hidden=256, layers=16, heads=8, kv_heads=2, head_dim=32, intermediate=512, vocabulary=768, tied=False
)
DEEP = ModelShape(
    hidden=256, layers=80, heads=64, kv_heads=8, head_dim=32, intermediate=512, vocabulary=768, tied=False
)


@pytest.fixture
def matrix():
    return np.random.default_rng(3).normal(size=(37, 512)).astype(np.float32)


def types(quant_type, shapes, model=MODEL, architecture="llama"):
    return quantization.tensor_types(shapes, quant_type, model, architecture)


@pytest.mark.parametrize("ggml_type", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_0", "Q5_1"])
def test_bytes_equal_those_of_gguf_for_types_it_can_quantise(matrix, ggml_type):
    expected = gguf.quants.quantize(matrix, gguf.GGMLQuantizationType[ggml_type])
    assert quantization.quantise(matrix, ggml_type).tobytes() == expected.tobytes()


@pytest.mark.parametrize(("ggml_type", "error"), [("Q6_K", 0.02), ("Q5_K", 0.04), ("Q4_K", 0.08), ("Q2_K", 0.35)])
def test_the_error_of_k_quants_is_within_bounds(matrix, ggml_type, error):
    rows = quantization.quantise(matrix, ggml_type)
    back = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[ggml_type])
    lost = np.sqrt(np.mean((back - matrix) ** 2))
    assert error / 3 < lost < error


@pytest.mark.parametrize("ggml_type", ["Q4_K", "Q3_K", "Q4_0"])
def test_the_bytes_do_not_depend_on_how_rows_are_split(matrix, ggml_type):
    parts = [quantization.quantise(matrix[first : first + 5], ggml_type).tobytes() for first in range(0, 37, 5)]
    assert b"".join(parts) == quantization.quantise(matrix, ggml_type).tobytes()


@pytest.mark.parametrize("ggml_type", ["F32", "F16", "Q8_0", "Q6_K", "Q5_1", "Q2_K"])
def test_tensor_bytes_is_the_size_of_the_quantised_matrix(matrix, ggml_type):
    assert quantization.tensor_bytes(matrix.shape, ggml_type) == quantization.quantise(matrix, ggml_type).nbytes


def test_quantises_a_transposed_view_like_its_copy(matrix):
    transposed = matrix.T[:256, :32]
    assert (
        quantization.quantise(transposed, "Q8_0").tobytes()
        == quantization.quantise(transposed.copy(), "Q8_0").tobytes()
    )


def test_refuses_a_number_that_overflows_float16(matrix):
    matrix[5, 5] = 1e6
    with pytest.raises(SaigaError, match="too large for F16"):
        quantization.quantise(matrix, "F16")


def test_refuses_an_importance_of_another_length(matrix):
    with pytest.raises(ValueError, match=r"shape \(37,\) for 512 columns"):
        quantization.quantise(matrix, "Q4_K", np.ones(37, dtype=np.float32))


def test_an_important_column_has_a_smaller_error(matrix):
    weights = np.ones(512, dtype=np.float32)
    weights[7] = 1e4
    lost = []
    for importance in (None, weights):
        rows = quantization.quantise(matrix, "Q2_K", importance)
        lost.append(np.abs(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType.Q2_K) - matrix)[:, 7].mean())
    assert lost[1] < lost[0] / 2


def test_an_unknown_quant_type_is_refused_listing_the_known_ones():
    with pytest.raises(SaigaError, match=r"'q4_k_m' is unknown\. Did you mean 'Q4_K_M'\? Use one of F32"):
        quantization.require_known("q4_k_m")


def test_sorts_layers_by_number_not_by_text():
    names = ["blk.10.a", "token_embd.weight", "blk.2.b", "output.weight", "blk.2.a"]
    assert quantization.sort_names(names) == ["output.weight", "token_embd.weight", "blk.2.a", "blk.2.b", "blk.10.a"]


def test_vectors_stay_in_float32():
    assert types("Q2_K", {"output_norm.weight": (256,)}) == {"output_norm.weight": "F32"}


def test_tied_embeddings_have_the_type_of_the_output():
    untied = types("Q4_K_M", {"token_embd.weight": (768, 256), "output.weight": (768, 256)})
    assert untied == {"token_embd.weight": "Q4_K", "output.weight": "Q6_K"}
    assert types("Q4_K_M", {"token_embd.weight": (768, 256)}) == {"token_embd.weight": "Q6_K"}


@pytest.mark.parametrize(("columns", "expected"), [(512, "Q4_K"), (576, "Q5_0"), (48, "F16")])
def test_rows_not_divisible_by_256_get_smaller_blocks(columns, expected):
    assert types("Q4_K_M", {"blk.4.ffn_up.weight": (256, columns)}) == {"blk.4.ffn_up.weight": expected}


def test_attn_v_of_a_70b_model_gets_more_bits():
    name = "blk.15.attn_v.weight"
    assert types("Q3_K_M", {name: (256, 256)})[name] == "Q4_K"
    assert types("Q3_K_M", {name: (256, 256)}, DEEP)[name] == "Q5_K"
    assert types("Q3_K_M", {name: (256, 256)}, DEEP, "qwen3")[name] == "Q4_K"
