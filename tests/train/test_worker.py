"""Samples, replay, folded adapters, chunked loss and the trial in a complete training."""

import json
import shutil
from importlib import resources
from pathlib import Path

import pytest
from small_trainings import losses, mean_loss, trained

from saigakit.config import TrainConfig
from saigakit.core import launch, manifest, workspace
from saigakit.data import rows, sources
from saigakit.data.conversations import spread
from saigakit.errors import SaigaError
from saigakit.prompt import encoding
from saigakit.registry import ALL_LINEAR, Lora
from saigakit.train import answers, checkpoints, curve, loading, preflight, run_state, samples, worker
from saigakit.train.steps import Plan
from saigakit.weights import find, load, memory

pytestmark = pytest.mark.usefixtures("in_this_process")


def test_stage_holds_the_answers_of_every_evaluation(records, tmp_path):
    stage = trained(records, tmp_path)
    evaluated = [entry["step"] for entry in curve.read_log(stage) if "held_out_loss" in entry]
    text = (stage / answers.FILE).read_text(encoding="utf-8")
    assert all(f"**Шаг {step}, " in text for step in evaluated)
    assert len(answers.answers_table(stage).rows) == samples.COUNT


def test_child_resolves_nothing_again(records, tmp_path, monkeypatch):
    def child(_, arguments, **__):
        resolving = [
            (find, "adapter_dir"),
            (find, "tokenizer_dir"),
            (preflight, "check_model"),
            (load, "number_format"),
        ]
        resolving += [(find, "base_dir"), (workspace, "find_input"), (sources, "records_files")]
        for module, name in resolving:
            monkeypatch.setattr(module, name, lambda *_, name=name, **__: pytest.fail(f"{name} was called again"))
        worker.main(Path(arguments[0]))

    monkeypatch.setattr(launch, "distributed", child)
    stage = trained(records, tmp_path, adapter="folded")
    assert preflight.JOB_FILE not in {file.name for file in stage.iterdir()}


