"""Merge base and adapter into a GGUF in one pass: the stage 03_merge_gguf."""

from saigakit.export.stage import STAGE, merge_gguf, require_possible, to_gguf

__all__ = ["STAGE", "merge_gguf", "require_possible", "to_gguf"]
