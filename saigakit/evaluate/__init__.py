"""Compare models on the evaluation set: the stage 04_infer."""

from saigakit.evaluate.by_hand import show_call, show_extraction, show_stream
from saigakit.evaluate.comparison import STAGE, compare, table_about
from saigakit.evaluate.results import examples_table, raw_answers, read, show_table
from saigakit.prompt.questions import read_examples

__all__ = [
    "STAGE",
    "compare",
    "examples_table",
    "raw_answers",
    "read",
    "read_examples",
    "show_call",
    "show_extraction",
    "show_stream",
    "show_table",
    "table_about",
]
