"""Sharding a base over processes. Without GPUs here, two CPU processes pretend to be two XPUs."""

import os
import sys

import pytest
from small_trainings import config_for

from saigakit import train
from saigakit.config import TrainConfig
from saigakit.core import launch, workspace
from saigakit.core.workspace import Gpu
from saigakit.data import rows
from saigakit.errors import SaigaError
from saigakit.registry import Lora
from saigakit.train import curve, distributed, preflight
from saigakit.train.steps import Plan

CHILD = """
import sys
from pathlib import Path

import accelerate.state
from accelerate.utils import DistributedType

made = accelerate.state.PartialState.__init__


def init(self, *arguments, **options):
    made(self, *arguments, **options)
    if self.__dict__.get("distributed_type") == DistributedType.MULTI_CPU:
        self._shared_state["distributed_type"] = DistributedType.MULTI_XPU


accelerate.state.PartialState.__init__ = init
from saigakit.train import worker; from saigakit.core import launch

with launch.child():
    worker.main(Path(sys.argv[1]))
    import torch

    sharded = DistributedType.FSDP in accelerate.state.PartialState._shared_state.values()
    sys.stdout.write(f"weights sharded: {sharded}\\n")  # one write, for two processes share the pipe
"""


def losses(stage):
    return [entry.get("loss", entry.get("held_out_loss")) for entry in curve.read_log(stage)]


@pytest.mark.slow
def test_two_sharded_processes_train_and_resume_like_one(tiny, tmp_path, monkeypatch, capfd):
    """nf4 and packs of 128 tokens: one process has more packs, and the last step has one conversation."""
    records = tiny / "records.jsonl"
    settings = {"quantization": "nf4", "adapter": None, "lora": Lora(rank=4, alpha=8, dropout=0.0), "batch_size": 7}
    settings |= {"max_seq_length": 128}
    alone = train.train_adapter(config_for(records, tmp_path / "alone", **settings))
    (tmp_path / "sharded_child.py").write_text(CHILD, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    distributed = launch.distributed
    monkeypatch.setattr(launch, "distributed", lambda _, *given, **named: distributed("sharded_child", *given, **named))
    monkeypatch.setattr(preflight, "check_sharding", lambda *_: None)  # which asks for GPUs
    together = config_for(records, tmp_path / "together", processes=2, sharding="fsdp", **settings)
    monkeypatch.setenv("SAIGAKIT_SESSION_START", str(workspace.uptime() - 11 * 3600))
    train.train_adapter(together)  # no time is left: one step and a checkpoint
    monkeypatch.delenv("SAIGAKIT_SESSION_START")
    made = train.train_adapter(together)
    printed = capfd.readouterr().out
    assert printed.count("weights sharded: True") == 4
    assert "Resuming from step 1" in printed
    assert losses(made) == pytest.approx(losses(alone), abs=1e-6)
    assert not (made / "samples.md").exists() and "is not written with sharding='fsdp'" in printed


def test_fsdp_options_reach_the_libraries(tmp_path):
    import torch
    from accelerate.utils import FullyShardedDataParallelPlugin
    from transformers import BitsAndBytesConfig, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, **distributed.fsdp_options("LlamaDecoderLayer")
    )
    distributed.complete_fsdp_options(arguments)
    plugin = FullyShardedDataParallelPlugin(**arguments.fsdp_plugin_args)
    plugin.set_mixed_precision("fp16")
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    assert plugin.mixed_precision_policy.param_dtype is None  # else 4-bit weights would be cast as numbers
    assert plugin.transformer_cls_names_to_wrap == ["LlamaDecoderLayer"]
    stored = BitsAndBytesConfig(load_in_4bit=True, **distributed.fsdp_storage(torch.float16)).bnb_4bit_quant_storage
    assert stored == torch.float16


def test_sharded_processes_get_the_same_number_of_packs():
    lengths = (90, 80, 70, 10, 10, 10, 60)
    stored = rows.as_dataset((1, {"input_ids": [1] * length, "labels": [1] * length}) for length in lengths)

    def counts(kind):
        config = TrainConfig(
            model="saiga_tiny", train_file="", output_dir="", batch_size=5, epochs=1, max_seq_length=100, sharding=kind
        )
        plans = [Plan(config, stored, processes=2, process=number) for number in range(2)]
        return [[(len(plan[step].packs), plan[step].counted) for plan in plans] for step in range(2)]

    plain, sharded = counts("none"), counts("fsdp")
    assert any(len({packs for packs, _ in step}) > 1 for step in plain)
    assert all(len({packs for packs, _ in step}) == 1 for step in sharded)
    assert [[counted for _, counted in step] for step in sharded] == [
        [counted for _, counted in step] for step in plain
    ]


@pytest.mark.parametrize(
    ("gpus", "settings", "message"),
    [
        (0, {}, "GPUs: 0, processes: 1"),
        (1, {}, "GPUs: 1, processes: 1"),
        (2, {"processes": 1}, "GPUs: 2, processes: 1"),
        (2, {"quantization": "int8"}, "cannot split int8 weights"),
        (2, {"lora": Lora(dora=True)}, "does not work with DoRA and modules_to_save"),
        (2, {"lora": Lora(modules_to_save=("lm_head",))}, "does not work with DoRA and modules_to_save"),
    ],
)
def test_refuses_what_cannot_be_sharded(gpus, settings, message):
    config = TrainConfig(model="saiga_llama3_8b", train_file="", output_dir="", sharding="fsdp", **settings)
    gpu = Gpu(name="A100", memory=40 * 10**9, free=40 * 10**9, capability=(8, 0))
    with pytest.raises(SaigaError, match=message):
        preflight.check_sharding(config, [gpu] * gpus, machines=1)
        preflight.check_sharded_lora(config, config.new_lora)


def test_sharded_memory_is_a_share_two_layers_and_the_embeddings():
    parts = preflight.memory_when_sharded({"weights": 3600, "logits": 5}, processes=4, layers=32, embeddings=400)
    assert parts == {"weights": 900 + 200 + 400, "logits": 5}
