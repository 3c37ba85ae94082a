"""Number formats by hardware, a base as it is loaded, adapters new, continued and refused."""

import json
import shutil

import pytest
import torch

from saigakit import weights
from saigakit.errors import SaigaError
from saigakit.models import MODELS, Lora
from saigakit.workspace import Gpu

T4, P100, L4 = (Gpu(name, capability, 16 << 30, 15 << 30) for name, capability in
                (("Tesla T4", (7, 5)), ("Tesla P100", (6, 0)), ("NVIDIA L4", (8, 9))))  # fmt: skip
SAIGA = MODELS["saiga2_7b"]


def load(tiny, quantization="none"):
    return weights.load_base(tiny / "base", quantization, torch.float32, "cpu")


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [([], "float32"), ([T4, T4], "float16"), ([L4], "bfloat16"), ([L4, T4], "float16")],
)
def test_the_number_format_follows_the_oldest_gpu(gpus, expected):
    assert weights.number_format(SAIGA, gpus) == expected


def test_a_p100_is_refused():
    with pytest.raises(SaigaError, match=r"P100 \(sm_60\) is too old.*T4 x2"):
        weights.number_format(SAIGA, [P100])


def test_gemma_is_refused_on_a_t4_with_the_reason_and_taken_on_an_l4():
    with pytest.raises(SaigaError, match=r"saiga_gemma3_12b .*sm_75.*overflow float16"):
        weights.number_format(MODELS["saiga_gemma3_12b"], [T4])
    assert weights.number_format(MODELS["saiga_gemma3_12b"], [L4]) == "bfloat16"


def test_a_new_adapter_changes_nothing_yet_and_is_float32(tiny):
    ids = torch.tensor([[1, 400, 500]])
    base = load(tiny)
    before = base(ids).logits
    adapted = weights.with_adapter(base, None, Lora(rank=4))
    torch.testing.assert_close(adapted(ids).logits, before)
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}


def test_a_released_adapter_is_continued_bit_for_bit(tiny):
    adapted = weights.with_adapter(load(tiny), tiny / "adapter", Lora())
    there = torch.load(tiny / "adapter" / "adapter_model.bin", weights_only=True)
    from peft import get_peft_model_state_dict

    taken = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    assert all(torch.equal(there[name], taken[name]) for name in there)
    assert sum(p.requires_grad for p in adapted.parameters()) == len(there)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base_keeps_its_gradients_after_an_evaluation(tiny, quantization):
    """On a CPU with AVX512-BF16 one forward in eval mode would repack nf4 weights, without autograd."""
    adapted = weights.with_adapter(load(tiny, quantization), tiny / "adapter", Lora())
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


def test_an_adapter_of_other_sizes_is_refused_with_its_base(tiny, tmp_path):
    adapter = changed_adapter(tiny, tmp_path / "a", lambda state: {k: torch.zeros(9, 9) for k in state})
    with pytest.raises(SaigaError, match=r"not one of this base model.*trained on package:saiga_tiny"):
        weights.with_adapter(load(tiny), adapter, Lora())


def test_an_adapter_with_more_layers_than_the_base_is_refused(tiny, tmp_path):
    def deeper(state):
        return state | {name.replace("layers.1.", "layers.2."): value for name, value in state.items()}

    adapter = changed_adapter(tiny, tmp_path / "a", deeper)
    with pytest.raises(SaigaError, match=r"layers\.2\..*does not fit"):
        weights.with_adapter(load(tiny), adapter, Lora())


def test_an_adapter_whose_modules_the_base_lacks_is_refused(tiny, tmp_path):
    adapter = changed_adapter(tiny, tmp_path / "a", lambda state: state)
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["c_attn"]}))
    with pytest.raises(SaigaError, match="not one of this base model"):
        weights.with_adapter(load(tiny), adapter, Lora())


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {name: value[:, :5] if "lora_A" in name else value for name, value in state.items()},
        lambda state: {name: value[:5] if "lora_B" in name else value for name, value in state.items()},
        lambda state: {name.replace("layers.1.", "layers.7."): value for name, value in state.items()},
        lambda state: {name.replace("q_proj", "c_attn"): value for name, value in state.items()},
    ],
)
def test_the_adapter_of_another_base_is_known_by_its_header(tiny, tmp_path, change):
    weights.require_fitting(tiny / "adapter", tiny / "base")
    adapter = changed_adapter(tiny, tmp_path / "a", change)
    with pytest.raises(SaigaError, match=r"not one of this base model.*does not fit"):
        weights.require_fitting(adapter, tiny / "base")


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
def test_a_truncated_adapter_is_named(tiny, tmp_path, name):
    shutil.copytree(tiny / "adapter", tmp_path / "a")
    (tmp_path / "a" / "adapter_model.bin").rename(tmp_path / "a" / name)
    data = (tmp_path / "a" / name).read_bytes()
    (tmp_path / "a" / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(SaigaError, match=rf"{name} is missing or damaged"):
        weights.adapter_shapes(tmp_path / "a")


def test_a_truncated_base_is_named(tiny, tmp_path):
    shutil.copytree(tiny / "base", tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SaigaError, match="cannot be loaded"):
        weights.load_base(tmp_path / "base", "none", torch.float32, "cpu")
