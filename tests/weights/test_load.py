"""Number formats by hardware, loading a base, and adapters: new, continued and refused."""

import json
import shutil
from dataclasses import replace

import pytest
import small_models
import torch

from saigakit.core.workspace import Gpu
from saigakit.errors import SaigaError
from saigakit.registry import ATTENTION, MODELS, Lora
from saigakit.weights import load
from saigakit.weights.merge import Merged

T4, P100, L4 = (Gpu(name, capability, 16 << 30, 15 << 30) for name, capability in
                (("Tesla T4", (7, 5)), ("Tesla P100", (6, 0)), ("NVIDIA L4", (8, 9))))  # fmt: skip
SAIGA = MODELS["saiga2_7b"]


def loaded(tiny, quantization="none"):
    return load.base_model(tiny / "base", quantization, torch.float32, "cpu")


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [([], "float32"), ([T4, T4], "float16"), ([L4], "bfloat16"), ([L4, T4], "float16")],
)
def test_the_number_format_follows_the_oldest_gpu(gpus, expected):
    assert load.number_format(SAIGA, gpus) == expected


def test_refuses_a_p100():
    with pytest.raises(SaigaError, match=r"P100 \(sm_60\) is too old.*T4 x2"):
        load.number_format(SAIGA, [P100])


def test_refuses_gemma_on_a_t4_and_accepts_it_on_an_l4():
    with pytest.raises(SaigaError, match=r"saiga_gemma3_12b .*sm_75.*overflow float16"):
        load.number_format(MODELS["saiga_gemma3_12b"], [T4])
    assert load.number_format(MODELS["saiga_gemma3_12b"], [L4]) == "bfloat16"


def test_a_new_adapter_is_float32_and_does_not_change_the_output(tiny):
    ids = torch.tensor([[1, 400, 500]])
    base = loaded(tiny)
    before = base(ids).logits
    adapted = load.with_adapter(base, None, Lora(rank=4))
    torch.testing.assert_close(adapted(ids).logits, before)
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}


def test_a_continued_adapter_is_loaded_bit_for_bit(tiny):
    adapted = load.with_adapter(loaded(tiny), tiny / "adapter", Lora())
    there = torch.load(tiny / "adapter" / "adapter_model.bin", weights_only=True)
    from peft import get_peft_model_state_dict

    taken = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    assert all(torch.equal(there[name], taken[name]) for name in there)
    assert sum(p.requires_grad for p in adapted.parameters()) == len(there)


def logits(model, ids=(1, 400, 500)):
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits


def with_random_b(model):
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("lora_B" in name or "modules_to_save" in name):
            torch.nn.init.normal_(parameter, 0.0, 0.1)
    return model


def test_rslora_scales_by_the_root_of_the_rank(tiny):
    plain, stable = (
        with_random_b(load.with_adapter(loaded(tiny), None, Lora(rank=4, alpha=8, rslora=rslora)))
        for rslora in (False, True)
    )
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    assert plain.get_submodule(layer).scaling["default"] == 8 / 4
    assert stable.get_submodule(layer).scaling["default"] == 8 / 4**0.5
    assert not torch.equal(logits(plain), logits(stable))


def test_dora_trains_magnitudes(tiny):
    adapted = load.with_adapter(loaded(tiny, "nf4"), None, Lora(rank=4, dora=True))
    magnitudes = [p for name, p in adapted.named_parameters() if "magnitude" in name]
    assert len(magnitudes) == 2 * 7 and all(p.requires_grad and p.dtype == torch.float32 for p in magnitudes)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(
    "lora",
    [
        Lora(rank=4, alpha=6, rslora=True, target_modules=ATTENTION),
        Lora(rank=4, dora=True),
        Lora(rank=4, modules_to_save=("embed_tokens", "lm_head")),
    ],
    ids=["rsLoRA", "DoRA", "modules_to_save"],
)
def test_a_saved_adapter_is_continued_bit_for_bit_and_trained(tiny, tmp_path, lora, quantization):
    first = with_random_b(load.with_adapter(loaded(tiny, quantization), None, lora))
    before = logits(first)
    first.save_pretrained(tmp_path, save_embedding_layers=False)
    Merged.open(tiny / "base", tmp_path)
    described = load.lora_of(tmp_path)
    assert described == replace(
        lora, target_modules=tuple(sorted(lora.target_modules)), modules_to_save=described.modules_to_save
    )
    assert set(described.modules_to_save) == set(lora.modules_to_save)
    second = load.with_adapter(loaded(tiny, quantization), tmp_path, Lora())
    torch.testing.assert_close(logits(second), before, rtol=0, atol=0)
    trainable = [{name for name, p in model.named_parameters() if p.requires_grad} for model in (first, second)]
    assert trainable[0] == trainable[1]
    ids = torch.tensor([[1, 400, 500, 600]])
    second.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in second.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fully_trained_modules_are_float32_whether_new_or_continued(tiny, tmp_path, dtype):
    for adapter_dir in (None, tmp_path):
        base = load.base_model(tiny / "base", "none", dtype, "cpu")
        adapted = load.with_adapter(base, adapter_dir, Lora(modules_to_save=("lm_head",)))
        assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
        assert {p.dtype for p in adapted.parameters() if not p.requires_grad} == {dtype}
        load.require_formats(adapted, dtype)
        adapted.save_pretrained(tmp_path, save_embedding_layers=False)


