"""The merged directory, loaded by transformers, against peft's merge."""

import json
import resource
import shutil
import signal

import pytest
import small_models
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from saigakit.core import workspace
from saigakit.errors import SaigaError
from saigakit.export import other_formats
from saigakit.export.merge_plan import MergePlan
from saigakit.export.other_formats import to_safetensors

IDS = torch.tensor([[1, 404, 505, 606, 7, 8]])


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def adapted(base_dir, adapter_dir):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32), adapter_dir)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
        {"use_dora": True},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ],
    ids=["plain", "rslora", "dora", "fully trained modules", "embeddings and head"],
)
def test_transformers_computes_the_same_as_with_pefts_merge(base_dir, tmp_path, monkeypatch, settings):
    monkeypatch.setattr(other_formats, "_CHUNK", 1000)
    monkeypatch.setattr(other_formats, "_SHARD", 150_000)
    adapter_dir = small_models.adapter(tmp_path / "adapter", base_dir, **settings)
    made = to_safetensors(MergePlan.of(str(base_dir), adapter_dir), tmp_path / "merged")
    wanted = logits(adapted(base_dir, adapter_dir).merge_and_unload())
    found = logits(AutoModelForCausalLM.from_pretrained(made))
    assert (found - wanted).abs().max() <= 5e-6 * wanted.abs().max()
    index = json.loads((made / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert len(set(index["weight_map"].values())) == len(list(made.glob("model-*.safetensors"))) > 2


def test_a_tied_base_with_a_trained_head_is_untied(tiny, tmp_path):
    tied = small_models.base(tmp_path / "base", tiny / "base", tie_word_embeddings=True)
    adapter_dir = small_models.adapter(tmp_path / "adapter", tied, target_modules=["q_proj", "lm_head"])
    made = to_safetensors(MergePlan.of(str(tied), adapter_dir), tmp_path / "merged")
    wanted = logits(adapted(tied, adapter_dir))
    model = AutoModelForCausalLM.from_pretrained(made)
    assert not model.config.tie_word_embeddings
    assert (logits(model) - wanted).abs().max() <= 5e-6 * wanted.abs().max()


@pytest.mark.parametrize(("number_format", "called"), [("float16", "F16"), ("bfloat16", "BF16")])
def test_the_weights_have_the_requested_number_format(base_dir, adapter_dir, tmp_path, number_format, called):
    made = to_safetensors(MergePlan.of(str(base_dir), adapter_dir), tmp_path / "merged", number_format=number_format)
    with safe_open(made / "model.safetensors", "pt") as opened:
        assert {opened.get_slice(name).get_dtype() for name in opened.keys()} == {called}  # noqa: SIM118
    model = AutoModelForCausalLM.from_pretrained(made)
    dtype = getattr(torch, number_format)
    assert model.dtype == dtype
    for name, tensor in adapted(base_dir, adapter_dir).merge_and_unload().state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor.to(dtype), rtol=2**-7, atol=1e-6)


def test_a_number_too_large_for_float16_is_refused(base_dir, adapter_dir, tmp_path):
    plan = MergePlan.of(str(base_dir), [(adapter_dir, 1e6)])
    with pytest.raises(SaigaError, match=r"too large for float16.*--format gguf.*number_format='bfloat16'"):
        to_safetensors(plan, tmp_path / "merged", number_format="float16")
    assert list(tmp_path.iterdir()) == []


def test_a_quantised_base_is_refused_with_its_type(base_dir, tmp_path):
    quantised = shutil.copytree(base_dir, tmp_path / "base")
    tensors = load_file(quantised / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].to(torch.uint8)
    save_file(tensors, quantised / "model.safetensors")
    with pytest.raises(SaigaError, match=r"up_proj\.weight is of type U8: quantised weights cannot be merged"):
        to_safetensors(MergePlan.of(str(base_dir), None, base_source=str(quantised)), tmp_path / "merged")


def test_tokenizer_and_template_are_copied(base_dir, adapter_dir, tmp_path):
    made = to_safetensors(MergePlan.of(str(base_dir), adapter_dir), tmp_path / "merged")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (made / name).read_bytes() == (base_dir / name).read_bytes()
    assert AutoTokenizer.from_pretrained(made).chat_template == small_models.SAIGA2


def test_an_existing_directory_is_not_overwritten(base_dir, adapter_dir, tmp_path):
    with pytest.raises(SaigaError, match="already exists; nothing was overwritten"):
        to_safetensors(MergePlan.of(str(base_dir), adapter_dir), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_after_all_is_reported_and_leaves_nothing(base_dir, adapter_dir, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(SaigaError, match=r"merged could not be written: .*File too large"):
            to_safetensors(MergePlan.of(str(base_dir), adapter_dir), tmp_path / "merged")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_reported_before_the_first_byte(base_dir, adapter_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(workspace, "free_disk", lambda path: 10_000)
    with pytest.raises(SaigaError, match="of disk"):
        to_safetensors(MergePlan.of(str(base_dir), adapter_dir), tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []
