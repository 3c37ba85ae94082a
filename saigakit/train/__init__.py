"""Train a LoRA adapter: the stage 02_train."""

from saigakit.train.curve import read as read_log
from saigakit.train.curve import summary, verdict
from saigakit.train.samples import table as answers_table
from saigakit.train.stage import CONFIG_FILE, STAGE, train_adapter

__all__ = ["CONFIG_FILE", "STAGE", "answers_table", "read_log", "summary", "train_adapter", "verdict"]
