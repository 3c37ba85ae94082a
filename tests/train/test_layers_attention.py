"""Attention within packed documents."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from saigakit.train import layers

LENGTHS = (7, 1, 12, 5)


@pytest.fixture(params=[4, 2, 1], ids=["MHA", "GQA", "MQA"])
def model(request):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=request.param,
        initializer_range=0.5,
    )
    made = LlamaForCausalLM(config).double()
    made.config.use_cache = False
    return made


@pytest.fixture
def pack():
    torch.manual_seed(1)
    documents = [torch.randint(0, 64, (1, length)) for length in LENGTHS]
    return documents, torch.cat(documents, 1), torch.cat([torch.arange(length) for length in LENGTHS])[None]


def test_packed_logits_and_gradients_equal_those_of_separate_documents(model, pack):
    documents, ids, positions = pack
    alone = torch.cat([model(document).logits for document in documents], 1)
    alone.square().sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    layers.use_packed_attention(model)
    packed = model(ids, position_ids=positions).logits
    packed.square().sum().backward()
    # 1e-6 of logits of about 10: positions are rotated in float32, in another order of additions.
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-3, rtol=1e-5)


def test_activation_checkpointing_does_not_change_logits(model, pack):
    _, ids, positions = pack
    layers.use_packed_attention(model)
    plain = model(ids, position_ids=positions).logits
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    torch.testing.assert_close(model(ids, position_ids=positions).logits, plain)


@pytest.mark.parametrize("mixing", ["mask", "cache", "batch"])
def test_refuses_input_that_would_mix_documents(model, pack, mixing):
    _, ids, positions = pack
    layers.use_packed_attention(model)
    settings = {"position_ids": positions}
    if mixing == "mask":
        mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool)
        settings["attention_mask"] = mask
    elif mixing == "cache":
        settings["past_key_values"] = model(ids[:, :3], position_ids=positions[:, :3], use_cache=True).past_key_values
    else:
        ids, settings = ids.repeat(2, 1), {"position_ids": positions.repeat(2, 1)}
    with pytest.raises(ValueError, match="one row of complete documents"):
        model(ids, **settings)


def test_sdpa_can_be_restored_for_generation(model, pack):
    documents, _, _ = pack
    before = model(documents[0]).logits
    layers.use_packed_attention(model)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(model(documents[0]).logits, before)
