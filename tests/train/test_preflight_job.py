"""The job that a parent resolves for its child processes."""

from dataclasses import replace

from saigakit.config import TrainConfig
from saigakit.registry import Lora
from saigakit.train.checkpoints import Store
from saigakit.train.preflight import Job


def test_job_round_trip(tiny, tmp_path):
    replay = tmp_path / "диалоги-*.jsonl"
    for name in ("обучение.jsonl", "диалоги-1.jsonl", "диалоги-2.jsonl"):
        (tmp_path / name).write_text("{}\n", encoding="utf-8")
    files = {"train_file": str(tmp_path / "обучение.jsonl"), "output_dir": str(tmp_path), "replay_file": str(replay)}
    for settings in ({"adapter": "released"}, {"adapter": None, "lora": Lora(rank=3), "learning_rate": 1e-4 / 3}):
        job = Job.of(TrainConfig(model="saiga_tiny", **files, **settings), "float32")
        job = replace(job, store=Store(tmp_path / "checkpoints", {"parameters": {"epochs": 2.0}}))
        assert len(job.replay_files) == 2
        assert Job.read(job.write(tmp_path)) == job


def test_lora_comes_from_the_start_adapter_or_the_config(tiny, tmp_path):
    files = {"model": "saiga_tiny", "train_file": str(tiny / "records.jsonl"), "output_dir": str(tmp_path)}
    continued = Job.of(TrainConfig(adapter="released", **files), "float32")
    new = Job.of(TrainConfig(adapter=None, lora=Lora(rank=3), **files), "float32")
    assert (continued.adapter_dir, continued.base_dir) == (tiny / "adapter", tiny / "base")
    assert (new.adapter_dir, new.lora) == (None, Lora(rank=3))
    assert continued.lora.rank == 4
