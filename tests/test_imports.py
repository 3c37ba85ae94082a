"""A room imports only from lower floors, its files have no cycle, and nothing heavy is imported early."""

import ast
import graphlib
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from import_graph import FILES, PACKAGE, imported, imported_at_once, imported_at_the_top, name_of, room_of

FLOORS = {
    "errors": 1,
    "core": 2, "registry": 2,
    "demo": 3, "config": 3,
    "weights": 4,
    "prompt": 5,
    "data": 6, "llamacpp": 6,
    "train": 7, "export": 7, "infer": 7, "kaggle": 7,
    "evaluate": 8,
    "publish": 9,
    "cli": 10,
}  # fmt: skip
HEAVY = {
    "accelerate",
    "bitsandbytes",
    "gguf",
    "huggingface_hub",
    "kaggle",
    "llama_cpp",
    "matplotlib",
    "numpy",
    "papermill",
    "peft",
    "datasets",
    "pyarrow",
    "safetensors",
    "sentencepiece",
    "tokenizers",
    "torch",
    "transformers",
}
# Imported in the child processes of a training alone, which need torch, transformers and peft anyway.
CHILD_ONLY = {
    f"saigakit.train.{name}"
    for name in ("distributed", "layers", "loading", "run_state", "samples", "steps", "trainer", "worker")
}
LIGHT = [file for file in FILES if name_of(file) not in CHILD_ONLY]


def test_every_room_has_a_floor():
    assert {room_of(file) for file in FILES} == set(FLOORS)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_room_imports_from_lower_floors_only(file):
    mine = room_of(file)
    rooms = {name.split(".")[1] for name in imported(file)} - {mine}
    assert {room for room in rooms if FLOORS[room] >= FLOORS[mine]} == set()


@pytest.mark.parametrize("room", sorted({room_of(file) for file in FILES}))
def test_the_files_of_a_room_have_no_cycle(room):
    files = {name_of(file): imported(file) for file in FILES if room_of(file) == room}
    graphlib.TopologicalSorter(files).prepare()


def test_the_number_of_rooms_and_files_stays_small():
    rooms = [path for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()]
    assert len(rooms) <= 13
    assert {room.name: count for room in rooms if (count := len(list(room.glob("[!_]*.py")))) > 13} == {}
    assert len(list(PACKAGE.glob("*.py"))) <= 6


def test_the_package_itself_exports_only_light_names():
    names = {name.removeprefix("saigakit.") for name in imported(PACKAGE / "__init__.py")}
    assert names <= {"errors", "registry", "config", "core.hub", "core.install", "core.workspace"}


@pytest.mark.parametrize("file", LIGHT, ids=name_of)
def test_nothing_heavy_is_imported_at_the_top(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert [(line, name) for line, name in imported_at_once(tree.body) if name in HEAVY] == []


def test_no_parent_module_imports_a_child_module_at_its_top():
    assert {name_of(file) for file in FILES} >= CHILD_ONLY
    assert {name_of(file): found for file in LIGHT if (found := imported_at_the_top(file) & CHILD_ONLY)} == {}


def in_child(code: str) -> str:
    return subprocess.check_output([sys.executable, "-c", code], cwd=PACKAGE.parent, text=True)


def test_import_saigakit_takes_at_most_150_ms_of_cpu():
    code = "import time; start = time.process_time(); import saigakit; print(time.process_time() - start)"
    assert statistics.median(float(in_child(code)) for _ in range(5)) <= 0.15


def test_import_saigakit_imports_nothing_heavy():
    assert in_child_modules("import saigakit") & {*HEAVY, "jinja2"} == set()


def test_importing_every_parent_module_imports_nothing_heavy():
    assert in_child_modules("; ".join(f"import {name_of(file)}" for file in LIGHT)) & HEAVY == set()


def in_child_modules(statements: str) -> set[str]:
    return set(in_child(f"import sys; {statements}; print(*sys.modules)").split())


@pytest.mark.parametrize("room", sorted(room for room in FLOORS if (PACKAGE / room).is_dir()))
def test_the_tests_of_a_room_are_named_after_its_files(room):
    files = {file.stem for file in (PACKAGE / room).glob("*.py")}
    tests = [file.stem.removeprefix("test_") for file in (Path(__file__).parent / room).glob("test_*.py")]
    aspects = {name: [stem for stem in files if name == stem or name.startswith(f"{stem}_")] for name in tests}
    assert tests and [name for name, found in aspects.items() if not found] == []
