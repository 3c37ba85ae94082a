import re

import numpy as np
import pytest
import small_models
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from saigakit.errors import SaigaError
from saigakit.weights import load
from saigakit.weights.merge import Merged
from saigakit.weights.tensors import open_base

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def own_adapter(adapter_dir, tmp_path):
    """A copy to damage."""
    save_file(load_file(adapter_dir / "adapter_model.safetensors"), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes((adapter_dir / "adapter_config.json").read_bytes())
    return tmp_path


def adapted(base_dir, adapter_dir):
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    return PeftModel.from_pretrained(base, adapter_dir)


def require_equal(merged, expected):
    """Within 1e-6 of each tensor's largest number; rows read alone are bit-equal."""
    for name, shape in merged.shapes.items():
        wanted, found = expected[name].numpy(), merged.read(name)
        assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max(), name
        for rows in (slice(0, 1), slice(shape[0] // 3, shape[0] - 1), slice(shape[0] - 2, shape[0])):
            assert np.array_equal(merged.read(name, rows), found[rows]), name


def require_as_peft(base_dir, adapter_dir):
    merged = Merged.open(base_dir, adapter_dir)
    require_equal(merged, adapted(base_dir, adapter_dir).merge_and_unload().state_dict())
    stored = open_base(base_dir)
    changed = {name for name in merged.shapes if not np.array_equal(merged.read(name), stored.read(name))}
    assert changed == set(merged.adapters[0][0].changed())


def trained(directory, base_dir, **settings):
    """Like small_models.adapter, but fully trained modules and DoRA magnitudes are changed too."""
    torch.manual_seed(8)
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False} | settings
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **config))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.rand_like(parameter)
    model.save_pretrained(directory)
    return directory


ALL_KINDS = ["q_proj", "down_proj", "embed_tokens", "lm_head"]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "r": 6, "lora_alpha": 5},
        {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": "gaussian"},
        {
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 3},
            "alpha_pattern": {"q_proj": 32, "layers.0.self_attn.v_proj": 1},
            "target_modules": ["q_proj", "up_proj", "v_proj"],
        },
        {"layers_to_transform": [0, 2], "target_modules": ["k_proj"]},
        {"use_dora": True},
        {"use_dora": True, "use_rslora": True, "target_modules": ALL_KINDS},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"], "use_dora": True},
        {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]},
        {"target_modules": ALL_KINDS, "rank_pattern": {"embed_tokens": 7}},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_merges_like_peft(base_dir, tmp_path, settings):
    require_as_peft(base_dir, trained(tmp_path, base_dir, **settings))


@pytest.mark.parametrize("settings", [{"bias": "all"}, {"lora_bias": True}, {"bias": "all", "lora_bias": True}])
def test_merges_trained_biases_like_peft(tiny, tmp_path, settings):
    base_dir = small_models.base(tmp_path / "base", tiny / "base", attention_bias=True)
    adapter_dir = trained(tmp_path / "adapter", base_dir, **{"target_modules": ["q_proj", "v_proj"], **settings})
    require_as_peft(base_dir, adapter_dir)


def test_refuses_a_lora_bias_on_a_base_without_biases_like_peft(base_dir, tmp_path):
    adapter_dir = trained(tmp_path, base_dir, lora_bias=True)
    with pytest.raises(SaigaError, match=r"proj\.bias .*has no such tensor"):
        Merged.open(base_dir, adapter_dir)


def load_adapter(adapter_dir):
    return load_file(adapter_dir / "adapter_model.safetensors")


def renamed(adapter_dir, directory, pattern, new, *, as_bin=False):
    """The adapter with its tensors named as by another version of peft."""
    tensors = {re.sub(pattern, new, name): tensor for name, tensor in load_adapter(adapter_dir).items()}
    assert tensors.keys() != load_adapter(adapter_dir).keys()
    directory.mkdir()
    (directory / "adapter_config.json").write_bytes((adapter_dir / "adapter_config.json").read_bytes())
    if as_bin:
        torch.save(tensors, directory / "adapter_model.bin")
    else:
        save_file(tensors, directory / "adapter_model.safetensors")
    return directory


