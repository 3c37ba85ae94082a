"""bf16 matrix products, which make training faster on some CPUs, in forward and backward passes alone."""

import hashlib

import pytest
import torch
from bf16_products import Bf16Products
from safetensors.torch import load_file
from small_trainings import losses, trained

from saigakit.core import workspace
from saigakit.errors import SaigaError
from saigakit.registry import Lora
from saigakit.train import loading, trainer
from saigakit.weights import fold, load
from saigakit.weights.adapter import Adapter

pytestmark = pytest.mark.usefixtures("in_this_process")


FOLDED = {"adapter": "folded", "lora": Lora(rank=3, alpha=6, dropout=0.0)}


def in_bf16(monkeypatch, records, directory):
    """Train as on a CPU with fast bf16 products, and count those products."""
    monkeypatch.setenv("SAIGAKIT_CPU_MATMUL", "bf16")
    with Bf16Products() as products:
        return trained(records, directory, **FOLDED), products.rounded


def digest(model):
    parts = (tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in model.state_dict().values())
    return hashlib.sha256(b"".join(parts)).hexdigest()


@pytest.mark.slow
def test_bf16_products_do_not_change_the_folded_base(records, tmp_path, monkeypatch):
    bases, plain = [], loading._load_base
    monkeypatch.setattr(loading, "_load_base", lambda *given: bases.append(digest(base := plain(*given))) or base)
    trained(records, tmp_path / "float32", **FOLDED)
    _, rounded = in_bf16(monkeypatch, records, tmp_path / "bf16")
    assert rounded > 0
    assert bases[0] == bases[1]


@pytest.mark.slow
def test_bf16_products_do_not_change_the_combined_adapter(records, tmp_path, tiny, monkeypatch):
    kept, combine = {}, fold.combine

    def keeping(released, new, out):
        kept.update(load_file(new / "adapter_model.safetensors"))
        return combine(released, new, out)

    monkeypatch.setattr(fold, "combine", keeping)
    stage, _ = in_bf16(monkeypatch, records, tmp_path)
    both = load_file(stage / "adapter_model.safetensors")
    rank = Adapter.open(tiny / "adapter").rank
    for name, matrix in kept.items():
        joined, scale = (both[name][rank:], 1) if "lora_A" in name else (both[name][:, rank:], 2)
        assert torch.equal(joined, scale * matrix), name


@pytest.mark.slow
def test_only_forward_and_backward_use_the_fast_precision(records, tmp_path, monkeypatch):
    seen = []

    def noting(what, function):
        return lambda *args, **kwargs: (
            seen.append((what, torch.get_float32_matmul_precision())) or function(*args, **kwargs)
        )

    monkeypatch.setattr(fold, "fold_adapter", noting("fold", fold.fold_adapter))
    monkeypatch.setattr(fold, "combine", noting("join", fold.combine))
    monkeypatch.setattr(trainer, "save_adapter", noting("save", trainer.save_adapter))
    monkeypatch.setattr(torch.optim.AdamW, "step", noting("update", torch.optim.AdamW.step))
    in_bf16(monkeypatch, records, tmp_path)
    assert {what for what, _ in seen} == {"fold", "join", "save", "update"}
    assert {precision for _, precision in seen} == {"highest"}
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.slow
def test_losses_with_bf16_products_are_close_to_float32(records, tmp_path, monkeypatch):
    """Each loss is within 2 %, the last one within 1 %: operands have eight bits and sums are in float32."""
    exact = losses(trained(records, tmp_path / "float32", **FOLDED))
    stage, rounded = in_bf16(monkeypatch, records, tmp_path / "bf16")
    assert rounded > 0
    assert losses(stage) == pytest.approx(exact, rel=0.02)
    assert losses(stage)[-1] == pytest.approx(exact[-1], rel=0.01)
    assert losses(stage) != exact


def test_products_are_exact_unless_bf16_was_measured_faster(monkeypatch):
    monkeypatch.delenv("SAIGAKIT_CPU_MATMUL")
    monkeypatch.setattr(workspace, "cpu_has_bf16", lambda: True)
    for speedup, precision in ((0.5, "highest"), (1.1, "highest"), (2.0, "medium")):
        monkeypatch.setattr(load, "_bf16_speedup", lambda speedup=speedup: speedup)
        with load.fast_matmul():
            assert torch.get_float32_matmul_precision() == precision


def test_speed_measurement_returns_a_ratio_and_restores_the_precision(monkeypatch):
    monkeypatch.delenv("SAIGAKIT_CPU_MATMUL")
    torch.set_float32_matmul_precision("high")
    try:
        load._bf16_speedup.cache_clear()
        assert 0.01 < load._bf16_speedup() < 100
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_failed_step_restores_float32(monkeypatch):
    monkeypatch.setenv("SAIGAKIT_CPU_MATMUL", "bf16")
    with pytest.raises(RuntimeError, match="no memory"), load.fast_matmul():
        raise RuntimeError("no memory")
    assert torch.get_float32_matmul_precision() == "highest"


def test_refuses_an_unknown_product_format(monkeypatch):
    monkeypatch.setenv("SAIGAKIT_CPU_MATMUL", "fast")
    with pytest.raises(SaigaError, match="SAIGAKIT_CPU_MATMUL='fast': use float32 or bf16"):
        load.bf16_is_faster()
