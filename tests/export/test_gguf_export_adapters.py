"""Exported adapters of every kind: llama.cpp computes what the trained model computes."""

from contextlib import closing

import llama_cpp
import numpy as np
import pytest
import small_models
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from saigakit import export
from saigakit.core import manifest
from saigakit.errors import SaigaError
from saigakit.registry import Lora
from saigakit.weights import fold, load
from saigakit.weights.adapter import Adapter

IDS = [1, 404, 505, 606, 7, 8, 9, 300]


def logits_of_gguf(file):
    options = {"n_ctx": 64, "logits_all": True, "type_k": 0, "type_v": 0, "n_threads": 1, "verbose": False}
    with closing(llama_cpp.Llama(str(file), **options)) as llm:
        llm.eval(IDS)
        return np.array(llm.scores[: len(IDS)])


def logits_of(model):
    with torch.no_grad():
        return model.eval()(torch.tensor([IDS])).logits[0].numpy()


def exported(base_dir, adapter, directory, **settings):
    return export.to_gguf(
        model=str(base_dir), adapter=adapter, output=directory / "x.gguf", **({"quant_type": "F32"} | settings)
    )


def require_near(found, wanted):
    np.testing.assert_allclose(found, wanted, atol=5e-4 * wanted.std())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ],
    ids=str,
)
def test_llama_cpp_computes_what_the_trained_model_computes(tiny, tmp_path, settings, tied):
    base_dir = small_models.base(tmp_path / "base", tiny / "base", tie_word_embeddings=tied)
    adapter_dir = small_models.adapter(tmp_path / "adapter", base_dir, **settings)
    if "modules_to_save" in settings:
        small_models.move(adapter_dir, "lm_head")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32), adapter_dir)
    require_near(logits_of_gguf(exported(base_dir, adapter_dir, tmp_path)), logits_of(model))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_llama_cpp_extends_the_context_by_yarn_as_transformers_does(tiny, tmp_path, kind):
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "head_dim": 64}
    base_dir = small_models.base(
        tmp_path / "base", tiny / "base", kind=kind, rope_parameters=small_models.YARN, **sizes
    )
    wanted = logits_of(AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32))
    require_near(logits_of_gguf(exported(base_dir, None, tmp_path)), wanted)


def test_several_adapters_are_added_up_by_their_weights(base_dir, adapter_dir, tmp_path):
    one = logits_of_gguf(exported(base_dir, adapter_dir, tmp_path))
    (tmp_path / "x.gguf").unlink()
    two = logits_of_gguf(exported(base_dir, [(adapter_dir, 0.25), (str(adapter_dir), 0.75)], tmp_path))
    require_near(two, one)
    (tmp_path / "x.gguf").unlink()
    none = logits_of_gguf(exported(base_dir, [(adapter_dir, 0.25), (adapter_dir, -0.25)], tmp_path))
    require_near(none, logits_of(AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)))


@pytest.mark.parametrize("number_format", ["float16", "float32"])
def test_merging_into_the_dequantised_base_gives_the_model_trained_in_nf4(
    base_dir, adapter_dir, tmp_path, number_format
):
    parameters = {"model": str(base_dir), "quantization": "nf4"}
    facts = {"number_format": number_format}
    stage = tmp_path / "02_train"
    with manifest.making(stage, stage="02_train", parameters=parameters, inputs={}, facts=facts) as partial:
        for file in adapter_dir.iterdir():
            (partial / file.name).write_bytes(file.read_bytes())
    base = load.base_model(base_dir, "nf4", getattr(torch, number_format), "cpu")
    trained = logits_of(load.with_adapter(base, adapter_dir, Lora())).astype(np.float32)
    found = {}
    for into in ("original", "dequantized"):
        found[into] = logits_of_gguf(exported(base_dir, stage, tmp_path, merge_into=into))
        (tmp_path / "x.gguf").unlink()
    error = {into: np.abs(logits - trained).max() / trained.std() for into, logits in found.items()}
    limit = {"float16": 0.02, "float32": 1e-4}[number_format]  # float16 rounds every product of the trained model
    assert error["dequantized"] < limit < 0.1 < error["original"]


def test_an_adapter_trained_on_a_folded_nf4_base_is_merged_into_that_base(tiny, base_dir, adapter_dir, tmp_path):
    """The released adapter was in the base when it was quantised, the new one was trained next to it."""
    released = small_models.adapter(tmp_path / "released", base_dir, r=2, target_modules=["q_proj", "v_proj"])
    base = load.base_model(base_dir, "nf4", torch.float32, "cpu")
    fold.fold_adapter(base, base_dir, released)
    trained = logits_of(load.with_adapter(base, adapter_dir, Lora()))
    parameters = {"model": str(base_dir), "quantization": "nf4", "adapter": "folded"}
    facts = {"number_format": "float32", "training": {"folded_rank": Adapter.open(released).rank}}
    stage = tmp_path / "02_train"
    with manifest.making(stage, stage="02_train", parameters=parameters, inputs={}, facts=facts) as partial:
        fold.combine(released, adapter_dir, partial)
    found = {}
    for into in ("original", "dequantized", "auto"):
        found[into] = logits_of_gguf(exported(base_dir, stage, tmp_path, merge_into=into))
        (tmp_path / "x.gguf").unlink()
    error = {into: np.abs(logits - trained).max() / trained.std() for into, logits in found.items()}
    assert error["dequantized"] < 1e-3 < 0.1 < error["original"]
    assert np.array_equal(found["auto"], found["dequantized"])


@pytest.mark.parametrize(
    ("parameters", "named"),
    [({"quantization": "int8"}, "no nf4 base to dequantise"), ({"adapter": "folded"}, "folded base")],
)
def test_merging_into_the_dequantised_base_is_refused_without_such_a_training(
    base_dir, adapter_dir, tmp_path, parameters, named
):
    parameters = {"model": str(base_dir), "quantization": "nf4", **parameters}
    stage = tmp_path / "02_train"
    with manifest.making(stage, stage="02_train", parameters=parameters, inputs={}) as partial:
        for file in adapter_dir.iterdir():
            (partial / file.name).write_bytes(file.read_bytes())
    with pytest.raises(SaigaError, match=f"{named}.*merge_into='original'"):
        exported(base_dir, stage, tmp_path, merge_into="dequantized")
    assert exported(base_dir, stage, tmp_path).is_file()  # "auto"
