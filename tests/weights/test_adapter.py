"""Adapters as peft saves them after a resized vocabulary, torch.compile, ZeRO-3 or with trained tokens."""

import json

import numpy as np
import pytest
import small_models
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from saigakit.errors import SaigaError
from saigakit.weights import adapter
from saigakit.weights.merge import Merged

IDS = torch.tensor([[1, 404, 505, 3, 5, 7]])
BOTH = ["embed_tokens", "lm_head"]
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module", params=["untied", "tied"])
def any_base(request, tiny, tmp_path_factory):
    return small_models.base(
        tmp_path_factory.mktemp("base"), tiny / "base", tie_word_embeddings=request.param == "tied"
    )


def loaded(base_dir, rows=None):
    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    if rows is not None:
        model.resize_token_embeddings(rows)
        model.lm_head.out_features = rows  # transformers 5.0 forgets it if the matrices are tied, and peft reads it
    return model


def trained(directory, base_dir, *, rows=None, is_compiled=False, save=None, **settings):
    """An adapter that peft has saved, with all that it trains moved away from its start."""
    torch.manual_seed(8)
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "init_lora_weights": False} | settings
    model = loaded(base_dir, rows)
    model = get_peft_model(torch.compile(model) if is_compiled else model, LoraConfig(task_type="CAUSAL_LM", **config))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.rand_like(parameter)
    model.save_pretrained(directory, **save or {})
    return directory


def require_same_logits(base_dir, adapter_dir, rows=None):
    """The merged tensors compute what peft's model computes, and rows read alone are equal."""
    merged = Merged.open(base_dir, adapter_dir)
    wanted = PeftModel.from_pretrained(loaded(base_dir, rows), adapter_dir).eval()
    plain = loaded(base_dir, rows) if not merged.is_untied else untied(base_dir, rows)
    state = {name: torch.tensor(merged.read(name)) for name in merged.shapes}
    plain.load_state_dict(state, strict=False)
    if not merged.is_untied:
        of_peft = PeftModel.from_pretrained(loaded(base_dir, rows), adapter_dir).merge_and_unload().state_dict()
        assert all(np.allclose(of_peft[name], tensor, rtol=1e-5, atol=1e-6) for name, tensor in state.items())
    with torch.no_grad():
        expected, found = wanted(IDS).logits, plain.eval()(IDS).logits
    assert (found - expected).abs().max() <= 5e-6 * expected.abs().max()
    for name, shape in merged.shapes.items():
        part = slice(2, shape[0] - 1)
        assert np.array_equal(merged.read(name, part), merged.read(name)[part]), name
    return merged


def untied(base_dir, rows):
    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32, tie_word_embeddings=False)
    if rows is not None:
        model.resize_token_embeddings(rows)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": BOTH},
        {"modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", *BOTH]},
        {"trainable_token_indices": [3, 5]},
    ],
    ids=str,
)
def test_copies_of_embeddings_that_were_saved_too_change_nothing(any_base, tmp_path, settings):
    require_same_logits(any_base, trained(tmp_path, any_base, save={"save_embedding_layers": True}, **settings))


@pytest.mark.parametrize(
    ("indices", "unties"),
    [
        ([3, 5], False),
        ([5, 3, 404], False),
        ({"embed_tokens": [3], "lm_head": [4, 5]}, True),
        ({"embed_tokens": [3, 5], "lm_head": [3, 5]}, False),
        ({"lm_head": [3]}, True),
    ],
    ids=str,
)
def test_trained_tokens_replace_their_rows(any_base, tmp_path, indices, unties):
    merged = require_same_logits(any_base, trained(tmp_path, any_base, trainable_token_indices=indices))
    assert merged.is_untied == (unties and merged.is_tied)


# huggingface/peft#2290: +5; axolotl-ai-cloud/axolotl#2277: 151,666 instead of Qwen's 151,936 rows
@pytest.mark.parametrize("rows", [769, 773, 700])
@pytest.mark.parametrize(
    "settings", [{}, {"modules_to_save": BOTH}, {"target_modules": ["q_proj", *BOTH]}], ids=lambda it: "-".join(it)
)
def test_a_resized_vocabulary_is_merged_from_the_adapters_own_embeddings(any_base, tmp_path, rows, settings):
    torch.manual_seed(9)
    merged = require_same_logits(any_base, trained(tmp_path, any_base, rows=rows, **settings), rows)
    assert merged.vocabulary == merged.shapes["model.embed_tokens.weight"][0] == rows


def test_trained_tokens_of_a_resized_vocabulary_are_merged(any_base, tmp_path):
    adapter_dir = trained(tmp_path, any_base, rows=770, trainable_token_indices=[768, 769])
    require_same_logits(any_base, adapter_dir, 770)


def test_a_resized_vocabulary_without_its_embeddings_is_explained(any_base, tmp_path):
    settings = {"rows": 769, "target_modules": ["q_proj", "lm_head"], "save": {"save_embedding_layers": False}}
    with pytest.raises(SaigaError, match=r"vocabulary of 769 tokens, but the base .* 768.*save_embedding_layers=True"):
        Merged.open(any_base, trained(tmp_path, any_base, **settings))


# huggingface/peft#2957
def test_the_names_of_torch_compile_are_understood(base_dir, tmp_path):
    compiled = Merged.open(base_dir, trained(tmp_path / "compiled", base_dir, is_compiled=True))
    plain = Merged.open(base_dir, trained(tmp_path / "plain", base_dir))
    assert "_orig_mod" in min(compiled.adapters[0][0].weights.stored)
    assert np.array_equal(compiled.read(Q_PROJ), plain.read(Q_PROJ))


