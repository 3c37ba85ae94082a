import json

import numpy as np
import pytest
import small_models
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama import LlamaConfig

from saigakit.errors import SaigaError
from saigakit.llamacpp.architecture import Architecture
from saigakit.weights.merge import Merged


@pytest.fixture
def base_dir(tiny, tmp_path):
    return small_models.base(tmp_path, tiny / "base")


def test_every_tensor_of_the_base_has_a_gguf_name(base_dir):
    names = Merged.open(base_dir, None).shapes
    assert sorted(Architecture.from_config(base_dir).source_names(names).values()) == sorted(names)


def test_refuses_an_unknown_architecture_listing_the_supported_ones(base_dir):
    small_models.edit_json(base_dir / "config.json", architectures=["GemmaForCausalLM"])
    with pytest.raises(SaigaError, match=r"GemmaForCausalLM.*supported are LlamaForCausalLM, MistralForCausalLM"):
        Architecture.from_config(base_dir)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
            "rope_type='dynamic', but saigakit can export only 'default' or 'llama3' or 'linear' or 'yarn'",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "needs a number for original_max_position_emb"),
        (
            {"rope_parameters": {**small_models.YARN, "attention_factor": 2.0}},
            "rope_type='yarn' has attention_factor=2.0, which llama.cpp computes differently",
        ),
        ({"rope_parameters": {**small_models.YARN, "truncate": False}}, "rope_type='yarn' has truncate=False"),
        ({"rope_parameters": {**small_models.YARN, "beta_fast": 16}}, "rope_type='yarn' has beta_fast=16"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": None, "low_freq_factor": 1.0}},
            r"config\.json: rope_type='llama3' needs a number for high_freq_factor, factor, original_max",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_type='linear' needs a number for factor"),
    ],
)
def test_refuses_a_setting_that_gguf_cannot_express(base_dir, settings, named):
    small_models.edit_json(base_dir / "config.json", **settings)
    with pytest.raises(SaigaError, match=named):
        Architecture.from_config(base_dir)


@pytest.mark.parametrize(
    ("settings", "is_refused"),
    [
        ({"use_sliding_window": False, "sliding_window": 16}, False),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}, True),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3}, False),
        ({"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 0}, False),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, False),
    ],
)
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize("layer_types", ["named", "left out"])  # as transformers 5 writes them, and those before
def test_refuses_a_qwen_whose_layers_have_a_window(tiny, tmp_path, kind, settings, is_refused, layer_types):
    base_dir = small_models.base(tmp_path, tiny / "base", kind=kind, **settings)
    if layer_types == "left out":
        small_models.edit_json(base_dir / "config.json", **settings, layer_types=None)
    if not is_refused:
        Architecture.from_config(base_dir)
        return
    with pytest.raises(
        SaigaError, match=r"config\.json: layers see only the last 16 tokens.*write null for sliding_window"
    ):
        Architecture.from_config(base_dir)


@pytest.mark.parametrize(("window", "is_reported"), [(64, True), (512, False), (None, False)])
def test_reports_that_llama_cpp_ignores_mistrals_window(tiny, tmp_path, capsys, window, is_reported):
    base_dir = small_models.base(tmp_path, tiny / "base", kind="mistral", sliding_window=window)
    capsys.readouterr()
    Architecture.from_config(base_dir)
    assert (
        "only the last 64 tokens, which llama.cpp does not support for this kind: it uses" in capsys.readouterr().out
    ) == is_reported


GEMMA3 = {"num_hidden_layers": 7, "query_pre_attn_scalar": 16, "tie_word_embeddings": True}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"layer_types": ["full_attention"] * 7}, "layer_types='unusual'"),
        ({"layer_types": None, "sliding_window_pattern": 3}, "layer_types='unusual'"),
        ({"query_pre_attn_scalar": 224}, "query_pre_attn_scalar=224"),
        ({"hidden_activation": "gelu"}, "hidden_act='gelu'"),
        ({"rope_scaling": small_models.YARN, "rope_parameters": None}, "rope_type='yarn'"),
    ],
)
def test_refuses_a_gemma_that_llama_cpp_would_compute_differently(tiny, tmp_path, settings, named):
    base_dir = small_models.base(tmp_path, tiny / "base", kind="gemma3_text", head_dim=16, **GEMMA3)
    Architecture.from_config(base_dir)
    small_models.edit_json(base_dir / "config.json", **settings)
    with pytest.raises(SaigaError, match=named):
        Architecture.from_config(base_dir)


