"""Load a GGUF file and answer with it."""

from saigakit.infer.batch_file import extract_file
from saigakit.infer.engine import load, stop_ids, stream
from saigakit.infer.extraction import extract, extract_all
from saigakit.infer.guess import guess_schema
from saigakit.infer.sequences import greedy
from saigakit.infer.tool_calls import answer, run_tools

__all__ = [
    "answer",
    "extract",
    "extract_all",
    "extract_file",
    "greedy",
    "guess_schema",
    "load",
    "run_tools",
    "stop_ids",
    "stream",
]
