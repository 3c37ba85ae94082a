"""The trial before training."""

import contextlib
import resource
from pathlib import Path

import pytest
import torch

from saigakit.errors import SaigaError
from saigakit.registry import Lora
from saigakit.train import layers, loading
from saigakit.train.steps import collate
from saigakit.weights import load

ESTIMATED = {"weights": 3_900_000_000, "logits": 200_000_000}


@pytest.fixture
def model(tiny):
    base = load.base_model(tiny / "base", "nf4", torch.float32, "cpu")
    layers.use_packed_attention(base)
    torch.manual_seed(3)
    return load.with_adapter(base, None, Lora(rank=4, dropout=0.3))


def pack(tokens=60):
    return collate([{"input_ids": [5 + i % 90 for i in range(tokens)], "labels": [-100] * (tokens - 9) + [9] * 9}])


def trained(model, steps=3):
    """Losses of a training with dropout, and the adapter after it."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(**pack(), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, [p.detach().clone() for p in parameters]


def run_trial(model, tokens=60, **settings):
    return loading.run_trial_steps(
        model, pack(tokens), estimated=ESTIMATED, autocast=contextlib.nullcontext, **settings
    )


def test_trial_leaves_training_bit_identical(model, tiny):
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    torch.manual_seed(5)
    losses, weights_without = trained(model)
    for name, parameter in model.named_parameters():
        if name in start:
            parameter.data.copy_(start[name])
    torch.manual_seed(5)
    run_trial(model)
    losses_after, weights_after = trained(model)
    assert losses_after == losses
    assert all(torch.equal(a, b) for a, b in zip(weights_after, weights_without, strict=True))
    assert losses[0] != losses[1]


@pytest.mark.parametrize("training", [True, False])
def test_trial_restores_mode_weights_random_numbers_and_gradients(model, training):
    model.train(training)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    run_trial(model)
    assert model.training is training
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_trial_measures_seconds_per_token_and_no_peak_on_cpu(model, monkeypatch):
    seconds = iter([0.0, 1.0, 10.0, 13.0, 20.0, 22.0])  # steps of 1, 3 and 2 s
    monkeypatch.setattr(loading.time, "perf_counter", lambda: next(seconds))
    assert run_trial(model) == (2.0 / 60, None)


def test_trial_uses_autocast_and_scaler(model):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    seen = []
    parameter = next(p for name, p in model.named_parameters() if "lora_B" in name)
    parameter.register_hook(lambda gradient: seen.append(gradient.abs().max().item()))
    run_trial(model)
    run_trial(model, scaler=scaler)
    assert len(seen) == 6
    assert seen[3] == pytest.approx(1024 * seen[0], rel=1e-3)
    loading.run_trial_steps(model, pack(), estimated=ESTIMATED, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    assert seen[6] != seen[0]


def test_trial_refuses_a_model_with_gradients(model):
    trained(model, steps=1)
    model(**pack(), use_cache=False).loss.backward()
    with pytest.raises(ValueError, match="has gradients"):
        run_trial(model)


@contextlib.contextmanager
def memory_left(size):
    """Let this process allocate at most `size` bytes more."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_out_of_memory_reports_the_estimate_and_the_remedy(model):
    message = r"largest pack, 9000 tokens.*4\.1 GB \(weights 3\.9 GB, logits 0\.2 GB\).*max_seq_length below 9000"
    state = torch.get_rng_state()
    with memory_left(300 << 20), pytest.raises(SaigaError, match=message) as caught:  # probabilities: 324 MB a head
        run_trial(model, tokens=9000)
    assert "DefaultCPUAllocator" in str(caught.value)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_trial_passes_on_other_errors(model):
    with pytest.raises(ValueError, match="one row of complete documents"):
        loading.run_trial_steps(
            model,
            {"input_ids": torch.ones(2, 5, dtype=torch.long), "labels": torch.ones(2, 5, dtype=torch.long)},
            estimated=ESTIMATED,
            autocast=contextlib.nullcontext,
        )
