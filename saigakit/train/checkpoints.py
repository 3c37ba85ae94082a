"""The state of a training run into checkpoints that are whole or absent, and the newest whole one found again.

A checkpoint is a directory `step-NNNNNNNN`: `state/` is what transformers' Trainer reads, `best/` the adapter of the
best evaluation so far, `log.jsonl` the log so far, and MARK, written last, holds the SHA-256 of every file.
"""

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from saigakit.core import manifest, workspace
from saigakit.core.files import discard_partial, sha256, write_text
from saigakit.errors import SaigaError

MARK = "checkpoint.json"
STATE, BEST, LOG = "state", "best", "log.jsonl"
IN_STAGE = "checkpoint"  # the last one, in a stage that ended by time
_STORE_FILE = "checkpoints.json"
_NAME = re.compile(r"step-(\d{8})")
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_NEEDED = {  # what transformers would go on without, silently and differently
    **{f"{STATE}/{name}": "the adapter" for name in _ADAPTER},
    f"{STATE}/optimizer.pt": "the optimizer's state",
    f"{STATE}/scheduler.pt": "the schedule's state",
    f"{STATE}/trainer_state.json": "the step",
    LOG: "the log",
}
# Settings that say where, how long and on what a run computes, not what: the inputs are known by their content.
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
Identity = dict[str, Any]


def beside(stage_dir: Path) -> Path:
    """Where the checkpoints of an unfinished stage are."""
    return stage_dir.with_name(f"{stage_dir.name}.checkpoints")


def identity(parameters: Mapping[str, Any], inputs: Mapping[str, Any]) -> Identity:
    """What a checkpoint belongs to; `inputs` are hashes."""
    kept = {name: value for name, value in parameters.items() if name not in NOT_IDENTITY}
    return json.loads(json.dumps({"parameters": kept, "inputs": inputs}, default=str))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Store:
    """The checkpoints of one run, all of one identity."""

    directory: Path
    identity: Identity

    def for_child(self, directory: Path) -> Path:
        """The file by which the child process knows its store."""
        content = {"directory": str(self.directory.absolute()), "identity": self.identity}
        return write_text(directory / _STORE_FILE, json.dumps(content))

    @classmethod
    def of_parent(cls, directory: Path) -> Self:
        content = json.loads((directory / _STORE_FILE).read_text(encoding="utf-8"))
        return cls(Path(content["directory"]), content["identity"])

    @property
    def best_dir(self) -> Path:
        """The adapter of the best evaluation so far, whole or absent."""
        return self.directory / BEST

    @contextlib.contextmanager
    def alone(self, patience_s: float) -> Iterator[None]:
        """Of all processes: a run whose caller was killed may still be saving. Raises SaigaError after `patience_s`."""
        until, is_said = time.monotonic() + patience_s, False
        while (opened := self._locked()) is None:
            if time.monotonic() > until:
                raise SaigaError(f"Another run is at work in {self.directory}. Wait for it, or choose another run_dir.")
            if not is_said:
                print(f"Waiting for another run that is at work in {self.directory} …", flush=True)
                is_said = True
            time.sleep(0.1)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # there is something in it
                self.directory.rmdir()
            os.close(opened)

    def _locked(self) -> int | None:
        """The open directory, None where another process has it."""
        import fcntl  # which Windows has not, where publishing works all the same

        self.directory.mkdir(parents=True, exist_ok=True)
        opened = os.open(self.directory, os.O_RDONLY)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(opened), self.directory.stat()):  # else its last owner has removed it
                return opened
        except (BlockingIOError, FileNotFoundError):
            pass
        os.close(opened)
        return None

    def write(self, step: int, fill: Callable[[Path], None], *, needed: int) -> Path:
        """`fill` writes state/ and the log into an empty directory; older checkpoints go when this one is complete.

        Raises SaigaError with the bytes needed and free where it cannot be written; what was there before stays.
        """

        def fill_all(partial: Path) -> None:
            fill(partial)
            if self.best_dir.is_dir():
                shutil.copytree(self.best_dir, partial / BEST, copy_function=_link)
            content = {"step": step, **self.identity, "versions": manifest.versions(), "files": _files(partial)}
            (partial / MARK).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")

        made = _whole(self.directory / f"step-{step:08d}", fill_all, f"The checkpoint of step {step}", needed)
        for other in _in(self.directory):
            if other != made:
                shutil.rmtree(other)
        return made

    def keep_best(self, fill: Callable[[Path], None], *, needed: int) -> None:
        """`fill` writes an adapter into an empty directory. Raises SaigaError as `write` does."""
        _whole(self.best_dir, fill, "The best adapter so far", needed)

    def bring(self, checkpoint: Path) -> Path:
        """A whole checkpoint into this store, by copying where it is from elsewhere; with its best adapter."""
        here = self.directory / f"step-{step_of(checkpoint):08d}"
        needed = sum(entry["bytes"] for entry in _mark(checkpoint)["files"].values())
        if here != checkpoint:
            _whole(here, lambda partial: _copy(checkpoint, partial), f"A copy of {checkpoint}", needed)
        shutil.rmtree(self.best_dir, ignore_errors=True)  # it may be of a later step
        if (here / BEST).is_dir():
            self.keep_best(lambda partial: _copy(here / BEST, partial), needed=needed)
        return here

    def newest(self, *sources: Path) -> Path | None:
        """The whole checkpoint of the highest step, here and in `sources`: stages that ended by time, or stores.

        What is damaged or lacks something is named in a printed line, and the one before it is taken. Raises
        SaigaError for a checkpoint of another run; with SAIGAKIT_REPLACE=1 one in this store is only named.
        """
        found = [(path, source) for source in (self.directory, *sources) for path in _in(source)]
        for path, source in sorted(found, key=lambda item: step_of(item[0]), reverse=True):
            if (problem := problem_of(path)) is not None:
                print(f"{path} is not used: {problem}.", flush=True)
                continue
            differing = manifest.differences(_mark(path), self.identity)
            if not differing:
                return path
            said = f"{path} is a checkpoint of another run ({'; '.join(differing)})"
            if source != self.directory or not manifest.is_replacing():
                raise SaigaError(f"{said}. Use the same settings, delete {source} or choose another run_dir.")
            print(f"{said}: not used.", flush=True)
            shutil.rmtree(path)
        return None

    def delete(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)