def test_refuses_number_formats_that_a_t4_cannot_train_in(tiny):
    adapted = load.with_adapter(load.base_model(tiny / "base", "nf4", torch.float16, "cpu"), None, Lora())
    load.require_formats(adapted, torch.float16)
    norm = adapted.get_base_model().model.norm.weight
    norm.data = norm.data.bfloat16()
    with pytest.raises(
        TypeError, match=r"norm\.weight is torch\.bfloat16, but must be torch\.float16 or torch\.float32"
    ):
        load.require_formats(adapted, torch.float16)
    norm.data = norm.data.float()
    next(p for p in adapted.parameters() if p.requires_grad).data = torch.zeros(4, 64, dtype=torch.float16)
    with pytest.raises(TypeError, match=r"lora_A.* is torch\.float16, but must be torch\.float32"):
        load.require_formats(adapted, torch.float16)
    adapted.requires_grad_(requires_grad=False)
    with pytest.raises(TypeError, match=r"no parameter .* trainable"):
        load.require_formats(adapted, torch.float16)


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_refuses_a_fully_trained_module_of_another_vocabulary_by_its_header(tiny, tmp_path, module):
    first = load.with_adapter(loaded(tiny), None, Lora(rank=2, modules_to_save=(module,)))
    first.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    Merged.open(tiny / "base", tmp_path / "a")
    sizes = {"intermediate_size": 256, "num_hidden_layers": 2}
    other = small_models.base(tmp_path / "base", tiny / "base", vocab_size=800, **sizes)
    with pytest.raises(SaigaError, match=r"with a vocabulary of 768 tokens, but the base .* has 800"):
        Merged.open(other, tmp_path / "a")


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base_keeps_its_gradients_after_an_evaluation(tiny, quantization):
    """On a CPU with AVX512-BF16 a forward pass in eval mode would repack nf4 weights, without autograd."""
    adapted = load.with_adapter(loaded(tiny, quantization), tiny / "adapter", Lora())
    ids = torch.tensor([[1, 400, 500, 600]])

    def gradients():
        adapted.zero_grad()
        adapted.eval()  # no dropout
        adapted(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in adapted.parameters() if p.requires_grad]

    first = gradients()
    with torch.no_grad():
        adapted(ids)
    for before, after in zip(first, gradients(), strict=True):
        torch.testing.assert_close(after, before)
    assert any(gradient.abs().max() > 0 for gradient in first)


def changed_adapter(tiny, directory, change):
    shutil.copytree(tiny / "adapter", directory)
    file = directory / "adapter_model.bin"
    torch.save(change(torch.load(file, weights_only=True)), file)
    return directory


def test_refuses_an_adapter_of_other_sizes_naming_its_base(tiny, tmp_path):
    adapter = changed_adapter(tiny, tmp_path / "a", lambda state: {k: torch.zeros(9, 9) for k in state})
    with pytest.raises(SaigaError, match=r"belongs to another base model.*trained on package:saiga_tiny"):
        load.with_adapter(loaded(tiny), adapter, Lora())


def test_refuses_an_adapter_with_more_layers_than_the_base(tiny, tmp_path):
    def deeper(state):
        return state | {name.replace("layers.1.", "layers.2."): value for name, value in state.items()}

    adapter = changed_adapter(tiny, tmp_path / "a", deeper)
    with pytest.raises(SaigaError, match=r"layers\.2\..*does not fit"):
        load.with_adapter(loaded(tiny), adapter, Lora())


def test_refuses_an_adapter_whose_modules_the_base_lacks(tiny, tmp_path):
    adapter = changed_adapter(tiny, tmp_path / "a", lambda state: state)
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["c_attn"]}))
    with pytest.raises(SaigaError, match="belongs to another base model"):
        load.with_adapter(loaded(tiny), adapter, Lora())


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {name: value[:, :5] if "lora_A" in name else value for name, value in state.items()},
        lambda state: {name: value[:5] if "lora_B" in name else value for name, value in state.items()},
        lambda state: {name.replace("layers.1.", "layers.7."): value for name, value in state.items()},
        lambda state: {name.replace("q_proj", "c_attn"): value for name, value in state.items()},
    ],
)
def test_recognises_the_adapter_of_another_base_by_its_header(tiny, tmp_path, change):
    Merged.open(tiny / "base", tiny / "adapter")
    adapter = changed_adapter(tiny, tmp_path / "a", change)
    with pytest.raises(SaigaError, match="is the adapter of another base"):
        Merged.open(tiny / "base", adapter)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
def test_names_a_truncated_adapter_file(tiny, tmp_path, name):
    shutil.copytree(tiny / "adapter", tmp_path / "a")
    (tmp_path / "a" / "adapter_model.bin").rename(tmp_path / "a" / name)
    data = (tmp_path / "a" / name).read_bytes()
    (tmp_path / "a" / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(SaigaError, match=rf"{name} is missing or damaged"):
        load.adapter_shapes(tmp_path / "a")


def test_names_a_truncated_base(tiny, tmp_path):
    shutil.copytree(tiny / "base", tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SaigaError, match="cannot be loaded"):
        load.base_model(tmp_path / "base", "none", torch.float32, "cpu")
