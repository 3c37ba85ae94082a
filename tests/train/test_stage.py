"""02_train on the tiny Saiga, with real child processes and bitsandbytes."""

import json
import re
from pathlib import Path

import kill_resume
import pytest
import torch
from matrix import matrix
from safetensors import safe_open
from small_trainings import config_for, mean_loss

from saigakit import data, registry, train
from saigakit.config import TrainConfig
from saigakit.core import install, launch, manifest, workspace
from saigakit.core.files import sha256
from saigakit.core.workspace import Gpu
from saigakit.data.conversations import common_system_prompt, spread
from saigakit.errors import SaigaError
from saigakit.prompt import encoding
from saigakit.registry import Lora
from saigakit.train import checkpoints, curve, run_state, samples, stage, worker
from saigakit.weights import load

NEW = Lora(rank=4, alpha=8)


@pytest.fixture(scope="module")
def continued(records, tmp_path_factory):
    """The released adapter, continued in nf4 as on Kaggle."""
    return train.train_adapter(
        config_for(records, tmp_path_factory.mktemp("run"), adapter="released", quantization="nf4", epochs=3)
    )


def test_continues_the_released_adapter(continued, tiny):
    released = torch.load(tiny / "adapter" / "adapter_model.bin", weights_only=True)
    assert set(load.adapter_shapes(continued)) == set(released)
    config = json.loads((continued / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert manifest.require_stage(continued, "02_train", model="saiga_tiny")["inputs"]["adapter"]


def test_evaluation_loss_falls(continued):
    held_out = [entry["held_out_loss"] for entry in curve.read_log(continued) if "held_out_loss" in entry]
    assert held_out[-1] < held_out[0]
    assert len(held_out) >= 4


def test_logs_every_step(continued):
    steps = [entry["step"] for entry in curve.read_log(continued) if "loss" in entry]
    assert steps == list(range(1, len(steps) + 1))


def test_outputs_contain_no_local_paths(continued):
    texts = [file.read_text(encoding="utf-8") for file in continued.iterdir() if file.suffix in (".json", ".jsonl")]
    assert len(texts) == 4  # manifest, config, adapter config, log
    assert not any(str(continued.parent) in text for text in texts[1:] if "train_file" not in text)


def test_second_call_reuses_the_finished_stage(continued, records, capfd):
    before = manifest.hashes(continued)
    config = config_for(records, continued.parent, adapter="released", quantization="nf4", epochs=3)
    assert train.train_adapter(config) == continued
    assert "up to date" in capfd.readouterr().out
    assert manifest.hashes(continued) == before


def test_refuses_to_overwrite_a_stage_of_other_parameters(continued, records):
    with pytest.raises(SaigaError, match=r"made differently .*epochs: 3 there, 2 now"):
        train.train_adapter(config_for(records, continued.parent, adapter="released", quantization="nf4", epochs=2))


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_two_processes_have_the_losses_of_one(tmp_path, quantization):
    """With packs of 128 tokens one process has more packs, and the last step has one conversation."""
    lora = Lora(rank=4, alpha=8, dropout=0.0)
    settings = {"max_seq_length": 128, "batch_size": 7, "epochs": 1.25, "quantization": quantization, "lora": lora}
    logs = []
    for processes in (1, 2):
        config = kill_resume.config_for(tmp_path / str(processes), processes=processes, **settings)
        kill_resume.finished(config)
        log = curve.read_log(Path(config.output_dir))
        logs.append([entry.get("loss", entry.get("held_out_loss")) for entry in log])
    assert len(logs[0]) == 1 + 11 + 3
    assert logs[0] == pytest.approx(logs[1], abs=1e-6, rel=0)


def test_evaluation_loss_is_the_mean_over_trained_tokens(continued, records, tiny):
    tokenizer = encoding.load_tokenizer("saiga_tiny")
    rows = spread([encoding.encode(row["messages"], tokenizer) for row in data.read_conversations(records)],
                        run_state.MIN_EVALUATED)  # fmt: skip
    model = load.base_model(tiny / "base", "nf4", torch.float32, "cpu")
    model = load.with_adapter(model, tiny / "adapter", NEW).eval()
    assert curve.read_log(continued)[0]["held_out_loss"] == pytest.approx(mean_loss(model, rows), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("processes", matrix([1, 2], [2]))
def test_session_without_time_left_still_saves_an_adapter(records, tmp_path, monkeypatch, capfd, processes):
    monkeypatch.setenv("SAIGAKIT_SESSION_START", str(workspace.uptime() - 11 * 3600))
    made = train.train_adapter(
        config_for(records, tmp_path, adapter=None, quantization="none", epochs=5, processes=processes)
    )
    printed = capfd.readouterr().out
    assert "Time is up (max_hours=10.5): training stops and is saved at step 1 of 19" in printed
    assert "kernels" not in printed  # from a message of bitsandbytes at import
    assert load.adapter_shapes(made)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_seq_length": 8}, "no conversation has an answer within max_seq_length=8"),
        pytest.param(
            {"learning_rate": 1e30, "adapter": None, "quantization": "none", "epochs": 20},
            "smaller learning_rate",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_failure_of_a_child_is_one_message_and_leaves_no_stage(records, tmp_path, settings, message):
    with pytest.raises(SaigaError, match=message) as caught:
        train.train_adapter(config_for(records, tmp_path, **settings))
    assert "Traceback" not in str(caught.value)
    assert not (tmp_path / "02_train").exists()


def refused_before_a_child_starts(monkeypatch, config, match):
    monkeypatch.setattr(launch, "run", lambda *_, **__: pytest.fail("a child was started"))
    with pytest.raises(SaigaError, match=match):
        train.train_adapter(config)


def test_refuses_too_little_memory_and_reports_both_numbers(records, tmp_path, monkeypatch):
    monkeypatch.setattr(workspace, "available_memory", lambda: 5_000_000)
    refused_before_a_child_starts(
        monkeypatch, config_for(records, tmp_path), r"needs about 0\.0 GB of memory, and 0\.0 GB are free"
    )


def test_refuses_a_small_gpu_and_reports_both_numbers(records, tmp_path, monkeypatch):
    monkeypatch.setattr(install, "require_cuda", lambda _: None)
    monkeypatch.setattr(workspace, "gpus", lambda: [Gpu("Tesla T4", (7, 5), 16 * 10**9, 1_000_000)])
    refused_before_a_child_starts(monkeypatch, config_for(records, tmp_path), r"on Tesla T4, .*of 16\.0 GB are free")


def test_refuses_gemma_on_a_t4_before_downloading(records, tmp_path, monkeypatch):
    monkeypatch.setattr(workspace, "gpus", lambda: [Gpu("Tesla T4", (7, 5), 16 * 10**9, 15 * 10**9)])
    config = config_for(records, tmp_path, model="saiga_gemma3_12b")
    refused_before_a_child_starts(monkeypatch, config, "overflow float16")


def formatted(records, directory, **facts):
    directory.mkdir()
    identity = {"stage": "01_format", "parameters": {"model": "saiga_tiny"}, "inputs": {}}
    with manifest.making(directory / "01_format", **identity, facts=facts) as made:
        data.write_conversations(data.read_conversations(records), made / "train.jsonl")
    return directory / "01_format" / "train.jsonl"


def test_reads_the_system_prompt_from_the_manifest_of_01_format(records, tmp_path, monkeypatch):
    file = formatted(records, tmp_path / "run", system_prompt="noted")
    monkeypatch.setattr(data, "read_conversations", lambda _: pytest.fail("the training file was read"))
    assert stage._system_prompt(file, manifest.hashes(file)) == "noted"


def test_reads_the_system_prompt_from_records_if_no_manifest_describes_them(records, tmp_path):
    older = formatted(records, tmp_path / "older")
    edited = formatted(records, tmp_path / "edited", system_prompt="noted")
    edited.write_bytes(edited.read_bytes() * 2)
    beside = formatted(records, tmp_path / "beside", system_prompt="noted").with_name("mine.jsonl")
    beside.write_bytes(older.read_bytes())
    of_records = common_system_prompt(data.read_conversations(records))
    for file in (Path(records), older, edited, beside):
        assert stage._system_prompt(file, manifest.hashes(file)) == of_records != "noted"


def test_refuses_records_formatted_for_another_model(records, tmp_path, monkeypatch):
    with manifest.making(
        tmp_path / "01_format", stage="01_format", parameters={"model": "saiga2_7b"}, inputs={}
    ) as made:
        (made / "train.jsonl").write_bytes(records.read_bytes())
    config = TrainConfig(model="saiga_tiny", train_file="01_format/train.jsonl", output_dir=str(tmp_path / "02_train"))
    refused_before_a_child_starts(monkeypatch, config, "made for model='saiga2_7b', but this run has .*saiga_tiny")


def test_names_a_missing_stage(tmp_path, monkeypatch):
    config = TrainConfig(model="saiga_tiny", train_file="01_format/train.jsonl", output_dir=str(tmp_path / "02_train"))
    refused_before_a_child_starts(monkeypatch, config, r"01_format/train\.jsonl.*is not there")


def in_this_process(monkeypatch, on_evaluation=None):
    """Run the child in this process, with `on_evaluation` instead of samples."""
    monkeypatch.setattr(launch, "distributed", lambda _, arguments, **__: worker.main(Path(arguments[0])))
    if on_evaluation is not None:
        monkeypatch.setattr(samples.Samples, "write", lambda _, *about: on_evaluation(*about))


@pytest.fixture
def seen(monkeypatch):
    """Evaluation loss and a trained matrix by step, from the evaluation hook."""
    found = {}

    def hook(step, loss, model):
        torch.rand(7)  # which changes nothing
        found[step] = (loss, next(p for n, p in model.named_parameters() if MATRIX in n).detach().clone())

    in_this_process(monkeypatch, hook)
    return found


MATRIX = "layers.0.self_attn.q_proj.lora_B"
# The first step of a warmup has a learning rate of 0, so that the second is worse.
WORSENS = {
    "adapter": None,
    "quantization": "none",
    "learning_rate": 30.0,
    "epochs": 2,
    "batch_size": 5,
    "eval_steps": 1,
}


def test_stage_holds_the_adapter_with_the_best_evaluation_loss(seen, records, tmp_path, capfd):
    made = train.train_adapter(config_for(records, tmp_path, early_stopping=1, **WORSENS))
    losses = {step: loss for step, (loss, _) in seen.items()}
    assert losses == {e["step"]: e["held_out_loss"] for e in curve.read_log(made) if "held_out_loss" in e}
    assert min(losses) == 0
    best = min((loss, step) for step, loss in losses.items() if step > 0)[1]
    assert best < max(losses)
    with safe_open(made / "adapter_model.safetensors", "pt") as file:
        kept = next(file.get_tensor(name) for name in file.keys() if MATRIX in name)  # noqa: SIM118
    assert torch.equal(kept, seen[best][1])
    assert not torch.equal(kept, seen[max(losses)][1])
    assert manifest.read(made)["training"]["best_step"] == best == curve.find_best(curve.read_log(made)).step
    assert f"Saved the adapter of step {best}, which has the best evaluation loss" in capfd.readouterr().out


def test_stops_early_if_the_evaluation_loss_does_not_improve(seen, records, tmp_path, capfd):
    made = train.train_adapter(config_for(records, tmp_path, early_stopping=1, **WORSENS))
    training = manifest.read(made)["training"]
    assert (training["ended"], training["step"]) == ("early_stopping", training["best_step"] + 1)
    assert f"no better evaluation loss since step {training['best_step']} (early_stopping=1" in capfd.readouterr().out
    assert not (made / "checkpoint").exists()
    train.train_adapter(config_for(records, tmp_path, early_stopping=1, **WORSENS))
    assert "up to date" in capfd.readouterr().out


@pytest.mark.slow
def test_evaluation_hook_does_not_change_the_losses(seen, records, tmp_path, monkeypatch):
    """With dropout, which draws from the same random numbers."""
    settings = {"adapter": None, "quantization": "none", "lora": Lora(rank=4, alpha=8, dropout=0.2), "eval_steps": 1}
    with_hook = train.train_adapter(config_for(records, tmp_path / "with", **settings))
    in_this_process(monkeypatch)
    without = train.train_adapter(config_for(records, tmp_path / "without", **settings))
    assert seen
    assert sha256(with_hook / "adapter_model.safetensors") == sha256(without / "adapter_model.safetensors")


def test_diverging_loss_names_step_conversations_and_checkpoint(records, tmp_path, monkeypatch):
    in_this_process(monkeypatch)
    broken = {**WORSENS, "learning_rate": 1e30, "batch_size": 3, "eval_steps": 100}
    said = (
        r"at step (\d+), which trains on conversations \d+, \d+, \d+ of records\.jsonl; "
        r"the checkpoint of step (\d+) is intact"
    )
    with pytest.raises(SaigaError, match=said) as caught:
        train.train_adapter(config_for(records, tmp_path, save_steps=1, **broken))
    step, saved = (int(number) for number in re.search(said, str(caught.value)).groups())
    assert saved == step - 1 and "Use a smaller learning_rate" in str(caught.value)
    store = checkpoints.directory_for(tmp_path / "02_train")
    assert checkpoints.find_problem(store / f"step-{saved:08d}") is None
    with safe_open(store / f"step-{saved:08d}" / "state" / "adapter_model.safetensors", "pt") as file:
        assert all(file.get_tensor(name).isfinite().all() for name in file.keys())  # noqa: SIM118


@pytest.mark.slow
def test_diverging_evaluation_loss_ends_training(records, tmp_path, monkeypatch):
    in_this_process(monkeypatch)
    broken = {**WORSENS, "learning_rate": 1e30}
    with pytest.raises(
        SaigaError, match=r"The evaluation loss is nan after step \d+, which trains on conversations \d+, .*no check"
    ):
        train.train_adapter(config_for(records, tmp_path, **broken))


@pytest.mark.slow
def test_neftune_changes_training_and_not_evaluation(records, tmp_path, monkeypatch):
    in_this_process(monkeypatch)
    logs = []
    for alpha in (None, 5.0):
        settings = {"adapter": None, "quantization": "none", "neftune_alpha": alpha}
        logs.append(curve.read_log(train.train_adapter(config_for(records, tmp_path / str(alpha), **settings))))
    assert logs[0][0] == logs[1][0]
    assert logs[0][1]["loss"] != logs[1][1]["loss"]


def test_every_model_of_the_registry_has_a_valid_config():
    for name in registry.MODELS:
        assert (
            TrainConfig(model=name, train_file="x", output_dir="y").sequence_budget
            <= registry.find(name).context_length
        )