def step_of(checkpoint: Path) -> int:
    """Of a copy without the name, by its mark; -1 where that is damaged too."""
    if found := _NAME.fullmatch(checkpoint.name):
        return int(found[1])
    try:
        return int(_mark(checkpoint)["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1


def problem_of(checkpoint: Path) -> str | None:
    """Why it cannot be gone on from, None where it is whole."""
    try:
        mark = _mark(checkpoint)
        files, _ = mark["files"], (mark["step"], mark["parameters"], mark["inputs"], mark["versions"])
    except FileNotFoundError:
        return f"it is not complete: it has no {MARK}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MARK} is damaged ({error})"
    for name, what in _NEEDED.items():
        if name not in files:
            return f"it lacks {what} ({name})"
    if not any(name.startswith(f"{STATE}/rng_state") for name in files):
        return f"it lacks the state of the random numbers ({STATE}/rng_state)"
    for name, entry in files.items():
        file = checkpoint / name
        if not file.is_file():
            return f"it lost {name}"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size:,} bytes and had {entry['bytes']:,}"
        if sha256(file) != entry["sha256"]:
            return f"{name} is damaged: its content changed"
    return None


def made_with(checkpoint: Path) -> dict[str, str]:
    """Versions of the libraries."""
    return dict(_mark(checkpoint)["versions"])


def processes_of(checkpoint: Path) -> int:
    """That wrote it: each has its own random numbers."""
    return len(list((checkpoint / STATE).glob("rng_state*")))


def _in(source: Path) -> list[Path]:
    """Checkpoints, whole or not: `source` itself, the one inside a stage, or those of a store."""
    if not source.is_dir():
        return []
    if (source / MARK).is_file() or _NAME.fullmatch(source.name):
        return [source]
    if (source / IN_STAGE).is_dir():
        return [source / IN_STAGE]
    return sorted(path for path in source.iterdir() if path.is_dir() and _NAME.fullmatch(path.name))


def _mark(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / MARK).read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def _files(directory: Path) -> dict[str, dict[str, Any]]:
    return {
        name: {"sha256": digest, "bytes": (directory / name).stat().st_size}
        for name, digest in manifest.hashes(directory).items()
    }


def _whole(final: Path, fill: Callable[[Path], None], what: str, needed: int) -> Path:
    """Filled beside, flushed to disk, renamed. `needed`: bytes."""
    from safetensors import SafetensorError

    partial = discard_partial(final)
    try:
        partial.mkdir(parents=True)
        fill(partial)
        for path in (*partial.rglob("*"), partial):
            _flush(path)
        if final.exists():  # of the same step, or the best so far: not what a run goes on from
            replaced = final.with_name(f".{final.name}.replaced")
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        partial.rename(final)
        _flush(final.parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch tells of a full disk as a RuntimeError
        free = workspace.free_disk(final)  # before the part that was written goes
        shutil.rmtree(partial, ignore_errors=True)
        raise SaigaError(
            f"{what} cannot be written to {final.parent}: it needs {needed:,} bytes, and {free:,} are free ({error}). "
            "What was saved before is whole. Make room there, then call it again with the same run_dir to go on."
        ) from None
    shutil.rmtree(final.with_name(f".{final.name}.replaced"), ignore_errors=True)
    return final


def _flush(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _copy(source: Path, target: Path) -> None:
    """Without the permissions: an attached input is read-only."""
    shutil.copytree(source, target, copy_function=shutil.copyfile, dirs_exist_ok=True)
    for path in (target, *target.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
