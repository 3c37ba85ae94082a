"""Read stored conversations in any order, and leave no file behind."""

import json
import os
import random
import subprocess
import sys

import pytest

from saigakit import data
from saigakit.data import store
from saigakit.errors import SaigaError

FULL = """
import os, resource, sys
from saigakit.core import workspace
from saigakit.data import store
from saigakit.errors import SaigaError
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    store.as_dataset({"messages": [{"role": "user", "content": "x" * 1000}]} for _ in range(int(sys.argv[1])))
except SaigaError as error:
    print(error)
"""
LARGE = """
import datasets, pyarrow, re
from pathlib import Path
from saigakit.data import store

def held():  # KB, with mapped pages
    return int(re.search(r"VmRSS:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])

def rows(most):
    for _ in range(10_000):  # 200 MB
        most.append(held())
        yield {"messages": [{"role": "user", "content": text}]}

text, before, most = "ё" * 10_000, held(), []
stored = store.as_dataset(rows(most))
for row in store.iter_conversations(stored):
    most.append(held())
print(max(most) - before)
"""


def asking(text):
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "да"}]}


@pytest.fixture
def many():
    """Conversations of very different lengths, stored and as dictionaries."""
    rng = random.Random(1)
    rows = [asking(f"{index} " + "ё\u2028" * rng.choice((0, 1, 50, 5000))) for index in range(500)]
    return store.as_dataset(rows), rows


def test_stored_conversations_can_be_read_in_order_repeatedly(many):
    stored, rows = many
    assert len(stored) == 500
    assert list(stored) == rows == list(stored) == list(store.iter_conversations(stored))


def test_reads_a_conversation_by_index_also_from_the_end(many):
    stored, rows = many
    assert [stored[index] for index in (0, 499, 7, -1, -500)] == [rows[index] for index in (0, 499, 7, -1, -500)]
    for outside in (500, -501):
        with pytest.raises(IndexError):
            stored[outside]


def test_a_selection_of_a_selection_has_the_requested_order(many):
    stored, rows = many
    order = random.Random(2).sample(range(500), 300)
    chosen = stored.select(order)
    assert list(chosen) == [rows[index] for index in order]
    again = chosen.select(range(299, -1, -2))
    assert list(again) == [rows[order[index]] for index in range(299, -1, -2)]
    assert again[1] == rows[order[297]]
    with pytest.raises(IndexError):
        chosen.select([300])


def test_a_slice_is_a_selection(many):
    stored, rows = many
    assert stored[10:400:7] == {"messages": [row["messages"] for row in rows[10:400:7]]}
    assert list(stored.select(range(100)).select(range(97, 100))) == rows[97:100]


def test_two_simultaneous_iterations_are_independent(many):
    stored, rows = many
    second = stored.select(range(250, 500))
    assert list(zip(stored, second, strict=False)) == list(zip(rows, rows[250:], strict=False))


def test_a_child_process_and_its_parent_read_the_same_file(many):
    stored, rows = many
    child = os.fork()
    if child == 0:
        os._exit(0 if list(stored) == rows else 1)
    assert list(stored) == rows
    assert os.waitpid(child, 0)[1] == 0


def test_changing_a_read_row_does_not_change_the_store(many):
    stored, rows = many
    stored[0]["messages"].clear()
    assert stored[0] == rows[0]


def test_stores_no_conversations():
    stored = store.as_dataset([])
    assert (len(stored), list(stored), list(stored.select([]))) == (0, [], [])


def test_tools_are_stored_and_other_keys_are_not():
    tools = '[{"type": "function", "function": {"name": "f"}}]'
    assert list(store.as_dataset([{**asking("а"), "tools": tools, "id": 1}])) == [{**asking("а"), "tools": tools}]


def test_reads_a_written_file_unchanged(many, tmp_path):
    stored, rows = many
    file = data.write_conversations(rows, tmp_path / "records.jsonl")
    assert list(data.read_conversations(file)) == rows
    assert b"".join(map(store.to_json_line, stored)) == file.read_bytes()


def test_a_json_line_has_no_other_line_end_and_equal_content():
    row = asking('один\u2028два\u2029три\u0085 \\u2028 \\\u2028 \n"')
    line = store.to_json_line(row)
    assert json.loads(line) == row
    assert len(line.decode("utf-8").splitlines()) == 1


def test_nothing_is_left_in_the_cache_directory_while_reading(many, monkeypatch, tmp_path):
    monkeypatch.setenv("SAIGAKIT_CACHE", str(tmp_path / "cache"))
    stored = store.as_dataset([asking("а")])
    assert list((tmp_path / "cache").rglob("*")) == []
    assert len(list(stored)) == 1


@pytest.mark.parametrize("count", [290, 100_000])
def test_a_full_disk_is_an_error_with_the_size_and_the_directory(tmp_path, count):
    """A limit on file sizes simulates a full disk; at 290 the last buffer does not fit."""
    environment = {**os.environ, "SAIGAKIT_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", FULL, str(count)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("The checked copy of the records needs 0.00 GB of disk or more at ")
    assert str(tmp_path) in result.stdout
    assert "SAIGAKIT_CACHE" in result.stdout
    assert result.stderr == ""


def test_rejects_what_cannot_fit_before_writing():
    with pytest.raises(SaigaError, match=r"needs 9000000\.00 GB of disk or more"):
        store.as_dataset(iter(lambda: pytest.fail("was read"), None), expected=9 * 10**15)


def test_an_error_of_the_source_is_not_reported_as_a_full_disk():
    def failing():
        yield asking("а")
        raise FileNotFoundError("gone")

    with pytest.raises(FileNotFoundError, match="gone"):
        store.as_dataset(failing())


@pytest.mark.slow
def test_memory_does_not_grow_with_the_texts():
    result = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 100_000  # KB
