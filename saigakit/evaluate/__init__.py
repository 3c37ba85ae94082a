"""Compare models on the evaluation set: the stage 04_infer."""

from saigakit.data.questions import read_examples
from saigakit.evaluate.comparison import STAGE, compare, table_about
from saigakit.evaluate.results import examples_table, read, show_table

__all__ = ["STAGE", "compare", "examples_table", "read", "read_examples", "show_table", "table_about"]