def test_names_and_counts_missing_tensors(base_dir):
    names = [name for name in Merged.open(base_dir, None).shapes if "layers.1." not in name]
    with pytest.raises(SaigaError, match=r"model\.layers\.1\.input_layernorm\.weight \(9 tensors are missing\)"):
        Architecture.from_config(base_dir).source_names(names)


def test_names_a_tensor_that_would_be_lost(base_dir):
    names = [*Merged.open(base_dir, None).shapes, "model.layers.0.mlp.router.weight"]
    with pytest.raises(SaigaError, match=r"mlp\.router\.weight, which a llama GGUF has no place for"):
        Architecture.from_config(base_dir).source_names(names)


@pytest.mark.parametrize(
    ("kind", "module", "has_place"),
    [
        ("llama", "mlp.down_proj", True),
        ("llama", "input_layernorm", False),
        ("qwen2", "self_attn.q_proj", True),
        ("qwen2", "self_attn.o_proj", False),
        ("qwen3", "self_attn.o_proj", False),
        ("qwen3", "mlp.up_proj", False),
    ],
)
def test_names_a_bias_that_llama_cpp_does_not_read(tiny, tmp_path, kind, module, has_place):
    base_dir = small_models.base(tmp_path, tiny / "base", kind=kind)
    names = [*Merged.open(base_dir, None).shapes, *(f"model.layers.{i}.{module}.bias" for i in range(3))]
    architecture = Architecture.from_config(base_dir)
    if has_place:
        assert set(architecture.source_names(names).values()) == set(names)
        return
    with pytest.raises(SaigaError, match=rf"model\.layers\.0\.{module}\.bias, which a {kind} GGUF has no place for"):
        architecture.source_names(names)


def test_leaves_out_buffers_of_old_checkpoints(base_dir):
    names = [*Merged.open(base_dir, None).shapes, "model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert len(Architecture.from_config(base_dir).source_names(names)) == len(names) - 1


def test_leaves_out_a_copy_of_tied_embeddings(tiny, tmp_path):
    base_dir = small_models.base(tmp_path, tiny / "base", tie_word_embeddings=True)
    names = Merged.open(base_dir, None).shapes
    assert "output.weight" not in Architecture.from_config(base_dir).source_names([*names, "lm_head.weight"])


def test_refuses_embeddings_of_another_size_than_in_the_config(base_dir):
    small_models.edit_json(base_dir / "config.json", vocab_size=770)
    architecture, shapes = Architecture.from_config(base_dir), Merged.open(base_dir, None).shapes
    with pytest.raises(SaigaError, match=r"embed_tokens\.weight.*\[768, 64\].*\[770, 64\]"):
        architecture.require_shapes(architecture.source_names(shapes), shapes)


def test_frequency_factors_of_llama_3_equal_those_of_transformers(tiny, tmp_path):
    base_dir = small_models.base(tmp_path, tiny / "base", rope_parameters=small_models.LLAMA3_ROPE, head_dim=64)
    config = LlamaConfig.from_pretrained(base_dir)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / small_models.LLAMA3_ROPE["rope_theta"] ** (torch.arange(0, 64, 2) / 64)
    (factors,) = Architecture.from_config(base_dir).computed_tensors().values()
    assert len(set(factors)) > 3
    np.testing.assert_allclose(factors, (plain / scaled).numpy(), rtol=1e-5)


def test_reads_the_config_of_transformers_4(tiny, tmp_path):
    base_dir = small_models.base(tmp_path, tiny / "base", rope_parameters=small_models.LLAMA3_ROPE)
    new = Architecture.from_config(base_dir).computed_tensors()
    config = json.loads((base_dir / "config.json").read_text(encoding="utf-8"))
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    (base_dir / "config.json").write_text(json.dumps(config), encoding="utf-8")
    old = Architecture.from_config(base_dir).computed_tensors()
    assert list(old) == list(new)
    assert all(np.array_equal(old[name], new[name]) for name in new)
