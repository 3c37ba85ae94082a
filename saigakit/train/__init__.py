"""Train a LoRA adapter: the stage 02_train."""

from saigakit.train.answers import answers_table
from saigakit.train.curve import read_log, summary, verdict
from saigakit.train.stage import CONFIG_FILE, STAGE, train_adapter

__all__ = ["CONFIG_FILE", "STAGE", "answers_table", "read_log", "summary", "train_adapter", "verdict"]
