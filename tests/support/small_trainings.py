"""Trainings of the tiny Saiga, and the loss by transformers alone."""

import torch

from saigakit import train
from saigakit.config import TrainConfig
from saigakit.prompt import encoding
from saigakit.train import curve


def config_for(records, directory, **settings):
    files = {"train_file": str(records), "eval_file": str(records), "output_dir": str(directory / "02_train")}
    return TrainConfig(**({"model": "saiga_tiny", "epochs": 1} | files | settings))


def mean_loss(model, rows):
    """The mean over the trained tokens, one conversation at a time."""
    total = count = 0
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        count += int((labels != encoding.IGNORE_INDEX).sum())
    return total / count


def trained(records, directory, **settings):
    """Train one unquantised epoch with a new LoRA, unless `settings` change that."""
    given = {"quantization": "none", "adapter": None} | settings
    return train.train_adapter(config_for(records, directory, **given))


def losses(stage):
    return [entry.get("loss", entry.get("held_out_loss")) for entry in curve.read_log(stage)]
