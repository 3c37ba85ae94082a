"""Look for models and records with the Hub at a given address, which huggingface_hub reads when it is imported."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import warm_python

NOWHERE = "http://127.0.0.1:9"
_IMPORTS = """
from datasets import load_dataset_builder
from huggingface_hub import HfApi, snapshot_download
from saigakit.data import sources
from saigakit.weights import find
"""
_ASK = """
import sys
from saigakit import registry; from saigakit.data import sources
from saigakit.weights import find
from saigakit.errors import SaigaError
try:
    found = eval(sys.argv[1])
    if isinstance(found, list):
        print(*(f"{file.name}: {file.read_text()}" for file in found), sep="\\n")
    else:
        print(found, *sorted(file.name for file in found.iterdir()), sep="\\n")
except SaigaError as error:
    print("SaigaError", error, sep="\\n")
"""
Ask = Callable[[str, Path], list[str]]


@contextmanager
def answering(endpoint: str) -> Iterator[Ask]:
    """A function from an expression and a cache directory to the found files, each with its content or name."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "SAIGAKIT_"))}
    environment = {**plain, "HF_ENDPOINT": endpoint}
    with warm_python.started(_IMPORTS, environment) as run:

        def ask(expression: str, cache: Path) -> list[str]:
            done = run(_ASK, expression, env={**environment, "SAIGAKIT_CACHE": str(cache)}, cwd=Path.cwd())
            assert "Traceback" not in done.stderr, done.stderr
            assert done.returncode == 0
            return done.stdout.splitlines()

        yield ask


def directory_with(path: Path, *names: str) -> Path:
    path.mkdir(parents=True)
    for name in names:
        (path / name).write_text("{}", encoding="utf-8")
    return path
