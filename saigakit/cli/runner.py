"""Notebooks and parameters into a finished run: stage after stage; what is finished and unchanged is kept."""

import contextlib
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import saigakit
from saigakit import evaluate, registry
from saigakit.cli import execution, summary
from saigakit.cli.execution import Terminal
from saigakit.core import launch, manifest
from saigakit.core.files import sha256, write_text
from saigakit.errors import SaigaError, suggestion
from saigakit.evaluate import results
from saigakit.llamacpp import quantization

_STATE = ".runner"
_LOCK_PATIENCE_S = 5.0  # the kernel of a killed run notices within about 1 s


@dataclass(frozen=True)
class Stage:
    """A notebook, the defaults of its parameters, and what was given for them."""

    notebook: Path
    defaults: dict[str, Any]
    given: dict[str, Any]

    @property
    def name(self) -> str:
        return self.notebook.stem

    @property
    def values(self) -> dict[str, Any]:
        return self.defaults | self.given


def run(parameters: Mapping[str, Any], run_dir: str | Path, *, notebooks_dir: str | Path | None = None) -> Path:
    """The four notebooks in order, each with those of `parameters` that it has; returns report.html.

    A stage is not run again when its outputs, notebook, parameters and inputs have the same hashes as when it was
    made; another one replaces it only when complete. Raises SaigaError with the notebook's own sentence.
    """
    run_dir = Path(run_dir).resolve()
    _require_runnable(parameters)
    stages = read_stages(find_notebooks() if notebooks_dir is None else Path(notebooks_dir).absolute(), parameters)
    with _only_run(run_dir) as lock, launch.handling_signals(_interrupt), Terminal() as terminal:
        _finish_all(stages, run_dir, terminal, lock)
        report = summary.write_report(run_dir)
        write_text(run_dir / results.FILE, (run_dir / evaluate.STAGE / results.FILE).read_text("utf-8"))
    gguf_file = run_dir / "03_merge_gguf" / "model.gguf"
    print(f"\n{results.table(results.read(run_dir / evaluate.STAGE))}\n")
    print(f"report: {report}\nmodel:  {gguf_file}\ntalk:   saigakit chat {gguf_file}", flush=True)
    return report


def find_notebooks() -> Path:
    """The repository's notebooks, where saigakit runs from a checkout."""
    found = Path(saigakit.__file__).parent.parent / "notebooks"
    if not found.is_dir():
        raise SaigaError(
            f"The notebooks are not at {found}: an installed saigakit is without them. Take the directory notebooks/ "
            "of the saigakit repository and give its path with --notebooks."
        )
    return found


def read_stages(notebooks_dir: Path, given: Mapping[str, Any]) -> list[Stage]:
    """Every notebook with its values: `name` is for all that have it, `02_train.name` for one of them.

    Raises SaigaError for a parameter that none of them has.
    """
    notebooks = [notebooks_dir / f"{name}.ipynb" for name in summary.STAGES]
    defaults = {notebook.stem: execution.parameters_of(notebook) for notebook in notebooks}
    for notebook in notebooks:
        if "run_dir" not in defaults[notebook.stem]:
            raise SaigaError(f"{notebook} has no run_dir in a cell tagged `parameters`, so its output has no place.")
        del defaults[notebook.stem]["run_dir"]
    for name, value in given.items():
        _require_known(name, defaults)
        if not _is_literal(value):
            raise SaigaError(f"{name}={value!r} is a {type(value).__name__}: use text, a number, true, false or null.")
    stages = []
    for notebook in notebooks:
        found, prefix = defaults[notebook.stem], f"{notebook.stem}."
        own = {name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)}
        stages.append(Stage(notebook, found, {name: given[name] for name in found if name in given} | own))
    return stages


def _require_runnable(given: Mapping[str, Any]) -> None:
    """What would fail in a later stage is refused before the first."""
    if "model" in given:
        registry.find(given["model"])
    if "quant_type" in given:
        quantization.require_known(given["quant_type"])


def _require_known(name: str, defaults: Mapping[str, Mapping[str, Any]]) -> None:
    """Also refuses for all notebooks what is a different thing in each, as `adapter` is."""
    owners = {stage: found[name] for stage, found in defaults.items() if name in found}
    own = [f"{stage}.{key}" for stage, found in defaults.items() for key in found]
    if not owners and name not in own:
        known = sorted({key for found in defaults.values() for key in found})
        raise SaigaError(
            f"No notebook has a parameter {name!r}.{suggestion(name, [*known, *own])} They have: {', '.join(known)}."
        )
    if len(set(map(repr, owners.values()))) > 1:
        different = ", ".join(f"{stage}.{name} ({value!r})" for stage, value in owners.items())
        raise SaigaError(f"{name!r} is a different thing in each notebook; say which you mean: {different}.")


