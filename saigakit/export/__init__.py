"""Merge base and adapter into a GGUF in one pass: the stage 03_merge_gguf."""

from saigakit.export.calibration import importance_matrix
from saigakit.export.fit import memory_table
from saigakit.export.quality import measure_quality
from saigakit.export.stage import STAGE, merge_gguf, to_gguf

__all__ = ["STAGE", "importance_matrix", "measure_quality", "memory_table", "merge_gguf", "to_gguf"]
