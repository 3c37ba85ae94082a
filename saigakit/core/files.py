"""Hash files, write them so that each is either complete or absent, and lock directories."""

import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PureWindowsPath

from saigakit.errors import SaigaError


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def inside(directory: Path, name: str) -> Path:
    """The path of a file that another file or machine names. Raises SaigaError if it leads out of `directory`."""
    path = PureWindowsPath(name)  # which knows "/" and drives too
    if path.anchor or ".." in path.parts or not path.parts or "\0" in name:
        raise SaigaError(
            f"{name!r} is outside {directory} or no name of a file; nothing was read. Check where it is from."
        )
    return directory / name


def require_absent(path: Path) -> None:
    if path.exists():
        raise SaigaError(f"{path} already exists; nothing was overwritten. Delete it or choose another name.")


def discard_partial(final: Path) -> Path:
    """The temporary path, next to `final`, of a file or directory; what a killed run left there is deleted."""
    partial = final.with_name(f".{final.name}.partial")
    if partial.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
    else:
        partial.unlink(missing_ok=True)
    return partial


def put_in_place(partial: Path, final: Path) -> None:
    """Rename `partial` to `final`, and delete an older directory only then."""
    replaced = final.with_name(f".{final.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.is_dir():
        final.rename(replaced)
    partial.replace(final)
    _fsync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _fsync(path: Path) -> None:
    """Flush a file or directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(final: Path) -> Iterator[Path]:
    """Yield a temporary path for a file or a directory. On success it is flushed to disk and renamed to `final`.

    Otherwise it is deleted and `final` stays as it was. Raises SaigaError if the disk is full or fails.
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        partial = discard_partial(final)
        yield partial
        for path in (*partial.rglob("*"), partial):
            _fsync(path)
        put_in_place(partial, final)
    except OSError as error:
        named = Path(str(error.filename or final))  # a failed write has no file name; that of an input is another
        is_ours = named.is_relative_to(final.parent) or final.is_relative_to(named)
        if isinstance(error, BrokenPipeError) or not is_ours:
            raise
        raise SaigaError(f"{final} could not be written: {error}.") from None
    finally:
        with suppress(OSError):
            discard_partial(final)


def write_text(file: Path, text: str) -> Path:
    """Replace `file` in one step; see `replacing`."""
    with replacing(file) as partial:
        partial.write_text(text, encoding="utf-8")
    return file


@contextmanager
def lock_directory(directory: Path, patience_s: float) -> Iterator[int]:
    """Create and lock `directory`, and remove it at the end if it is empty.

    Yields the file descriptor, which keeps the lock as long as any process that inherited it lives.
    """
    deadline, is_reported = time.monotonic() + patience_s, False
    while (descriptor := _try_lock(directory)) is None:
        if time.monotonic() > deadline:
            raise SaigaError(f"Another run is using {directory}. Wait for it, or choose another run_dir.")
        if not is_reported:
            print(f"Waiting for another run that is using {directory} …", flush=True)
            is_reported = True
        time.sleep(0.1)
    try:
        yield descriptor
    finally:
        with suppress(OSError):  # not empty
            directory.rmdir()
        os.close(descriptor)


def _try_lock(directory: Path) -> int | None:
    import fcntl  # not on Windows, where chat and publishing work without it

    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), directory.stat()):  # else the last owner has removed it
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    return None
