"""Run the four notebooks in order, reusing stages that are up to date."""

import hashlib
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import saigakit
from saigakit import evaluate, export, registry
from saigakit.cli import execution, summary
from saigakit.cli.execution import Screen
from saigakit.core import launch, manifest, workspace
from saigakit.core.files import explaining, lock_file, sha256, write_text
from saigakit.demo import packages
from saigakit.errors import SaigaError, suggestion
from saigakit.evaluate import results
from saigakit.llamacpp import quantization

_STATE = ".runner"
_LOCK_PATIENCE_S = 5.0  # the kernel of a killed run ends within about 1 s


class Stage(NamedTuple):
    """A notebook with the defaults of its parameters and the given values."""

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
    """Run the notebooks with `parameters` and return report.html.

    A stage is reused if its outputs, notebook, parameters and inputs have the same hashes as when it was made, and
    replaced only once the new one is complete. Raises SaigaError with the notebook's own message.
    """
    run_dir = Path(run_dir).resolve()
    if "model" in parameters:  # what would fail in a later stage
        registry.find(parameters["model"])
    if "quant_type" in parameters:
        quantization.require_known(parameters["quant_type"])
    stages = read_stages(find_notebooks() if notebooks_dir is None else Path(notebooks_dir).absolute(), parameters)
    locked = lock_file(run_dir / _STATE / "lock", run_dir, _LOCK_PATIENCE_S)
    workspace.session_start()  # the kernels inherit it
    screen, numbers = Screen(), (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    with explaining(run_dir), locked as lock, launch.handling_signals(screen.interrupt, *numbers), screen:
        _finish_all(stages, run_dir, screen, lock)
        report = summary.write_report(run_dir)
        write_text(run_dir / results.FILE, (run_dir / evaluate.STAGE / results.FILE).read_text("utf-8"))
    gguf_file = run_dir / export.STAGE / "model.gguf"
    print(f"\n{results.show_table(results.read(run_dir / evaluate.STAGE))}\n")
    print(f"report: {report}\nmodel:  {gguf_file}\ntalk:   saigakit chat {shlex.quote(str(gguf_file))}", flush=True)
    return report


def find_notebooks() -> Path:
    """The notebooks of the repository, if saigakit runs from a checkout."""
    found = Path(saigakit.__file__).parent.parent / "notebooks"
    if not found.is_dir():
        raise SaigaError(
            f"No notebooks at {found}, because an installed saigakit does not include them. Get the directory "
            "notebooks/ of the saigakit repository and give its path with --notebooks."
        )
    return found


def read_stages(notebooks_dir: Path, given: Mapping[str, Any]) -> list[Stage]:
    """Assign values to notebooks: `name` for all that have this parameter, `02_train.name` for one."""
    notebooks = {name: notebooks_dir / f"{name}.ipynb" for name in summary.STAGES}
    defaults = {name: execution.read_parameters(notebook) for name, notebook in notebooks.items()}
    for stage, found in defaults.items():
        if "run_dir" not in found:
            raise SaigaError(f"{notebooks[stage]} needs a parameter run_dir in a cell tagged `parameters`.")
        del found["run_dir"]
    for name, value in given.items():
        _require_known(name, defaults)
        try:
            json.dumps(value)  # papermill can write these values into a notebook
        except TypeError:  # such as a date in YAML
            message = f"{name}={value!r} cannot be a parameter; use text, a number, true, false or null."
            raise SaigaError(message) from None
    stages = []
    for stage, found in defaults.items():
        own = {key: given[f"{stage}.{key}"] for key in found if f"{stage}.{key}" in given}
        stages.append(Stage(notebooks[stage], found, {key: given[key] for key in found if key in given} | own))
    return stages


def _require_known(name: str, defaults: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse unknown parameters, and those like `adapter` whose meaning depends on the notebook."""
    owners = {stage: found[name] for stage, found in defaults.items() if name in found}
    own = [f"{stage}.{key}" for stage, found in defaults.items() for key in found]
    if not owners and name not in own:
        known = sorted({key for found in defaults.values() for key in found})
        raise SaigaError(
            f"No notebook has a parameter {name!r}.{suggestion(name, [*known, *own])} They have: {', '.join(known)}."
        )
    if len(set(map(repr, owners.values()))) > 1:
        different = ", ".join(f"{stage}.{name} ({value!r})" for stage, value in owners.items())
        raise SaigaError(f"{name!r} means different things in different notebooks; use one of {different}.")


def _finish_all(stages: Sequence[Stage], run_dir: Path, screen: Screen, lock: int) -> None:
    finished: list[str] = []
    for number, stage in enumerate(stages, 1):
        try:
            _finish(stage, run_dir, finished, screen, label=f"[{number}/{len(stages)}]", lock=lock)
        except KeyboardInterrupt:
            done = f"finished stages: {', '.join(finished)}" if finished else "no stage was finished"
            screen.print_line(f"interrupted in {stage.name}; {done}. Run the same command to resume.", sys.stderr)
            raise
        finished.append(stage.name)


def _finish(stage: Stage, run_dir: Path, earlier: Sequence[str], screen: Screen, *, label: str, lock: int) -> None:
    """Run a stage unless it is up to date."""
    made_file, times_file = run_dir / _STATE / f"{stage.name}.json", run_dir / summary.TIMES_FILE
    times = summary.read_state(times_file)
    screen.begin(stage.name)
    execution.failed_file(run_dir, stage.name).unlink(missing_ok=True)
    fingerprint = _fingerprint(stage, run_dir, earlier)
    if _is_finished(run_dir / stage.name, made_file, fingerprint):
        screen.print_line(f"{label} {stage.name}: up to date, reusing it")
        return
    usual = f" (last time {execution.format_duration(times[stage.name])})" if stage.name in times else ""
    screen.print_line(f"{label} {stage.name} …{usual}")
    start = time.monotonic()
    execution.execute(stage.notebook, stage.given, run_dir, screen, lock)
    seconds = time.monotonic() - start
    write_text(times_file, json.dumps({**times, stage.name: round(seconds, 1)}))
    write_text(made_file, json.dumps({"fingerprint": fingerprint}))
    screen.print_line(f"{label} {stage.name}: done in {seconds:.0f} s")


def _fingerprint(stage: Stage, run_dir: Path, earlier: Sequence[str]) -> str:
    """Hash everything that a stage depends on."""
    cells = json.loads(stage.notebook.read_text(encoding="utf-8"))["cells"]
    dependencies = {
        "version": saigakit.__version__,
        "cells": [[cell["cell_type"], "".join(cell["source"])] for cell in cells],
        "values": stage.values,
        "files": {
            key: _fingerprint_path(value, run_dir)
            for key, value in stage.values.items()
            if isinstance(value, str | list)
        },
        "earlier": {name: sha256(run_dir / name / manifest.NAME) for name in earlier},
    }
    return hashlib.sha256(json.dumps(dependencies, sort_keys=True).encode()).hexdigest()


def _fingerprint_path(value: object, run_dir: Path) -> object:
    """Hash a file; of a directory, which may be a base model of 14 GB, take names, sizes and times. Else None."""
    if isinstance(value, list):
        return [_fingerprint_path(each, run_dir) for each in value]
    if not isinstance(value, str):
        return None
    if value.startswith("package:"):
        return packages.fingerprint()
    # os.path, because Path's methods raise for a text that is too long for a file name.
    given = Path(os.path.expanduser(value))  # noqa: PTH111
    for path in (given, run_dir / given):
        if os.path.isfile(path):  # noqa: PTH113
            return sha256(path)
    if not value or not os.path.isdir(given):  # noqa: PTH112
        return None
    here = given.resolve()
    if here.is_relative_to(run_dir) or run_dir.is_relative_to(here):  # a stage of this run, or a directory around it
        return None
    files = sorted(path for path in given.rglob("*") if path.is_file())
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def _is_finished(directory: Path, made_file: Path, fingerprint: str) -> bool:
    if summary.read_state(made_file).get("fingerprint") != fingerprint:
        return False
    try:
        content = manifest.require_stage(directory, directory.name)
    except SaigaError:  # says to run the stage again, which will happen
        return False
    return not manifest.changed(directory, content)
