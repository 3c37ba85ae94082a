"""What a parent resolves for its child processes."""

from saigakit.config import TrainConfig
from saigakit.registry import Lora
from saigakit.train.job import Job


def test_a_job_is_read_as_it_was_written(tiny, tmp_path):
    files = {"train_file": "обучение.jsonl", "output_dir": str(tmp_path)}
    for settings in ({"adapter": "released"}, {"adapter": None, "lora": Lora(rank=3), "learning_rate": 1e-4 / 3}):
        job = Job.of(TrainConfig(model="saiga_tiny", **files, **settings), "float32")
        assert Job.read(job.write(tmp_path)) == job


def test_the_adapter_to_start_with_gives_the_lora_and_a_new_one_the_config(tiny, tmp_path):
    files = {"model": "saiga_tiny", "train_file": "x", "output_dir": str(tmp_path)}
    continued = Job.of(TrainConfig(adapter="released", **files), "float32")
    new = Job.of(TrainConfig(adapter=None, lora=Lora(rank=3), **files), "float32")
    assert (continued.adapter_dir, continued.base_dir) == (tiny / "adapter", tiny / "base")
    assert (new.adapter_dir, new.lora) == (None, Lora(rank=3))
    assert continued.lora.rank == 4
