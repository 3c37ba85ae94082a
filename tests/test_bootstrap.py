"""The first cell of the notebooks, in a fresh Python: where it gets saigakit from, and its messages."""

import functools
import hashlib
import http.server
import json
import os
import re
import subprocess
import threading
from importlib import metadata
from pathlib import Path

import pytest
from small_wheels import new_python, wheel

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
WHEEL = "saigakit-0.1.0-py3-none-any.whl"


def bootstrap(notebook: Path) -> str:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["id"] for cell in code[:3]] == ["parameters", "bootstrap", "setup"]
    return "".join(code[1]["source"])


CELL = bootstrap(NOTEBOOKS[0])


@pytest.fixture
def python(tmp_path) -> Path:
    return new_python(tmp_path / "python")


@pytest.fixture
def inputs(tmp_path) -> Path:
    (tmp_path / "input").mkdir()
    return tmp_path / "input"


def run(python: Path, inputs: Path, source: str = "") -> subprocess.CompletedProcess[str]:
    code = CELL.replace('SOURCE = ""', f"SOURCE = {source!r}") + '\nimport saigakit; print("from", saigakit.origin)'
    environment = {"PATH": os.environ["PATH"], "SAIGAKIT_INPUT_ROOT": str(inputs), "PIP_NO_INDEX": "1"}
    return subprocess.run([python, "-P", "-c", code], env=environment, capture_output=True, text=True, check=False)


def attach(inputs: Path, place: str) -> Path:
    return wheel(inputs / place, "saigakit", "0.1.0", source=f"origin = {place!r}")


@pytest.fixture
def server(tmp_path):
    """The address of a loopback server of a directory with saigakit's wheel, and the SHA-256 of that."""
    made = attach(tmp_path, "released")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=made.parent)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/{WHEEL}", hashlib.sha256(made.read_bytes()).hexdigest()
    server.shutdown()
    server.server_close()


def test_the_cell_is_the_same_in_all_notebooks_and_has_at_most_nine_lines():
    assert len(NOTEBOOKS) == 4 and {bootstrap(notebook) for notebook in NOTEBOOKS} == {CELL}
    assert len(CELL.splitlines()) <= 9


def test_its_source_is_empty_or_an_address_with_a_hash():
    [source] = re.findall(r'^SOURCE = "(.*)"  #', CELL, re.MULTILINE)
    assert re.fullmatch(r"(https://\S+/saigakit-[\d.]+-py3-none-any\.whl#sha256=[0-9a-f]{64})?", source)


@pytest.mark.parametrize("place", ["datasets/me/saigakit-wheels", "saigakit-wheels", "notebooks/me/build/dist"])
def test_an_attached_wheel_is_installed(python, inputs, place):
    attach(inputs, place)
    (inputs / "datasets" / "me" / "records").mkdir(parents=True)
    done = run(python, inputs)
    assert (done.returncode, done.stdout) == (0, f"from {place}\n"), done.stderr


def test_an_attached_wheel_counts_more_than_the_source(python, inputs):
    attach(inputs, "datasets/me/saigakit-wheels")
    done = run(python, inputs, "http://127.0.0.1:9/" + WHEEL)
    assert done.stdout == "from datasets/me/saigakit-wheels\n", done.stderr


def test_a_saigakit_that_is_installed_is_left_alone(python, inputs, tmp_path):
    attach(inputs, "datasets/me/saigakit-wheels")
    assert run(python, inputs).returncode == 0
    assert run(python, tmp_path / "nothing").stdout == "from datasets/me/saigakit-wheels\n"


def test_two_wheels_are_refused_with_their_places(python, inputs):
    places = ["datasets/me/saigakit-wheels", "datasets/you/saigakit-wheels"]
    for place in places:
        attach(inputs, place)
    done = run(python, inputs)
    last = done.stderr.splitlines()[-1]
    assert "Приложите один датасет / attach one data set: saigakit-wheels." in last
    assert all(str(inputs / place / WHEEL) in last for place in places) and f"attached={places}" in last


def test_without_a_wheel_it_lists_what_is_attached(python, inputs):
    for file in (
        "datasets/me/records/records.jsonl",
        "datasets/me/records/more/part-1.jsonl",
        "notebooks/me/saigakit-01-format/01_format/saigakit.json",
        "models/google/gemma/transformers/2b/1/config.json",
        "competitions/titanic/train.csv",
        "old-layout/file.txt",
    ):
        (inputs / file).parent.mkdir(parents=True, exist_ok=True)
        (inputs / file).touch()
    last = run(python, inputs).stderr.splitlines()[-1]
    assert last.endswith(
        "attach one data set: saigakit-wheels. wheels=[] attached=['competitions/titanic', 'datasets/me/records', "
        "'models/google/gemma', 'notebooks/me/saigakit-01-format', 'old-layout']"
    )


def test_without_any_input_it_says_so(python, tmp_path):
    last = run(python, tmp_path / "nothing").stderr.splitlines()[-1]
    assert last.endswith("attach one data set: saigakit-wheels. wheels=[] attached=[]")


def test_the_source_is_installed_if_nothing_is_attached(python, inputs, server):
    address, digest = server
    done = run(python, inputs, f"{address}#sha256={digest}")
    assert (done.returncode, done.stdout) == (0, "from released\n"), done.stderr


def test_a_source_with_other_bytes_is_refused(python, inputs, server, tmp_path):
    address, _ = server
    done = run(python, inputs, f"{address}#sha256={'0' * 64}")
    message = done.stderr.rpartition("AssertionError: ")[2]
    assert message.startswith("pip failed. Internet включён? / Is Internet on? ")
    assert "DO NOT MATCH THE HASHES" in message and "0" * 64 in message
    assert "saigakit" not in {each.name for each in metadata.distributions(path=[str(p) for p in site(tmp_path)])}


def test_a_source_that_cannot_be_reached_is_a_sentence(python, inputs, server):
    address, digest = server
    done = run(python, inputs, f"{address.replace('saigakit-', 'gone/saigakit-')}#sha256={digest}")
    message = done.stderr.rpartition("AssertionError: ")[2]
    assert message.startswith("pip failed. Internet включён?") and "404 Client Error" in message


def test_a_damaged_wheel_is_a_sentence(python, inputs):
    attach(inputs, "datasets/me/saigakit-wheels").write_bytes(b"damaged")
    message = run(python, inputs).stderr.rpartition("AssertionError: ")[2]
    assert message.startswith("pip failed. Internet включён?") and WHEEL in message


def site(place: Path) -> list[Path]:
    return list((place / "python").rglob("site-packages"))