def _is_literal(value: object) -> bool:
    """Whether papermill can write it into a notebook."""
    if isinstance(value, list | tuple):
        return all(map(_is_literal, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_literal(item) for key, item in value.items())
    return value is None or isinstance(value, bool | int | float | str)


def _finish_all(stages: Sequence[Stage], run_dir: Path, terminal: Terminal, lock: int) -> None:
    finished: list[str] = []
    for number, stage in enumerate(stages, 1):
        try:
            _finish(stage, run_dir, finished, terminal, label=f"[{number}/{len(stages)}]", lock=lock)
        except KeyboardInterrupt:
            kept = f"finished stages are kept: {', '.join(finished)}" if finished else "no stage was finished"
            terminal.say(f"interrupted in {stage.name}; {kept}. Run the same command to go on.", sys.stderr)
            raise
        finished.append(stage.name)


def _finish(stage: Stage, run_dir: Path, earlier: Sequence[str], terminal: Terminal, *, label: str, lock: int) -> None:
    """Runs a stage unless it is finished and made of the same things."""
    made_file, times_file = run_dir / _STATE / f"{stage.name}.json", run_dir / summary.TIMES_FILE
    times = json.loads(times_file.read_text(encoding="utf-8")) if times_file.is_file() else {}
    terminal.begin(stage.name)
    execution.failed_file(run_dir, stage.name).unlink(missing_ok=True)
    fingerprint = _fingerprint(stage, run_dir, earlier)
    if _is_finished(run_dir / stage.name, made_file, fingerprint):
        terminal.say(f"{label} {stage.name}: kept (same notebook, parameters and inputs; its files are unchanged)")
        return
    usual = f" (last time {execution.spent(times[stage.name])})" if stage.name in times else ""
    terminal.say(f"{label} {stage.name} …{usual}")
    start = time.monotonic()
    execution.execute(stage.notebook, stage.given, run_dir, terminal, lock)
    seconds = time.monotonic() - start
    write_text(times_file, json.dumps({**times, stage.name: round(seconds, 1)}))
    write_text(made_file, json.dumps({"fingerprint": fingerprint}))
    terminal.say(f"{label} {stage.name}: done in {seconds:.0f} s")


def _fingerprint(stage: Stage, run_dir: Path, earlier: Sequence[str]) -> str:
    """Changes with whatever a stage is made of."""
    cells = json.loads(stage.notebook.read_text(encoding="utf-8"))["cells"]
    made_of = {
        "version": saigakit.__version__,
        "cells": [[cell["cell_type"], "".join(cell["source"])] for cell in cells],
        "values": stage.values,
        "files": {key: _content(value, run_dir) for key, value in stage.values.items() if isinstance(value, str)},
        "earlier": {name: sha256(run_dir / name / manifest.NAME) for name in earlier},
    }
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def _content(value: str, run_dir: Path) -> object:
    """Of a file its SHA-256; of a directory, which may be a base model of 14 GB, names, sizes and times."""
    # os.path, because a value may be any text: Path's methods raise for one that is too long for a name.
    given = Path(os.path.expanduser(value))  # noqa: PTH111
    for path in (given, run_dir / given):
        if os.path.isfile(path):  # noqa: PTH113
            return sha256(path)
    if not value or not os.path.isdir(given):  # noqa: PTH112
        return None
    here = given.resolve()
    if here.is_relative_to(run_dir) or run_dir.is_relative_to(here):  # a stage, or a place that holds this run
        return None
    files = sorted(path for path in given.rglob("*") if path.is_file())
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def _is_finished(directory: Path, made_file: Path, fingerprint: str) -> bool:
    if not made_file.is_file() or json.loads(made_file.read_text(encoding="utf-8"))["fingerprint"] != fingerprint:
        return False
    try:
        outputs = manifest.require_stage(directory, directory.name)["outputs"]
    except SaigaError:  # it says to run the stage again, which is what happens
        return False
    return all(sha256(directory / name) == digest for name, digest in outputs.items())


def _interrupt() -> None:
    """SIGTERM ends a run as Ctrl-C does; a second signal does not disturb the ending."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


@contextlib.contextmanager
def _only_run(run_dir: Path) -> Iterator[int]:
    """The lock of a run directory, which its kernels share."""
    import fcntl

    (run_dir / _STATE).mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + _LOCK_PATIENCE_S
    with (run_dir / _STATE / "lock").open("a", encoding="utf-8") as stream:
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise SaigaError(
                        f"Another run is at work in {run_dir}. Wait for it, or choose another run_dir."
                    ) from None
                time.sleep(0.1)
        yield stream.fileno()
