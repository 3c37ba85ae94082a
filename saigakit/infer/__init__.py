"""Load a GGUF file and answer with it."""

from saigakit.infer.batch_file import extract_file
from saigakit.infer.engine import load, stop_ids, stream
from saigakit.infer.extraction import extract, extract_all
from saigakit.infer.guess import guess_schema
from saigakit.infer.sequences import greedy

__all__ = ["extract", "extract_all", "extract_file", "greedy", "guess_schema", "load", "stop_ids", "stream"]
