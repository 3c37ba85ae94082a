"""A module imports only modules to its left, and nothing heavy before a function needs it."""

import ast
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import saigakit

PACKAGE = Path(saigakit.__file__).parent
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
    "pyarrow",
    "safetensors",
    "sentencepiece",
    "tokenizers",
    "torch",
    "transformers",
}


def line_of_imports() -> list[str]:
    """The modules in the order of the package's docstring, which ends with it."""
    line = (saigakit.__doc__ or "").partition("only modules to its left:")[2]
    return [name.strip() for name in line.split("<")]


def modules() -> dict[str, Path]:
    """Module names and files; the package `tiny` counts as one module."""
    files = {file.stem: file for file in PACKAGE.glob("*.py")}
    return {name: file for name, file in files.items() if name != "__init__"}


def imported(file: Path) -> set[str]:
    """The saigakit modules that a file imports anywhere, in functions and for annotations too."""
    return imported_by(ast.parse(file.read_text(encoding="utf-8")))


def imported_by(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("saigakit.")}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno} imports relatively"
            if node.module == "saigakit":
                found |= {alias.name for alias in node.names} & {*modules(), "tiny"}
            elif (node.module or "").startswith("saigakit."):
                found.add(node.module.split(".")[1])
    return found


def packages(file: Path) -> set[str]:
    """The third-party packages that a file imports anywhere."""
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    return {name for _, name in imported_at_once(imports)} - sys.stdlib_module_names - {"saigakit"}


def imported_at_once(body: list[ast.stmt]) -> Iterator[tuple[int, str]]:
    """(line, top-level package) of what runs when the module is imported."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, (node.module or "").split(".")[0]
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from imported_at_once(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for name in ("body", "orelse", "finalbody", "handlers"):
                yield from imported_at_once(getattr(node, name, []))


def test_the_line_names_every_module_once():
    line = line_of_imports()
    assert sorted(line) == sorted(modules())


@pytest.mark.parametrize("name", modules())
def test_a_module_imports_only_modules_to_its_left(name):
    line = line_of_imports()
    allowed = {*line[: line.index(name)], "tiny"}
    assert imported(modules()[name]) - allowed == set()


def test_the_tiny_saiga_needs_nothing_of_the_package():
    assert set().union(*(imported(file) for file in PACKAGE.glob("tiny/*.py"))) <= {"tiny", "errors"}


def test_the_package_itself_gives_only_the_light_beginning_of_the_line():
    assert imported(PACKAGE / "__init__.py") <= {"errors", "models", "config"}


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_nothing_heavy_is_imported_at_the_top(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert [(line, name) for line, name in imported_at_once(tree.body) if name in HEAVY] == []


def in_child(code: str) -> str:
    return subprocess.check_output([sys.executable, "-c", code], cwd=PACKAGE.parent, text=True)


def test_import_saigakit_takes_at_most_150_ms_of_cpu():
    code = "import time; start = time.process_time(); import saigakit; print(time.process_time() - start)"
    assert statistics.median(float(in_child(code)) for _ in range(5)) <= 0.15


def test_import_saigakit_brings_in_nothing_heavy():
    assert in_child_modules("import saigakit") & {*HEAVY, "jinja2"} == set()


def test_importing_every_module_brings_in_nothing_heavy():
    assert in_child_modules("; ".join(f"import saigakit.{name}" for name in modules())) & HEAVY == set()


def in_child_modules(statements: str) -> set[str]:
    return set(in_child(f"import sys; {statements}; print(*sys.modules)").split())
