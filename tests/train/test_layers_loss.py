"""The loss in chunks, without full logits."""

import subprocess
import sys

import pytest
import torch
from small_models import base
from torch.utils._python_dispatch import TorchDispatchMode

from saigakit.errors import SaigaError
from saigakit.registry import Lora
from saigakit.train import layers, steps
from saigakit.weights import load

VOCABULARY = 768
NO_DROPOUT = Lora(dropout=0.0)
WEIGHT = (64, VOCABULARY)  # of the head, transposed
CHUNK = 10 * VOCABULARY  # logits: the pack's 24 learned positions make three chunks


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(layers, "CHUNK_LOGITS", CHUNK)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def directory(request, tiny, tmp_path_factory):
    return base(tmp_path_factory.mktemp("base") / "base", tiny / "base", tie_word_embeddings=request.param)


def pack():
    rows = [
        {"input_ids": [5 + 7 * n + i for i in range(n)], "labels": [-100] * (n - 8) + [9] * 8} for n in (20, 30, 11)
    ]
    return steps.collate(rows)


def loaded(directory, *, quantization="none", checkpointing=False, lora=NO_DROPOUT):
    model = load.base_model(directory, quantization, torch.float32, "cpu")
    model.config.use_cache = False
    layers.use_packed_attention(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    torch.manual_seed(3)
    adapted = load.with_adapter(model, None, lora)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.1)
    return adapted.train()


def loss_and_gradients(model, batch, **settings):
    model.zero_grad()
    loss = model(**batch, use_cache=False, **settings).loss
    loss.backward()
    return loss.detach().double(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("settings", [{}, {"num_items_in_batch": 5}, {"num_items_in_batch": torch.tensor(48)}])
@pytest.mark.parametrize(("quantization", "checkpointing"), [("none", False), ("nf4", True)])
def test_chunked_loss_and_gradients_equal_those_of_the_plain_head(directory, quantization, checkpointing, settings):
    model = loaded(directory, quantization=quantization, checkpointing=checkpointing)
    loss, gradients = loss_and_gradients(model, pack(), **settings)
    assert layers.use_chunked_loss(model)
    in_chunks, their_gradients = loss_and_gradients(model, pack(), **settings)
    torch.testing.assert_close(in_chunks, loss, rtol=1e-6, atol=0)
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert (their_gradients[name] - gradient).abs().max() <= 1e-6 * largest, name


@pytest.mark.parametrize("settings", [{}, {"num_items_in_batch": 5}, {"num_items_in_batch": torch.tensor(48)}])
def test_exact_loss_equals_the_plain_loss(directory, settings):
    model = loaded(directory)
    loss, gradients = loss_and_gradients(model, pack(), **settings)
    model.get_base_model().loss_function = layers.exact_loss
    exact, their_gradients = loss_and_gradients(model, pack(), **settings)
    torch.testing.assert_close(exact, loss, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(their_gradients[name], gradient, rtol=1e-5, atol=1e-6)
    assert model(**pack(), use_cache=False, **settings).loss.dtype == torch.float64


def test_chunked_loss_shifts_labels_and_skips_untrained_positions(directory):
    model = loaded(directory)
    batch = {name: value for name, value in pack().items() if name in ("input_ids", "position_ids", "labels")}
    loss, _ = loss_and_gradients(model, batch)
    assert layers.use_chunked_loss(model)
    torch.testing.assert_close(loss_and_gradients(model, batch)[0], loss, rtol=1e-6, atol=0)


class Largest(TorchDispatchMode):
    """Records the largest number of logits in one tensor, forward and backward."""

    logits = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (VOCABULARY,) and tensor.shape != WEIGHT:
                self.logits = max(self.logits, tensor.numel())
        return made


@pytest.mark.parametrize("in_chunks", [False, True])
def test_chunked_loss_never_holds_all_logits(directory, in_chunks):
    model = loaded(directory)
    if in_chunks:
        assert layers.use_chunked_loss(model)
    with Largest() as seen:
        loss_and_gradients(model, pack())
    assert seen.logits == (CHUNK if in_chunks else 24 * VOCABULARY)


def test_chunked_loss_does_not_change_generation(directory):
    model = loaded(directory).eval()
    ids = torch.tensor([[1, 400, 500]])
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        logits = model(ids).logits
        answer = model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=True)
        assert layers.use_chunked_loss(model.train())
        model.eval()
        assert torch.equal(model(ids).logits, logits)
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=True), answer)