@pytest.mark.parametrize("as_bin", [False, True])
@pytest.mark.parametrize(
    ("pattern", "new"),
    [
        (r"(lora_[AB])\.", r"\1.default."),
        (r"(lora_magnitude_vector|lora_embedding_[AB])$", r"\1.default"),
        (r"(lora_magnitude_vector)$", r"\1.default.weight"),
        (r"lm_head\.weight", "lm_head.modules_to_save.weight"),
        (r"lm_head\.weight", "lm_head.modules_to_save.default.weight"),
    ],
)
def test_reads_the_tensor_names_of_other_peft_versions(base_dir, every_kind, tmp_path, pattern, new, as_bin):
    other = Merged.open(base_dir, renamed(every_kind, tmp_path / "other", pattern, new, as_bin=as_bin))
    merged = Merged.open(base_dir, every_kind)
    assert all(np.array_equal(other.read(name), merged.read(name)) for name in merged.shapes)


@pytest.fixture(scope="module")
def every_kind(base_dir, tmp_path_factory):
    settings = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"], "use_dora": True}
    return trained(tmp_path_factory.mktemp("every"), base_dir, **settings)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("as_bin", [False, True])
def test_merges_a_16_bit_base_in_float32(base_dir, adapter_dir, tmp_path, dtype, as_bin):
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(base_dir / "model.safetensors").items()}
    if as_bin:
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    expected = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    expected.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    peft_model = PeftModel.from_pretrained(expected, adapter_dir)
    require_equal(Merged.open(tmp_path, adapter_dir), peft_model.merge_and_unload().state_dict())


def test_adds_weighted_adapters_like_peft(base_dir, tmp_path):
    """peft adds them by concatenation."""
    one = trained(tmp_path / "one", base_dir, r=3)
    two = small_models.adapter(tmp_path / "two", base_dir, r=5, lora_alpha=7, target_modules=["q_proj", "up_proj"])
    model = adapted(base_dir, one)
    model.load_adapter(two, "two")
    load = {"default": 0.7, "two": -1.5}
    model.add_weighted_adapter(list(load), list(load.values()), "both", combination_type="cat")
    model.set_adapter("both")
    merged = Merged.open(base_dir, [(one, 0.7), (two, -1.5)])
    require_equal(merged, model.merge_and_unload().state_dict())


def test_weights_a_single_adapter(base_dir, adapter_dir):
    half, whole, base = (
        Merged.open(base_dir, [(adapter_dir, 0.5)]),
        Merged.open(base_dir, adapter_dir),
        open_base(base_dir),
    )
    found = half.read(Q_PROJ)
    np.testing.assert_allclose(found, (whole.read(Q_PROJ) + base.read(Q_PROJ)) / 2, atol=1e-5)
    assert not np.array_equal(found, base.read(Q_PROJ))


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"use_dora": True}, "DoRA"), ({"modules_to_save": ["lm_head"]}, r"modules_to_save\): lm_head\.weight")],
)
def test_refuses_to_add_or_weight_more_than_lora(base_dir, adapter_dir, tmp_path, settings, named):
    other = trained(tmp_path, base_dir, **settings)
    for adapters in ([(adapter_dir, 1.0), (other, 1.0)], [(other, 0.5)]):
        with pytest.raises(SaigaError, match=f"{named}.*Give it alone and with a weight of 1"):
            Merged.open(base_dir, adapters)


@pytest.fixture(scope="module")
def tied_dir(tiny, tmp_path_factory):
    return small_models.base(tmp_path_factory.mktemp("tied"), tiny / "base", tie_word_embeddings=True)


