"""Train a LoRA adapter: the stage 02_train."""

from saigakit.train.stage import CONFIG_FILE, STAGE, train_adapter

__all__ = ["CONFIG_FILE", "STAGE", "train_adapter"]
