"""Publish adapters and GGUF files on the Hub and on Kaggle."""

from saigakit.publish.adapter import push_adapter
from saigakit.publish.gguf_file import push_to_hub, push_to_kaggle

__all__ = ["push_adapter", "push_to_hub", "push_to_kaggle"]