def renamed(adapter_dir, directory, old, new):
    file = "adapter_model.safetensors"
    tensors = {name.replace(old, new, 1): tensor for name, tensor in load_file(adapter_dir / file).items()}
    directory.mkdir()
    (directory / adapter.CONFIG).write_bytes((adapter_dir / adapter.CONFIG).read_bytes())
    save_file(tensors, directory / file)
    return directory


def test_the_names_of_fsdp_are_understood(base_dir, adapter_dir, tmp_path):
    wrapped = renamed(adapter_dir, tmp_path / "wrapped", "base_model.", "_fsdp_wrapped_module.base_model.")
    wrapped = renamed(wrapped, tmp_path / "twice", ".self_attn", "._fsdp_wrapped_module.self_attn")
    found, wanted = Merged.open(base_dir, wrapped), Merged.open(base_dir, adapter_dir)
    assert np.array_equal(found.read(Q_PROJ), wanted.read(Q_PROJ))


SPELLINGS = ["model.", "language_model.model.", "model.language_model.", "language_model."]


# tdrussell/qlora-pipe#61; vllm-project/vllm#48022: text adapters on the model with images
@pytest.mark.parametrize("of_base", SPELLINGS[:3])
@pytest.mark.parametrize("of_adapter", SPELLINGS)
@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["embed_tokens"]}], ids=["linear", "embeddings"])
def test_the_spellings_of_a_language_model_in_a_model_with_images(tiny, tmp_path, of_base, of_adapter, settings):
    tied = small_models.base(tmp_path / "base", tiny / "base", tie_word_embeddings=True)
    adapter_dir = trained(tmp_path / "plain", tied, **settings)
    other = renamed(adapter_dir, tmp_path / "other", "base_model.model.model.", f"base_model.model.{of_adapter}")
    wanted = Merged.open(tied, adapter_dir)
    expected = {name: wanted.read(name) for name in wanted.shapes}
    tensors = load_file(tied / "model.safetensors")
    spelled = {name.replace("model.", of_base, 1): tensor for name, tensor in tensors.items()}
    save_file(spelled, tied / "model.safetensors")
    found = Merged.open(tied, other)
    assert len(found.shapes) == len(expected)
    for name in found.shapes:
        plain = "lm_head.weight" if name.endswith("lm_head.weight") else name.replace(of_base, "model.", 1)
        assert np.array_equal(found.read(name), expected[plain]), name


# huggingface/peft#1443, #2450 (empty tensors) and #2892 (a file of 40 bytes)
@pytest.mark.parametrize("is_empty_file", [False, True])
def test_an_adapter_that_was_not_gathered_is_explained(base_dir, adapter_dir, tmp_path, is_empty_file):
    tensors = load_file(adapter_dir / "adapter_model.safetensors")
    tensors = {} if is_empty_file else {name: torch.empty(0) for name in tensors}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / adapter.CONFIG).write_bytes((adapter_dir / adapter.CONFIG).read_bytes())
    with pytest.raises(SaigaError, match=r"without gathering the.*stage3_gather_16bit_weights_on_model_save"):
        Merged.open(base_dir, tmp_path)


@pytest.mark.parametrize(("value", "is_default"), [(16, True), (32, False)])
def test_a_new_setting_is_accepted_with_its_default_in_peft(base_dir, tmp_path, monkeypatch, value, is_default):
    monkeypatch.setattr(adapter, "_SUPPORTED", adapter._SUPPORTED - {"qalora_group_size"})
    adapter_dir = small_models.adapter(tmp_path, base_dir, qalora_group_size=value)
    if is_default:
        assert Merged.open(base_dir, adapter_dir).adapters
        return
    with pytest.raises(SaigaError, match="uses qalora_group_size, which saigakit cannot merge"):
        Merged.open(base_dir, adapter_dir)


def test_trained_tokens_that_do_not_fit_the_config_are_damage(base_dir, tmp_path):
    adapter_dir = trained(tmp_path, base_dir, trainable_token_indices=[3, 5])
    small_models.edit_json(adapter_dir / adapter.CONFIG, trainable_token_indices=[3])
    with pytest.raises(SaigaError, match=r"adapter_config\.json is missing or damaged \(trainable_token_indices"):
        Merged.open(base_dir, adapter_dir)


# Of unsloth, for language models with vision.
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:\.q_proj|\.k_proj|\.v_proj|\.o_proj|\.gate_proj|\.up_proj|\.down_proj))"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp)\.(?:(?:q_proj|k_proj|down_proj)))"
)


@pytest.mark.parametrize("pattern", [UNSLOTH, r".*\.(q|v)_proj", r"model\.layers\.(\d|1\d)\..*proj", "all-linear"])
def test_patterns_in_use_are_accepted(tmp_path, pattern):
    config = {"peft_type": "LORA", "target_modules": pattern, "alpha_pattern": {pattern: 8}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert adapter.read_config(tmp_path) == config


ENDLESS = ["(a+)+$", "(.*)*x", "(a|a)*x", "((a+)b?){2,}", ".*" * 20 + "x", ".?" * 45 + "x", "(.|..)" * 30 + "x"]


@pytest.mark.parametrize("pattern", ENDLESS)
@pytest.mark.parametrize(
    "key", ["target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"]
)
def test_a_pattern_that_may_take_forever_is_refused(tmp_path, key, pattern):
    config = {"peft_type": "LORA", key: {pattern: 8} if key.endswith("_pattern") else pattern}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(SaigaError, match=r"adapter_config\.json .* the pattern .* may take forever"):
        adapter.read_config(tmp_path)