def test_evaluation_loss_can_be_computed_in_chunks(directory):
    model = loaded(directory).eval()
    with torch.no_grad():
        loss = model(**pack(), num_items_in_batch=1).loss
        assert layers.use_chunked_loss(model)
        torch.testing.assert_close(model(**pack(), num_items_in_batch=1).loss.float(), loss)
        with layers.chunked_loss_in_eval(model), Largest() as seen:
            torch.testing.assert_close(model(**pack(), num_items_in_batch=1).loss.float(), loss)
    assert seen.logits == CHUNK


def test_chunked_loss_in_eval_ignores_a_plain_head(directory):
    model = loaded(directory).eval()
    with layers.chunked_loss_in_eval(model):
        assert model(**pack()).logits.shape == (1, 24, VOCABULARY)


def test_chunked_loss_does_not_change_saved_names(directory, tmp_path):
    model = loaded(directory)
    model.save_pretrained(tmp_path / "plain", save_embedding_layers=False)
    assert layers.use_chunked_loss(model)
    model.save_pretrained(tmp_path / "chunks", save_embedding_layers=False)
    assert load.adapter_shapes(tmp_path / "chunks") == load.adapter_shapes(tmp_path / "plain")


def test_refuses_a_trained_head(tiny):
    model = loaded(tiny / "base", lora=Lora(modules_to_save=("lm_head",)))
    with pytest.raises(SaigaError, match="while lm_head is trained"):
        layers.use_chunked_loss(model)


def test_keeps_the_plain_head_of_a_model_that_caps_its_logits(tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    config = Gemma2Config(vocab_size=96, **sizes, num_key_value_heads=2, initializer_range=0.5)
    config.final_logit_softcapping = 5.0
    model = Gemma2ForCausalLM(config)
    model.requires_grad_(requires_grad=False)
    ids = torch.arange(9)[None]
    before = model(ids, labels=ids).loss
    assert not layers.use_chunked_loss(model)
    assert torch.equal(model.train()(ids, labels=ids).loss, before)


TWO_PROCESSES = """
import os, sys
from pathlib import Path
import torch
from torch.nn.parallel import DistributedDataParallel
sys.path[:0] = [sys.argv[1], f"{sys.argv[1]}/../support"]
import test_layers_loss
from saigakit.train import layers
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
layers.CHUNK_LOGITS = test_layers_loss.CHUNK
batch = test_layers_loss.pack()
batch["input_ids"] = batch["input_ids"] + rank
found = []
for in_chunks in (False, True):
    model = test_layers_loss.loaded(Path(sys.argv[2]), quantization="nf4", checkpointing=True)
    assert not in_chunks or layers.use_chunked_loss(model)
    found.append(test_layers_loss.loss_and_gradients(DistributedDataParallel(model), batch))
(loss, gradients), (in_chunks, theirs) = found
largest = max(gradient.abs().max() for gradient in gradients.values())
assert largest > 0
assert abs(loss - in_chunks) <= 1e-6 * loss
assert all((theirs[name] - gradient).abs().max() <= 1e-6 * largest for name, gradient in gradients.items())
Path(sys.argv[3]).with_suffix(f".{rank}").write_text(str(gradients["module.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"].sum().item()))
"""


@pytest.mark.slow
def test_chunked_gradients_of_two_processes_equal_those_of_the_plain_head(tiny, tmp_path):
    script, result = tmp_path / "script.py", tmp_path / "sum"
    script.write_text(TWO_PROCESSES, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    directory = base(tmp_path / "base", tiny / "base")
    done = subprocess.run(
        [*command, str(__file__).rpartition("/")[0], directory, result], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    sums = [result.with_suffix(f".{rank}").read_text() for rank in (0, 1)]
    assert sums[0] == sums[1]  # averaged over both
