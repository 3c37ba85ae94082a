"""The adapter as a GGUF on top of the base's, against the merged model, both run by llama.cpp."""

from contextlib import closing
from itertools import islice

import gguf
import llama_cpp
import numpy as np
import pytest
import small_models
import torch
from safetensors.torch import load_file, save_file

from saigakit import export
from saigakit.errors import SaigaError
from saigakit.export import other_formats

PROMPTS = ([1, 404, 505, 606, 7, 8, 9, 300], list(range(10, 60)))


def logits(file, **settings):
    options = {"n_ctx": 128, "logits_all": True, "type_k": 0, "type_v": 0, "n_threads": 1, "verbose": False}
    found = []
    with closing(llama_cpp.Llama(str(file), **options, **settings)) as llm:
        for prompt in PROMPTS:
            llm.reset()
            llm.eval(prompt)
            found.append(np.array(llm.scores[: len(prompt)]))
    return np.concatenate(found)


def answer(file, **settings):
    with closing(llama_cpp.Llama(str(file), n_ctx=128, n_threads=1, verbose=False, **settings)) as llm:
        return list(islice(llm.generate(PROMPTS[0], temp=0.0), 24))


@pytest.mark.parametrize(
    ("base_settings", "settings"),
    [
        ({}, {}),
        ({}, {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}}),
        ({}, {"target_modules": ["q_proj", "lm_head", "embed_tokens"], "rank_pattern": {"embed_tokens": 3}}),
        ({"qwen3": True, "head_dim": 32}, {}),
        ({"tie_word_embeddings": True}, {}),
    ],
    ids=["plain", "scales", "embeddings and head", "qwen3", "tied"],
)
def test_base_with_adapter_file_answers_as_the_merged_model(tiny, tmp_path, base_settings, settings):
    base_dir = small_models.base(tmp_path / "base", tiny / "base", **base_settings)
    adapter_dir = small_models.adapter(tmp_path / "adapter", base_dir, **settings)
    model = str(base_dir)
    base = export.to_gguf(model=model, adapter=None, output=tmp_path / "base.gguf", quant_type="F32")
    merged = export.to_gguf(model=model, adapter=adapter_dir, output=tmp_path / "merged.gguf", quant_type="F32")
    lora = other_formats.to_lora_gguf(model=model, adapter=adapter_dir, output=tmp_path / "lora.gguf")
    wanted, found = logits(merged), logits(base, lora_path=str(lora))
    np.testing.assert_allclose(found, wanted, atol=1e-4 * wanted.std())
    assert np.abs(wanted - logits(base)).max() > 0.1 * wanted.std()
    assert answer(base, lora_path=str(lora)) == answer(merged)


def test_the_metadata_identify_a_lora_adapter(base_dir, tmp_path):
    adapter_dir = small_models.adapter(tmp_path / "adapter", base_dir)
    file = other_formats.to_lora_gguf(model=str(base_dir), adapter=adapter_dir, output=tmp_path / "lora.gguf")
    reader = gguf.GGUFReader(file)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    assert metadata["general.type"] == "adapter"
    assert metadata["adapter.type"] == "lora"
    assert metadata["adapter.lora.alpha"] == 8
    assert metadata["general.architecture"] == "llama"
    assert len(reader.tensors) == 2 * 7 * 3


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save\): lm_head"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_with_a_remedy(base_dir, tmp_path, settings, named):
    adapter_dir = small_models.adapter(tmp_path / "adapter", base_dir, **settings)
    with pytest.raises(SaigaError, match=f"{named}.*Merge it instead"):
        other_formats.to_lora_gguf(model=str(base_dir), adapter=adapter_dir, output=tmp_path / "lora.gguf")
    assert not (tmp_path / "lora.gguf").exists()


def test_lora_biases_are_refused(tiny, tmp_path):
    biased = small_models.base(tmp_path / "base", tiny / "base", attention_bias=True)
    adapter_dir = small_models.adapter(tmp_path / "adapter", biased, target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(SaigaError, match="LoRA biases"):
        other_formats.to_lora_gguf(model=str(biased), adapter=adapter_dir, output=tmp_path / "lora.gguf")


def test_lora_on_a_tied_head_is_refused(tiny, tmp_path):
    tied = small_models.base(tmp_path / "base", tiny / "base", tie_word_embeddings=True)
    adapter_dir = small_models.adapter(tmp_path / "adapter", tied, target_modules=["lm_head"])
    with pytest.raises(SaigaError, match=r"tied.*Merge it instead"):
        other_formats.to_lora_gguf(model=str(tied), adapter=adapter_dir, output=tmp_path / "lora.gguf")


@pytest.mark.parametrize(("shift", "refused"), [(0.5, True), (0, False)])
def test_embeddings_that_differ_from_the_bases_are_refused(base_dir, tmp_path, shift, refused):
    adapter_dir = small_models.adapter(tmp_path / "adapter", base_dir, target_modules=["embed_tokens"])
    file = adapter_dir / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    tensors[name][5] += shift
    tensors[name] = tensors[name].to(torch.float16)
    save_file(tensors, file)
    settings = {"model": str(base_dir), "adapter": adapter_dir, "output": tmp_path / "lora.gguf"}
    if not refused:
        assert other_formats.to_lora_gguf(**settings).is_file()
        return
    with pytest.raises(SaigaError, match=r"another model\.embed_tokens\.weight than the base"):
        other_formats.to_lora_gguf(**settings)


def test_an_existing_file_is_not_overwritten(base_dir, tmp_path):
    (tmp_path / "lora.gguf").write_text("mine")
    with pytest.raises(SaigaError, match="already exists"):
        other_formats.to_lora_gguf(model=str(base_dir), adapter="x", output=tmp_path / "lora.gguf")
    assert (tmp_path / "lora.gguf").read_text() == "mine"