@pytest.mark.parametrize(
    ("settings", "untied"),
    [
        ({}, False),
        ({"modules_to_save": ["lm_head"]}, True),
        ({"modules_to_save": ["embed_tokens"]}, True),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, True),
        ({"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}, False),
        ({"target_modules": ["embed_tokens"]}, True),
        ({"target_modules": ["q_proj", "lm_head"]}, True),
        ({"target_modules": ALL_KINDS, "use_dora": True}, True),
        ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, True),
    ],
    ids=str,
)
def test_gives_a_tied_base_its_own_head_if_the_trained_model_has_one(tied_dir, tmp_path, settings, untied):
    """peft's merge adds both updates to the single matrix, but the trained model has two."""
    adapter_dir = trained(tmp_path, tied_dir, **settings)
    model, merged = adapted(tied_dir, adapter_dir).eval(), Merged.open(tied_dir, adapter_dir)
    assert merged.is_untied == untied
    assert ("lm_head.weight" in merged.shapes) == untied
    plain = AutoModelForCausalLM.from_pretrained(tied_dir, dtype=torch.float32, tie_word_embeddings=not untied)
    state = {name: torch.tensor(merged.read(name)) for name in merged.shapes}
    assert plain.load_state_dict(state, strict=False).missing_keys == ([] if untied else ["lm_head.weight"])
    ids = torch.tensor([[1, 404, 505, 606, 7, 8]])
    with torch.no_grad():
        wanted, found = model(ids).logits, plain.eval()(ids).logits
    assert (found - wanted).abs().max() <= 5e-6 * wanted.abs().max()


@pytest.mark.parametrize("number_format", ["float16", "bfloat16", "float32"])
def test_the_dequantised_base_is_what_nf4_training_computed_with(base_dir, adapter_dir, number_format):
    model = load.base_model(base_dir, "nf4", getattr(torch, number_format), "cpu")
    merged = Merged.open(base_dir, None, into="dequantized", number_format=number_format)
    held = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            held[f"{name}.weight"] = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
    assert len(held) == 21
    original = open_base(base_dir)
    for name in merged.shapes:
        wanted = held[name].numpy() if name in held else original.read(name)
        assert np.array_equal(merged.read(name), wanted), name
        assert np.array_equal(merged.read(name, slice(3, 9)), wanted[3:9]), name
    assert not np.array_equal(merged.read(Q_PROJ), original.read(Q_PROJ))
    both = Merged.open(base_dir, adapter_dir, into="dequantized", number_format=number_format)
    delta = Merged.open(base_dir, adapter_dir).read(Q_PROJ) - original.read(Q_PROJ)
    np.testing.assert_allclose(both.read(Q_PROJ), held[Q_PROJ].numpy() + delta, atol=1e-5)


def test_refuses_an_unknown_merge_into(base_dir):
    with pytest.raises(SaigaError, match="merge_into='quantized' is unknown; use one of original, dequantized"):
        Merged.open(base_dir, None, into="quantized")


def test_merges_the_released_bin_adapter_of_2023_like_peft(tiny):
    require_as_peft(tiny / "base", tiny / "adapter")


def test_without_an_adapter_the_base_is_unchanged(base_dir):
    merged, stored = Merged.open(base_dir, None), load_file(base_dir / "model.safetensors")
    assert all(np.array_equal(merged.read(name), stored[name].numpy()) for name in merged.shapes)


def test_merging_twice_does_not_change_a_memory_mapped_base(base_dir, adapter_dir, tmp_path):
    torch.save(load_file(base_dir / "model.safetensors"), tmp_path / "pytorch_model.bin")
    merged = Merged.open(tmp_path, adapter_dir)
    first = merged.read(Q_PROJ).copy()
    assert np.array_equal(merged.read(Q_PROJ), first)


def test_refuses_the_adapter_of_a_deeper_base_naming_the_tensor(base_dir, tiny, tmp_path):
    deeper = small_models.base(tmp_path / "deeper", tiny / "base", num_hidden_layers=4)
    with pytest.raises(SaigaError, match=r"model\.layers\.3\..* has no such tensor: it is the adapter of another base"):
        Merged.open(base_dir, small_models.adapter(tmp_path / "adapter", deeper))


def test_refuses_the_adapter_of_a_wider_base_naming_both_shapes(base_dir, tiny, tmp_path):
    wider = small_models.base(tmp_path / "wider", tiny / "base", intermediate_size=128)
    foreign = small_models.adapter(tmp_path / "adapter", wider, target_modules=["up_proj"])
    with pytest.raises(SaigaError, match=r"up_proj\.weight of shape \[128, 64\].*has the shape \[96, 64\]"):
        Merged.open(base_dir, foreign)


