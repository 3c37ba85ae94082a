"""Write a finished 02_train with the adapter of a small model, without training."""

import json

from small_models import adapter, edit_json

from saigakit.config import TrainConfig
from saigakit.core import manifest
from saigakit.train import curve

LOG = [
    {"step": 0, "held_out_loss": 2.5},
    *({"step": step, "loss": 3.0 / step, "tokens": 100 * step, "seconds": 2.0 * step} for step in range(1, 9)),
    {"step": 4, "held_out_loss": 0.75},
    {"step": 8, "held_out_loss": 0.875},
]


def stage_02(run_dir, tiny, *, model="saiga_tiny", base="hash of the base", files=()):
    """A finished 02_train whose adapter was written by peft."""
    inputs = {"train": {"train.jsonl": "hash of the records"}, "base": {"model.safetensors": base}, "adapter": None}
    parameters = {"model": model, "base_source": "/home/me/base", "adapter": "/home/me/older", "epochs": 2.0}
    facts = {"number_format": "float32", "system_prompt": "Ты — кот.", "training": {"best_step": 4}}
    identity = {"stage": "02_train", "parameters": parameters, "inputs": inputs}
    with manifest.making(run_dir / "02_train", facts=facts, **identity) as made:
        adapter(made, tiny / "base")
        edit_json(made / "adapter_config.json", base_model_name_or_path="package:saiga_tiny")
        (made / "README.md").unlink()
        (made / curve.LOG_FILE).write_text("".join(json.dumps(entry) + "\n" for entry in LOG), encoding="utf-8")
        (made / "curve.png").write_bytes(b"\x89PNG\x00")
        for name, text in dict(files).items():
            (made / name).write_text(text, encoding="utf-8")
        (made / "samples.md").write_text("Мой секретный вопрос", encoding="utf-8")
        paths = {"train_file": "/home/me/train.jsonl", "output_dir": "/home/me/out", "base_source": str(tiny / "base")}
        TrainConfig(**{"model": model, "adapter": None, "epochs": 2, **paths}).write(made / "train_config.json")
    # The parameters in the manifest need a real base_source, where the tokenizer is read.
    edit_json(run_dir / "02_train" / manifest.NAME, parameters={**parameters, "base_source": str(tiny / "base")})
    return run_dir / "02_train"
