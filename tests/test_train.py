"""02_train on the tiny Saiga: real child processes, real bitsandbytes; what it writes, keeps and refuses."""

import json
import time

import pytest
import torch

from saigakit import curve, data, launch, manifest, models, packing, tokenization, train, weights, workspace
from saigakit.config import TrainConfig
from saigakit.errors import SaigaError
from saigakit.models import Lora
from saigakit.rows import Rows
from saigakit.trainer import Plan
from saigakit.workspace import Gpu

NEW = Lora(rank=4, alpha=8)


@pytest.fixture(scope="module")
def records(tiny):
    return tiny / "records.jsonl"


def config_for(records, directory, **settings):
    files = {"train_file": str(records), "eval_file": str(records), "output_dir": str(directory / "02_train")}
    return TrainConfig(**({"model": "saiga_tiny", "epochs": 1} | files | settings))


@pytest.fixture(scope="module")
def continued(records, tmp_path_factory):
    """The released adapter trained on in nf4, as on Kaggle."""
    return train.train_adapter(config_for(records, tmp_path_factory.mktemp("run"), quantization="nf4", epochs=3))


def test_the_released_adapter_is_continued(continued, tiny):
    released = torch.load(tiny / "adapter" / "adapter_model.bin", weights_only=True)
    assert set(weights.adapter_shapes(continued)) == set(released)
    config = json.loads((continued / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert manifest.require_stage(continued, "02_train", model="saiga_tiny")["inputs"]["adapter"]


def test_it_learns(continued):
    held_out = [entry["held_out_loss"] for entry in curve.read(continued) if "held_out_loss" in entry]
    assert held_out[-1] < held_out[0]
    assert len(held_out) >= 4


def test_every_step_is_in_the_log(continued):
    steps = [entry["step"] for entry in curve.read(continued) if "loss" in entry]
    assert steps == list(range(1, len(steps) + 1))


def test_nothing_that_it_writes_names_a_place_on_this_machine(continued):
    texts = [file.read_text(encoding="utf-8") for file in continued.iterdir() if file.suffix in (".json", ".jsonl")]
    assert len(texts) == 4  # manifest, config, adapter config, log
    assert not any(str(continued.parent) in text for text in texts[1:] if "train_file" not in text)


def test_a_second_call_keeps_what_is_finished(continued, records, capfd):
    before = manifest.hashes(continued)
    config = config_for(records, continued.parent, quantization="nf4", epochs=3)
    assert train.train_adapter(config) == continued
    assert "kept" in capfd.readouterr().out
    assert manifest.hashes(continued) == before


def test_other_parameters_do_not_overwrite_it(continued, records):
    with pytest.raises(SaigaError, match=r"made differently .*epochs: 3 there, 2 now"):
        train.train_adapter(config_for(records, continued.parent, quantization="nf4", epochs=2))


def test_two_processes_learn_what_one_learns(records, tmp_path):
    lora = Lora(rank=4, alpha=8, dropout=0.0)
    # 17 packs of 256 tokens, 4 a step by 1 or 2 processes; the last step, of one pack, cannot be shared.
    settings = {"max_seq_length": 256, "batch_size": 14, "adapter": None, "lora": lora, "quantization": "none"}
    logs = []
    for processes in (1, 2):
        config = config_for(records, tmp_path / str(processes), processes=processes, **settings)
        log = curve.read(train.train_adapter(config))
        logs.append([entry.get("loss", entry.get("held_out_loss")) for entry in log if entry["step"] <= 4])
    assert len(logs[0]) == 7
    assert logs[0] == pytest.approx(logs[1], abs=1e-4)


def test_the_held_out_loss_is_the_mean_over_learned_tokens(continued, records, tiny):
    tokenizer = tokenization.load_tokenizer("saiga_tiny")
    rows = data.spread([tokenization.encode(row["messages"], tokenizer) for row in data.read_conversations(records)],
                        train.EVALUATED)  # fmt: skip
    model = weights.load_base(tiny / "base", "nf4", torch.float32, "cpu")
    model = weights.with_adapter(model, tiny / "adapter", NEW).eval()
    total = count = 0
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        count += int((labels != tokenization.IGNORE_INDEX).sum())
    assert curve.read(continued)[0]["held_out_loss"] == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_session_that_has_no_time_left_still_gives_an_adapter(records, tmp_path, monkeypatch, capfd, processes):
    monkeypatch.setenv("SAIGAKIT_SESSION_START", str(time.time() - 11 * 3600))
    made = train.train_adapter(
        config_for(records, tmp_path, adapter=None, quantization="none", epochs=5, processes=processes)
    )
    assert "max_hours=10.5 are over: training ends at step 1" in capfd.readouterr().out
    assert weights.adapter_shapes(made)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_seq_length": 8}, "no conversation has an answer within max_seq_length=8"),
        ({"learning_rate": 1e30, "adapter": None, "quantization": "none", "epochs": 20}, "smaller learning_rate"),
    ],
)
def test_a_childs_failure_is_one_sentence_and_leaves_no_stage(records, tmp_path, settings, message):
    with pytest.raises(SaigaError, match=message) as caught:
        train.train_adapter(config_for(records, tmp_path, **settings))
    assert "Traceback" not in str(caught.value)
    assert not (tmp_path / "02_train").exists()