def test_refuses_an_initialisation_that_changes_the_base(base_dir, tmp_path):
    unsupported = small_models.adapter(tmp_path, base_dir, init_lora_weights="olora")
    with pytest.raises(SaigaError, match="init_lora_weights='olora'"):
        Merged.open(base_dir, unsupported)


def test_refuses_an_unknown_setting(base_dir, own_adapter):
    small_models.edit_json(own_adapter / "adapter_config.json", use_next_years_trick=True)
    with pytest.raises(SaigaError, match="use_next_years_trick"):
        Merged.open(base_dir, own_adapter)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"lora_alpha": None},
            r"adapter_config\.json is .*damaged \(lora_alpha=None for model\.layers\.0.* is not a number",
        ),
        ({"alpha_pattern": [8]}, r"adapter_config\.json .*alpha_pattern \[8\] is not a JSON object"),
        ({"lora_alpha": "16"}, r"adapter_config\.json .*lora_alpha='16' for"),
        ({"alpha_pattern": {"q_proj": None}}, r"lora_alpha=None for model\.layers\.0\.self_attn\.q_proj"),
        (
            {"alpha_pattern": {"layers.(0": 8}},
            r"adapter_config\.json .*alpha_pattern {'layers\.\(0': 8} has a name that is no regular expression",
        ),
    ],
)
def test_refuses_an_invalid_scale_naming_file_and_field(base_dir, own_adapter, settings, message):
    small_models.edit_json(own_adapter / "adapter_config.json", **settings)
    with pytest.raises(SaigaError, match=message):
        Merged.open(base_dir, own_adapter)


def test_refuses_transposed_layers(base_dir, own_adapter):
    small_models.edit_json(own_adapter / "adapter_config.json", fan_in_fan_out=True)
    with pytest.raises(SaigaError, match="uses fan_in_fan_out, which saigakit cannot merge"):
        Merged.open(base_dir, own_adapter)


def test_refuses_dora_without_magnitudes(base_dir, own_adapter):
    small_models.edit_json(own_adapter / "adapter_config.json", use_dora=True)
    with pytest.raises(SaigaError, match="has no lora_magnitude_vector"):
        Merged.open(base_dir, own_adapter)


def test_refuses_another_kind_of_adapter_by_name(base_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
    get_peft_model(model, config).save_pretrained(tmp_path)
    with pytest.raises(SaigaError, match="type IA3"):
        Merged.open(base_dir, tmp_path)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_names_a_truncated_adapter_file(base_dir, own_adapter, name):
    small_models.cut(own_adapter / name)
    with pytest.raises(SaigaError, match=name):
        Merged.open(base_dir, own_adapter)


def test_names_a_truncated_bin_adapter(tiny, tmp_path):
    for name in ("adapter_config.json", "adapter_model.bin"):
        (tmp_path / name).write_bytes((tiny / "adapter" / name).read_bytes())
    small_models.cut(tmp_path / "adapter_model.bin")
    with pytest.raises(SaigaError, match=r"adapter_model\.bin"):
        Merged.open(tiny / "base", tmp_path)


def test_refuses_an_adapter_without_weights(base_dir, own_adapter):
    (own_adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(SaigaError, match=r"adapter_model\.bin is missing"):
        Merged.open(base_dir, own_adapter)


def test_refuses_an_adapter_that_lacks_one_of_two_matrices(base_dir, own_adapter):
    file = own_adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"]
    save_file(tensors, file)
    with pytest.raises(SaigaError, match=r"A and B of model\.layers\.1\.self_attn\.q_proj"):
        Merged.open(base_dir, own_adapter)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_a_diverged_adapter_naming_the_tensor(base_dir, own_adapter, value, tmp_path):
    file = own_adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"base_model.model.{Q_PROJ.removesuffix('.weight')}.lora_B.weight"][0, 0] = value
    save_file(tensors, file)
    elsewhere = small_models.adapter(tmp_path / "elsewhere", base_dir, target_modules=["v_proj"])
    merged = Merged.open(base_dir, [(own_adapter, 1.0), (elsewhere, 1.0)])
    with pytest.raises(SaigaError, match=f"{Q_PROJ} contains NaN or infinity.*{own_adapter.name}") as refused:
        merged.read(Q_PROJ)
    assert "elsewhere" not in str(refused.value)