@pytest.mark.slow
def test_replay_is_a_share_of_every_epoch(records, tmp_path, capsys):
    talks = [{"user": f"Какая погода в городе номер {n}?", "bot": f"Ясно, {n}."} for n in range(50)]
    lines = [json.dumps(talk, ensure_ascii=False) for talk in talks]
    for part in (0, 1):
        (tmp_path / f"general-{part}.jsonl").write_text("\n".join(lines[part::2]), encoding="utf-8")
    general = tmp_path / "general-*.jsonl"
    count = len(records.read_text(encoding="utf-8").splitlines())
    plain = trained(records, tmp_path / "plain", batch_size=4)
    stage = trained(records, tmp_path / "mixed", batch_size=4, replay_file=str(general), replay_fraction=0.2)
    assert (
        f"Each epoch mixes {round(count / 4)} replay conversations into {count} of training." in capsys.readouterr().out
    )
    steps = [sum("loss" in entry for entry in curve.read_log(made)) for made in (plain, stage)]
    assert steps == [-(-count // 4), -(-(count + round(count / 4)) // 4)]
    assert len(json.loads((stage / "saigakit.json").read_text(encoding="utf-8"))["inputs"]["replay"]) == 2


def test_folded_training_starts_like_the_released_adapter_and_gives_one_adapter(records, tmp_path, tiny):
    released = trained(records, tmp_path / "released", adapter="released")
    folded = trained(records, tmp_path / "folded", adapter="folded", lora=Lora(rank=3, alpha=6, dropout=0.0))
    assert losses(folded)[0] == pytest.approx(losses(released)[0], abs=1e-5)
    assert losses(folded)[-1] < losses(folded)[0]
    config = json.loads((folded / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["r"] == 3 + json.loads((tiny / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))["r"]
    assert sorted(config["target_modules"]) == sorted(ALL_LINEAR)
    modules = {name.split(".")[-3] for name in load.adapter_shapes(folded)}
    assert modules == set(ALL_LINEAR)
    assert "best" not in {file.name for file in folded.iterdir()}
    assert manifest.read(folded)["training"]["folded_rank"] == config["r"] - 3


@pytest.mark.slow
def test_folded_quantised_training_reports_that_its_loss_will_differ(records, tmp_path, capsys):
    trained(records, tmp_path, adapter="folded", quantization="nf4", eval_file=str(records))
    assert "merged in nf4; on the published base it differs slightly" in capsys.readouterr().out


def test_folded_training_refuses_dora(records, tmp_path):
    with pytest.raises(SaigaError, match="combines two adapters into one plain LoRA, so lora cannot have dora"):
        trained(records, tmp_path, adapter="folded", lora=Lora(rank=3, dora=True))


@pytest.mark.slow
def test_folded_adapter_has_the_measured_loss_on_the_original_base(records, tmp_path, tiny):
    """The base as 03_merge_gguf loads it."""
    import torch

    folded = trained(records, tmp_path, adapter="folded", lora=Lora(rank=3, alpha=6, dropout=0.0))
    model = load.base_model(tiny / "base", "none", torch.float32, "cpu")
    model = load.with_adapter(model, folded, Lora()).eval()
    tokenizer = encoding.load_tokenizer("saiga_tiny")
    stored = worker.rows.tokenise(worker.data.read_conversations(records), tokenizer, 512, name="records")
    chosen = [stored[row] for row in spread(range(len(stored)), run_state.MIN_EVALUATED)]
    best = min(entry["held_out_loss"] for entry in curve.read_log(folded) if "held_out_loss" in entry and entry["step"])
    assert mean_loss(model, chosen) == pytest.approx(best, rel=1e-5)


@pytest.mark.slow
def test_chunked_loss_does_not_change_training(records, tmp_path, monkeypatch):
    lora = Lora(rank=4, alpha=8, dropout=0.0)
    plain = trained(records, tmp_path / "plain", lora=lora)
    monkeypatch.setattr(memory, "LARGE_VOCABULARY", 1)
    chunked = trained(records, tmp_path / "chunked", lora=lora)
    assert losses(chunked) == pytest.approx(losses(plain), abs=1e-5)
    assert (chunked / answers.FILE).read_bytes() == (plain / answers.FILE).read_bytes()


@pytest.mark.slow
def test_trial_does_not_change_the_adapter(records, tmp_path, monkeypatch, capsys):
    tried = trained(records, tmp_path / "tried")
    assert "Trial on the largest pack (" in capsys.readouterr().out
    monkeypatch.setattr(loading, "run_trial_steps", lambda *_, **__: (1.0, None))
    untried = trained(records, tmp_path / "untried")
    assert losses(tried) == losses(untried)
    assert (tried / "adapter_model.safetensors").read_bytes() == (untried / "adapter_model.safetensors").read_bytes()


def test_finds_the_largest_pack_of_the_run():
    lengths = (10, 30, 12, 25, 9, 30)
    stored = rows.as_dataset((1, {"input_ids": [1] * length, "labels": [1] * length}) for length in lengths)
    plan = Plan(TrainConfig(model="saiga_tiny", train_file="", output_dir="", batch_size=2, max_seq_length=60), stored)
    pack, parts = loading._largest_pack(plan, lambda pack: {"all": sum(pack.documents)})
    packs = [pack for step in range(len(plan)) for packs in plan.layout(step) for pack in packs]
    assert sum(len(row["input_ids"]) for row in pack) == parts["all"]
    assert parts["all"] == max(sum(lengths[row] for row in pack) for pack in packs)


@pytest.mark.slow
def test_refuses_to_resume_a_folded_training_as_a_continued_one(records, tmp_path, monkeypatch):
    """Both start from the same files."""
    monkeypatch.setenv("SAIGAKIT_SESSION_START", str(workspace.uptime() - 11 * 3600))
    stage = trained(records, tmp_path, adapter="folded")
    monkeypatch.delenv("SAIGAKIT_SESSION_START")
    with pytest.raises(SaigaError, match=r"checkpoint of another run \(folded: "):
        trained(records, tmp_path / "other", adapter="released", resume_from=str(stage))


def test_keeps_the_checkpoints_of_a_resumed_run_when_no_time_is_left(records, tmp_path, monkeypatch):
    monkeypatch.setenv("SAIGAKIT_SESSION_START", str(workspace.uptime() - 11 * 3600))
    stage = trained(records, tmp_path)
    saved = checkpoints.directory_for(stage)
    assert not saved.exists()
    shutil.copytree(stage / checkpoints.IN_STAGE, saved / "step-00000002")
    assert trained(records, tmp_path) == stage
    assert (saved / "step-00000002").is_dir()


@pytest.mark.slow
def test_run_stopped_by_time_adds_no_evaluation(records, tmp_path, monkeypatch):
    monkeypatch.setenv("SAIGAKIT_SESSION_START", str(workspace.uptime() - 11 * 3600))
    stage = trained(records, tmp_path, early_stopping=1, eval_steps=2)
    assert [entry["step"] for entry in curve.read_log(stage) if "held_out_loss" in entry] == [0]
    training = json.loads((stage / "saigakit.json").read_text(encoding="utf-8"))["training"]
    assert (training["ended"], training["step"]) == ("max_hours", 1)


@pytest.mark.slow
def test_last_step_is_saved_before_finishing(records, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        trained(records, tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(launch, "distributed", lambda _, arguments, **__: worker.main(Path(arguments[0])))
    (saved,) = (tmp_path / "02_train.checkpoints").glob("step-*")
    stage = trained(records, tmp_path)
    assert checkpoints.step_of(saved) == max(entry["step"] for entry in curve.read_log(stage) if "loss" in entry)
    assert losses(stage) == losses(trained(records, tmp_path / "uninterrupted"))


@pytest.mark.slow
def test_refuses_max_seq_length_over_the_context_of_a_local_model(records, tmp_path, tiny):
    model = shutil.copytree(tiny / "base", tmp_path / "model")
    saiga2 = resources.files("saigakit.prompt").joinpath("templates/saiga2.jinja")
    shutil.copyfile(saiga2, model / "chat_template.jinja")
    most = json.loads((model / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
    with pytest.raises(SaigaError, match=rf"max_seq_length={most + 1} is over the context length of .*{most} tokens"):
        trained(records, tmp_path, model=str(model), max_seq_length=most + 1)
    made = trained(records, tmp_path, model=str(model), max_seq_length=most)
    assert json.loads((made / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"] == "model"
