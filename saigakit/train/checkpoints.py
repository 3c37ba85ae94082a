"""Save training checkpoints atomically and find the newest intact one.

A checkpoint is a directory `step-NNNNNNNN`: `state/` is for transformers' Trainer, `best/` is the adapter with the
best evaluation so far, `log.jsonl` the log so far, and MARK, written last, lists the SHA-256 of every file.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saigakit.core import manifest, workspace
from saigakit.core.files import discard_abandoned, lock_file, replacing
from saigakit.core.lazy import safetensors
from saigakit.core.manifest import Manifest
from saigakit.errors import SaigaError
from saigakit.train import curve

MARK = "checkpoint.json"
STATE, BEST, LOG = "state", "best", curve.LOG_FILE
IN_STAGE = "checkpoint"  # the last one, kept inside a stage that ran out of time
_NAME = re.compile(r"step-(\d{8})")
# Beginnings of file names. Without one of these transformers resumes silently, with different results.
_IN_STATE = ("adapter_config", "adapter_model", "optimizer", "scheduler", "trainer_state", "rng_state")
_REQUIRED = (*(f"{STATE}/{name}" for name in _IN_STATE), LOG)
# Settings that do not change the result. Inputs are identified by their hashes, not by their paths.
NOT_IDENTITY = (
    "adapter",
    "base_source",
    "max_hours",
    "processes",
    "resume_from",
    "save_minutes",
    "save_steps",
    "sharding",
)


def directory_for(stage_dir: Path) -> Path:
    """The directory next to an unfinished stage that holds its checkpoints."""
    return stage_dir.with_name(f"{stage_dir.name}.checkpoints")


def identity(parameters: Mapping[str, Any], inputs: Mapping[str, Any]) -> Manifest:
    """The parameters and input hashes that a checkpoint belongs to."""
    kept = {name: value for name, value in parameters.items() if name not in NOT_IDENTITY}
    return manifest.as_stored({"parameters": kept, "inputs": inputs})


@dataclass(frozen=True)
class Store:
    directory: Path
    identity: Manifest

    @property
    def best_dir(self) -> Path:
        """The adapter with the best evaluation so far, complete or absent."""
        return self.directory / BEST

    def lock(self, patience_s: float) -> AbstractContextManager[int]:
        """Lock out other processes: a run whose caller was killed may still be saving."""
        return lock_file(self.directory.with_name(f".{self.directory.name}.lock"), self.directory, patience_s)

    def write(self, step: int, fill: Callable[[Path], None], *, needed: int) -> Path:
        """Save a checkpoint, then delete older ones. `fill` writes state/ and the log into an empty directory.

        Raises SaigaError with the bytes needed and free if it cannot be written; older checkpoints then stay.
        """
        made = self.directory / f"step-{step:08d}"
        with _writing(made, f"The checkpoint of step {step}", needed) as partial:
            fill(partial)
            if self.best_dir.is_dir():
                shutil.copytree(self.best_dir, partial / BEST)
            facts = {"versions": manifest.versions(), "outputs": manifest.hashes(partial)}
            content = {"step": step, **self.identity, **facts}
            (partial / MARK).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
        for other in _checkpoints_in(self.directory):
            if other != made:
                shutil.rmtree(other)
        return made

    def keep_best(self, fill: Callable[[Path], None], *, needed: int) -> None:
        """Save the best adapter so far. Like `write` it calls `fill` and may raise SaigaError."""
        with _writing(self.best_dir, "The best adapter so far", needed) as partial:
            fill(partial)

    def adopt(self, checkpoint: Path) -> Path:
        """Copy a checkpoint from elsewhere into this store, and restore the best adapter that it holds."""
        here = self.directory / f"step-{step_of(checkpoint):08d}"
        needed = sum(file.stat().st_size for file in checkpoint.rglob("*"))
        if here != checkpoint:
            with _writing(here, f"A copy of {checkpoint}", needed) as partial:
                _copy(checkpoint, partial)
        shutil.rmtree(self.best_dir, ignore_errors=True)  # may be from a later step
        if (here / BEST).is_dir():
            self.keep_best(lambda partial: _copy(here / BEST, partial), needed=needed)
        return here

    def find_newest(self, *sources: Path) -> Path | None:
        """Find the intact checkpoint of the highest step here and in `sources`, which are stages or stores.

        Damaged checkpoints are reported and skipped. Raises SaigaError for a checkpoint of another run; with
        SAIGAKIT_REPLACE=1 one in this store is deleted instead.
        """
        for left in self.directory.glob(".*.*.partial"):  # of a run that was killed while saving
            discard_abandoned(self.directory / left.name.split(".")[1])
        for path in intact(self.directory, *sources):
            differing = manifest.differences(read_mark(path), self.identity)
            if not differing:
                return path
            mismatch = f"{path} is a checkpoint of another run ({'; '.join(differing)})"
            if path.parent != self.directory or not manifest.is_replacing():
                raise SaigaError(f"{mismatch}. Use the same settings, delete {path} or choose another run_dir.")
            print(f"{mismatch}; deleting it.", flush=True)
            shutil.rmtree(path)
        return None

    def delete(self) -> None:
        shutil.rmtree(self.directory.resolve(), ignore_errors=True)  # it may be a link to a larger disk


def intact(*sources: Path) -> Iterator[Path]:
    """The checkpoints in stages or stores, the highest step first; damaged ones are reported. Changes nothing."""
    found = [path for source in sources for path in _checkpoints_in(source)]
    for path in sorted(found, key=step_of, reverse=True):
        if (problem := find_problem(path)) is None:
            yield path
        else:
            print(f"Skipping checkpoint {path}: {problem}.", flush=True)


def step_of(checkpoint: Path) -> int:
    """Read the step from the name, or from the mark of a renamed copy; -1 if that is damaged too."""
    if found := _NAME.fullmatch(checkpoint.name):
        return int(found[1])
    try:
        return int(read_mark(checkpoint)["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1


def find_problem(checkpoint: Path) -> str | None:
    """Say why training cannot resume from it; None if it is intact."""
    try:
        mark = read_mark(checkpoint)
        if not manifest.has_objects(mark, "outputs", "parameters", "inputs", "versions") or "step" not in mark:
            raise ValueError("it is not the mark of a checkpoint")
        damaged = manifest.changed(checkpoint, mark)
    except FileNotFoundError:
        return f"it is incomplete, {MARK} is missing"
    except (OSError, ValueError, KeyError, TypeError, SaigaError) as error:
        return f"its {MARK} is damaged ({error})"
    if absent := [name for name in _REQUIRED if not any(file.startswith(name) for file in mark["outputs"])]:
        return f"{', '.join(absent)} is missing"
    return f"{', '.join(damaged)} changed since it was written" if damaged else None


def _checkpoints_in(source: Path) -> list[Path]:
    """List intact and damaged checkpoints: `source` itself, the one in a stage, or those of a store."""
    if not source.is_dir():
        return []
    if (source / MARK).is_file() or _NAME.fullmatch(source.name):
        return [source]
    if (source / IN_STAGE).is_dir():
        return [source / IN_STAGE]
    return sorted(path for path in source.iterdir() if path.is_dir() and _NAME.fullmatch(path.name))


def read_mark(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / MARK).read_text(encoding="utf-8"))  # type: ignore[no-any-return]


@contextmanager
def _writing(final: Path, what: str, needed: int) -> Iterator[Path]:
    """Replace a directory, of the same step or the best so far: not the one to resume from. `needed`: bytes."""
    free = workspace.free_disk(final)
    try:
        with replacing(final) as partial:
            partial.mkdir()
            yield partial
    # torch reports a full disk as RuntimeError.
    except (SaigaError, OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise SaigaError(
            f"{what} cannot be written to {final.parent}: it needs {needed:,} bytes, and {free:,} were free ({error}). "
            "Earlier checkpoints are intact. Free some disk space, then run again with the same run_dir to resume."
        ) from None


def _copy(source: Path, target: Path) -> None:
    """Copy without permissions: attached inputs are read-only."""
    for file in filter(Path.is_file, source.rglob("*")):
        (copied := target / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copied)
