"""Publish adapters and GGUF files on the Hub and on Kaggle."""

from saigakit.publish.adapter import push_adapter
from saigakit.publish.after_run import if_asked
from saigakit.publish.gguf_file import push_to_hub, push_to_kaggle

__all__ = ["if_asked", "push_adapter", "push_to_hub", "push_to_kaggle"]
