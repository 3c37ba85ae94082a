"""Small files that would fill the memory: what is stored once and repeated by every row, or compressed."""

import gzip
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

import saigakit
from saigakit.data import records, store
from saigakit.errors import SaigaError

CHILD = """
import resource, sys
from pathlib import Path
from saigakit.data import records, store
from saigakit.errors import SaigaError
count = lambda name: sum(1 for _ in records.read_records(Path(name)))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
count(sys.argv[1])
before = peak()
print(count(sys.argv[2]), peak() - before)
"""


def read_in_child(small: Path, file: Path) -> tuple[int, int]:
    """The number of records, and the MiB that reading them took."""
    command = [sys.executable, "-c", CHILD, str(small), str(file)]
    found = subprocess.check_output(command, cwd=Path(saigakit.__file__).parents[1], text=True)
    count, peak = map(int, found.split())
    return count, peak


def write_table(file: Path, text: str, rows: int) -> Path:
    parquet.write_table(pyarrow.table({"user": [text] * rows, "bot": ["да"] * rows}), file, compression="zstd")
    return file


def test_a_small_parquet_file_does_not_fill_the_memory(tmp_path):
    bomb = write_table(tmp_path / "bomb.parquet", "x" * 2_200_000, 260)
    assert bomb.stat().st_size < 2000
    count, peak = read_in_child(write_table(tmp_path / "small.parquet", "x", 1), bomb)
    assert count == 260
    assert peak < 700  # measured: 340, and 1,625 if 256 rows are decoded at once


def test_a_table_with_a_record_of_more_than_the_limit_is_refused(tmp_path):
    bomb = write_table(tmp_path / "bomb.parquet", "x" * 17_000_000, 1)
    assert bomb.stat().st_size < 4000
    with pytest.raises(SaigaError, match=r"bomb\.parquet has records of more than 16 MB; shorten or remove them\."):
        list(records.read_records(bomb))


def test_a_batch_that_would_fill_the_memory_is_refused():
    text = "x" * 15_000_000
    conversations = ({"messages": [{"role": "user", "content": text}]} for _ in range(100))
    with pytest.raises(SaigaError, match="256 conversations around number 18 hold more than 256 MB of text"):
        store.as_dataset(conversations)


@pytest.mark.parametrize("rows", [1, 8, 700])
def test_parquet_files_of_any_shape_give_all_rows_in_order(tmp_path, rows):
    texts = [f"{number} " * 5000 for number in range(rows)]
    parquet.write_table(pyarrow.table({"user": texts, "bot": texts}), tmp_path / "x.parquet", row_group_size=300)
    found = list(records.read_records(tmp_path / "x.parquet"))
    assert [number for number, _ in found] == list(range(1, rows + 1))
    assert [record["user"] for _, record in found] == texts


def test_a_gzip_file_of_one_endless_line_takes_no_more_than_the_limit(tmp_path):
    bomb, small = tmp_path / "bomb.jsonl.gz", tmp_path / "small.jsonl"
    small.write_text('{"user": "a", "bot": "b"}\n', encoding="utf-8")
    with gzip.open(bomb, "wb", compresslevel=1) as stream:
        stream.write(b'{"user": "')
        for _ in range(20):
            stream.write(bytes(b"x" * 10**7))
    assert bomb.stat().st_size < 2 * 10**6
    count, peak = read_in_child(small, bomb)
    assert count == 1
    assert peak < 100
    ((line, record),) = records.read_records(bomb)
    assert (line, record.problems) == (1, ("line: is longer than 16 MB; write one record per line",))