def refused_before_a_child_starts(monkeypatch, config, match):
    monkeypatch.setattr(launch, "run", lambda *_, **__: pytest.fail("a child was started"))
    with pytest.raises(SaigaError, match=match):
        train.train_adapter(config)


def test_too_little_memory_is_told_with_both_numbers(records, tmp_path, monkeypatch):
    monkeypatch.setattr(workspace, "available_memory", lambda: 5_000_000)
    refused_before_a_child_starts(
        monkeypatch, config_for(records, tmp_path), r"needs about 0\.0 GB of memory, and 0\.0 GB are free"
    )


def test_a_gpu_that_is_too_small_is_told_with_both_numbers(records, tmp_path, monkeypatch):
    monkeypatch.setattr(workspace, "gpus", lambda: [Gpu("Tesla T4", (7, 5), 16 * 10**9, 1_000_000)])
    refused_before_a_child_starts(monkeypatch, config_for(records, tmp_path), r"on Tesla T4 .*of its 16\.0 GB are free")


def test_gemma_on_a_t4_is_refused_before_anything_is_fetched(records, tmp_path, monkeypatch):
    monkeypatch.setattr(workspace, "gpus", lambda: [Gpu("Tesla T4", (7, 5), 16 * 10**9, 15 * 10**9)])
    config = config_for(records, tmp_path, model="saiga_gemma3_12b")
    refused_before_a_child_starts(monkeypatch, config, "overflow float16")


def test_records_that_were_formatted_for_another_model_are_refused(records, tmp_path, monkeypatch):
    with manifest.making(
        tmp_path / "01_format", stage="01_format", parameters={"model": "saiga2_7b"}, inputs={}
    ) as made:
        (made / "train.jsonl").write_bytes(records.read_bytes())
    config = TrainConfig(model="saiga_tiny", train_file="01_format/train.jsonl", output_dir=str(tmp_path / "02_train"))
    refused_before_a_child_starts(monkeypatch, config, "made for model='saiga2_7b', and this run is of .*saiga_tiny")


def test_a_stage_that_was_not_run_is_named(tmp_path, monkeypatch):
    config = TrainConfig(model="saiga_tiny", train_file="01_format/train.jsonl", output_dir=str(tmp_path / "02_train"))
    refused_before_a_child_starts(monkeypatch, config, r"01_format/train\.jsonl.*is not there")


def stored(texts):
    """Rows of these ids, all learned."""
    made = Rows()
    for ids in texts:
        made.append({"input_ids": ids, "labels": ids})
    return made


def test_the_plan_shows_each_conversation_once_an_epoch_in_steps_of_about_the_batch():
    rows = stored([index] * (20 + index % 30) for index in range(200))
    config = TrainConfig(model="saiga_tiny", train_file="", output_dir="", epochs=2, batch_size=16, max_seq_length=100)
    plan = Plan(config, rows, processes=1)
    shown = [row["input_ids"][0] for pack in plan.packs for row in pack]
    assert sorted(shown[:200]) == list(range(200)) and sorted(shown[200:]) == list(range(200))
    assert all(sum(len(row["input_ids"]) for row in pack) <= 100 for pack in plan.packs)
    assert plan.accumulation == round(16 / (400 / len(plan.packs)))
    assert sum(plan.tokens) == 2 * sum(len(row["input_ids"]) for row in rows)
    assert len(plan.tokens) == plan.steps


def test_half_an_epoch_is_about_half_of_the_packs():
    whole, half = (packing.schedule([50] * 100, budget=100, most=9, epochs=epochs, seed=1) for epochs in (1, 0.5))
    assert (len(whole), len(half)) == (50, 25)


def test_a_batch_of_few_conversations_is_not_exceeded_by_a_pack_that_has_room_for_more():
    rows = stored([1] * 10 for _ in range(60))
    config = TrainConfig(model="saiga_tiny", train_file="", output_dir="", epochs=1, batch_size=4)
    for processes in (1, 2):
        plan = Plan(config, rows, processes=processes)
        assert max(map(len, plan.packs)) * plan.accumulation * processes == 4
        assert plan.steps in (15, 16)


def test_every_model_of_the_registry_has_a_config():
    for name in models.MODELS:
        assert (
            TrainConfig(model=name, train_file="x", output_dir="y").sequence_budget <= models.find(name).context_length
        )
