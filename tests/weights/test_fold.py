"""Folding a released adapter into its base, and combining it with the LoRA trained on top."""

import json
import resource

import pytest
import small_models
import torch
from safetensors.torch import load_file, save_file

from saigakit.errors import SaigaError
from saigakit.registry import ALL_LINEAR, ATTENTION, Lora
from saigakit.weights import fold, load, merge

IDS = torch.tensor([[1, 400, 500, 33, 7]])


@pytest.fixture(scope="module")
def base_dir(tiny, tmp_path_factory):
    return small_models.base(tmp_path_factory.mktemp("fold") / "base", tiny / "base", initializer_range=0.05)


@pytest.fixture(scope="module")
def released(base_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("fold") / "released"
    return small_models.adapter(directory, base_dir, r=3, lora_alpha=7, target_modules=list(ATTENTION))


def loaded(base_dir, quantization="none", dtype=torch.float32):
    return load.base_model(base_dir, quantization, dtype, "cpu")


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def merged_by_hand(base_dir, released, directory):
    """The base with the adapter merged into its files."""
    model = loaded(base_dir)
    model.save_pretrained(directory)
    file = directory / "model.safetensors"
    both = merge.Merged.open(base_dir, released)
    save_file({name: torch.from_numpy(both.read(name)) for name in load_file(file)}, file, metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_the_folded_base_is_the_merged_base_quantised_once(base_dir, released, tmp_path, quantization):
    model = loaded(base_dir, quantization)
    before = logits(model)
    model = loaded(base_dir, quantization)
    fold.fold_adapter(model, base_dir, released)
    folded = logits(model)
    assert torch.equal(folded, logits(loaded(merged_by_hand(base_dir, released, tmp_path / "merged"), quantization)))
    assert (folded - before).abs().max() > 0.01


def test_the_folded_base_computes_what_peft_computes(base_dir, released):
    model = loaded(base_dir)
    fold.fold_adapter(model, base_dir, released)
    apart = load.with_adapter(loaded(base_dir), released, Lora())
    torch.testing.assert_close(logits(model), logits(apart), rtol=0, atol=1e-6 * logits(apart).abs().max().item())


def test_folding_keeps_the_number_format(base_dir, released):
    model = loaded(base_dir, dtype=torch.float16)
    fold.fold_adapter(model, base_dir, released)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert not any(parameter.requires_grad for parameter in model.model.layers[0].self_attn.q_proj.parameters())


def trained_on_top(base_dir, released, directory, quantization="none", **settings):
    """Train a new LoRA on the folded base for a few steps, save it and return the model."""
    model = loaded(base_dir, quantization)
    fold.fold_adapter(model, base_dir, released)
    torch.manual_seed(2)
    adapted = load.with_adapter(model, None, Lora(**({"rank": 5, "alpha": 8, "dropout": 0.0} | settings)))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.02)
    for _ in range(4):
        adapted.train()(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.save_pretrained(directory, save_embedding_layers=False)
    return adapted


@pytest.mark.parametrize("rslora", [False, True])
def test_the_combined_adapter_reproduces_the_trained_model(base_dir, released, tmp_path, rslora):
    trained = trained_on_top(base_dir, released, tmp_path / "new", rslora=rslora)
    both = fold.combine(released, tmp_path / "new", tmp_path / "both")
    described = load.lora_of(both)
    assert (described.rank, set(described.target_modules), described.rslora) == (8, set(ALL_LINEAR), False)
    wanted = logits(trained)
    found = logits(load.with_adapter(loaded(base_dir), both, Lora()))
    assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    assert (wanted - logits(load.with_adapter(loaded(base_dir), released, Lora()))).abs().max() > 0.01


def test_the_combined_adapter_can_be_merged(base_dir, released, tmp_path):
    trained = trained_on_top(base_dir, released, tmp_path / "new")
    both = fold.combine(released, tmp_path / "new", tmp_path / "both")
    model = loaded(base_dir)
    fold.fold_adapter(model, base_dir, both)
    wanted = logits(trained)
    assert (logits(model) - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_the_new_lora_is_trained_on_the_quantised_sum(base_dir, released, tmp_path):
    trained = trained_on_top(base_dir, released, tmp_path / "new", quantization="nf4")
    assert load.lora_of(tmp_path / "new").rank == 5
    model = loaded(base_dir, "nf4")
    fold.fold_adapter(model, base_dir, released)
    torch.testing.assert_close(logits(load.with_adapter(model, tmp_path / "new", Lora())), logits(trained))


def test_modules_that_one_adapter_does_not_change_get_zeros(base_dir, released, tmp_path):
    trained_on_top(base_dir, released, tmp_path / "new", target_modules=("q_proj", "up_proj"))
    state = load_file(fold.combine(released, tmp_path / "new", tmp_path / "both") / "adapter_model.safetensors")
    a, b = (state[f"base_model.model.model.layers.1.mlp.up_proj.lora_{letter}.weight"] for letter in "AB")
    assert a.shape[0] == b.shape[1] == 8
    assert not a[:3].any() and not b[:, :3].any() and a[3:].any() and b[:, 3:].any()
    a = state["base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"]
    assert a[:3].any() and not a[3:].any()


def test_refuses_the_adapter_of_another_base(tiny, released):
    with pytest.raises(SaigaError, match="adapter of another base"):
        fold.fold_adapter(loaded(tiny / "base"), tiny / "base", released)


def test_refuses_more_than_plain_lora(base_dir, released, tmp_path):
    trained_on_top(base_dir, released, tmp_path / "new", dora=True)
    with pytest.raises(SaigaError, match="DoRA"):
        fold.combine(released, tmp_path / "new", tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_does_not_overwrite_an_adapter(base_dir, released, tmp_path):
    before = json.loads((released / "adapter_config.json").read_text(encoding="utf-8"))
    with pytest.raises(SaigaError, match="already contains an adapter"):
        fold.combine(released, released, released)
    assert json.loads((released / "adapter_config.json").read_text(encoding="utf-8")) == before


def test_a_full_disk_is_reported_and_leaves_no_combined_adapter(released, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(
            SaigaError, match=r"adapter_model\.safetensors could not be written: .* bytes are free there"
        ):
            fold.combine(released, released, tmp_path / "both")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / "both").iterdir()) == []
