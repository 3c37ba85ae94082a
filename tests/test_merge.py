import numpy as np
import pytest
import small_models
import torch
from peft import IA3Config, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from saigakit.errors import SaigaError
from saigakit.merge import Merged

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def base_dir(tiny, tmp_path_factory):
    return small_models.base(tmp_path_factory.mktemp("base"), tiny / "base")


@pytest.fixture(scope="module")
def adapter_dir(base_dir, tmp_path_factory):
    return small_models.adapter(tmp_path_factory.mktemp("adapter"), base_dir)


@pytest.fixture
def own_adapter(adapter_dir, tmp_path):
    """A copy to damage."""
    save_file(load_file(adapter_dir / "adapter_model.safetensors"), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes((adapter_dir / "adapter_config.json").read_bytes())
    return tmp_path


def merged_by_peft(base_dir, adapter_dir):
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    return PeftModel.from_pretrained(base, adapter_dir).merge_and_unload().state_dict()


def require_as_peft(base_dir, adapter_dir):
    expected, merged = merged_by_peft(base_dir, adapter_dir), Merged.of(base_dir, adapter_dir)
    assert merged.adapter is not None
    assert len(merged.adapter.updates) == len(load_adapter(adapter_dir)) // 2
    for name in merged.shapes:
        np.testing.assert_allclose(merged.read(name), expected[name].numpy(), rtol=1e-6, atol=2e-6)


def load_adapter(adapter_dir):
    file = adapter_dir / "adapter_model.safetensors"
    return load_file(file) if file.is_file() else torch.load(adapter_dir / "adapter_model.bin", weights_only=True)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "r": 6, "lora_alpha": 5},
        {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": "gaussian"},
        {
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 3},
            "alpha_pattern": {"q_proj": 32, "layers.0.self_attn.v_proj": 1},
        },
        {"layers_to_transform": [0, 2], "target_modules": ["k_proj"]},
    ],
    ids=["plain", "rslora", "some modules", "patterns", "some layers"],
)
def test_a_merged_tensor_is_the_one_of_peft(base_dir, tmp_path, settings):
    require_as_peft(base_dir, small_models.adapter(tmp_path, base_dir, **settings))


def test_the_released_adapters_bin_file_of_2023_merges_as_in_peft(tiny):
    require_as_peft(tiny / "base", tiny / "adapter")


def test_without_an_adapter_the_base_comes_out_as_it_is(base_dir):
    merged, stored = Merged.of(base_dir, None), load_file(base_dir / "model.safetensors")
    assert all(np.array_equal(merged.read(name), stored[name].numpy()) for name in merged.shapes)


def test_merging_twice_gives_the_same_where_the_base_is_mapped_into_memory(base_dir, adapter_dir, tmp_path):
    torch.save(load_file(base_dir / "model.safetensors"), tmp_path / "pytorch_model.bin")
    merged = Merged.of(tmp_path, adapter_dir)
    first = merged.read(Q_PROJ).copy()
    assert np.array_equal(merged.read(Q_PROJ), first)


def test_the_adapter_of_a_deeper_base_names_the_tensor(base_dir, tiny, tmp_path):
    deeper = small_models.base(tmp_path / "deeper", tiny / "base", num_hidden_layers=4)
    with pytest.raises(SaigaError, match=r"model\.layers\.3\..* has no such tensor: it is the adapter of another base"):
        Merged.of(base_dir, small_models.adapter(tmp_path / "adapter", deeper))


def test_the_adapter_of_a_wider_base_names_the_tensor_and_both_shapes(base_dir, tiny, tmp_path):
    wider = small_models.base(tmp_path / "wider", tiny / "base", intermediate_size=128)
    foreign = small_models.adapter(tmp_path / "adapter", wider, target_modules=["up_proj"])
    with pytest.raises(SaigaError, match=r"up_proj\.weight of shape \[128, 64\].*its shape is \[96, 64\]"):
        Merged.of(base_dir, foreign)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "trained biases"),
        ({"lora_bias": True}, "LoRA biases"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    ],
)
def test_what_is_more_than_lora_on_linear_layers_is_refused_by_name(base_dir, tmp_path, settings, named):
    unsupported = small_models.adapter(tmp_path, base_dir, **settings)
    with pytest.raises(SaigaError, match=named):
        Merged.of(base_dir, unsupported)


def test_a_setting_that_is_not_known_to_be_harmless_is_refused(base_dir, own_adapter):
    small_models.edit_json(own_adapter / "adapter_config.json", use_next_years_trick=True)
    with pytest.raises(SaigaError, match="use_next_years_trick"):
        Merged.of(base_dir, own_adapter)


def test_another_kind_of_adapter_is_refused_by_name(base_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
    get_peft_model(model, config).save_pretrained(tmp_path)
    with pytest.raises(SaigaError, match="type IA3"):
        Merged.of(base_dir, tmp_path)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_file_of_the_adapter_that_was_cut_short_is_named(base_dir, own_adapter, name):
    small_models.cut(own_adapter / name)
    with pytest.raises(SaigaError, match=name):
        Merged.of(base_dir, own_adapter)


def test_an_old_adapter_that_was_cut_short_is_named(tiny, tmp_path):
    for name in ("adapter_config.json", "adapter_model.bin"):
        (tmp_path / name).write_bytes((tiny / "adapter" / name).read_bytes())
    small_models.cut(tmp_path / "adapter_model.bin")
    with pytest.raises(SaigaError, match=r"adapter_model\.bin"):
        Merged.of(tiny / "base", tmp_path)


def test_an_adapter_without_its_weights_is_refused(base_dir, own_adapter):
    (own_adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(SaigaError, match=r"adapter_model\.bin is missing"):
        Merged.of(base_dir, own_adapter)


def test_an_adapter_that_lost_one_of_two_matrices_is_refused(base_dir, own_adapter):
    file = own_adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"]
    save_file(tensors, file)
    with pytest.raises(SaigaError, match=r"A and B of model\.layers\.1\.self_attn\.q_proj"):
        Merged.of(base_dir, own_adapter)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_adapter_is_refused_with_the_name_of_the_tensor(base_dir, own_adapter, value):
    file = own_adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"base_model.model.{Q_PROJ.removesuffix('.weight')}.lora_B.weight"][0, 0] = value
    save_file(tensors, file)
    merged = Merged.of(base_dir, own_adapter)
    with pytest.raises(SaigaError, match=f"{Q_PROJ} holds NaN or infinity.*{own_adapter.name}"):
        merged.read(Q_PROJ)
