"""Hash files, write them so that each is either complete or absent, and lock what a run uses."""

import errno
import glob
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path, PureWindowsPath

from saigakit.core import workspace
from saigakit.errors import SaigaError

_OF_A_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
_WITHOUT_NUMBER = r"\d requested and \d|I/O error"  # numpy's and safetensors' words
_LOCK, _INSIDE, _REPLACED = "lock", "files", ".replaced"  # in a temporary directory


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


@contextmanager
def explaining(place: Path) -> Iterator[None]:
    """Turn an OSError of writing `place` into a SaigaError; an error of an input stays as it is."""
    try:
        yield
    except OSError as error:
        named = Path(str(error.filename or place))
        is_ours = named.is_relative_to(place) or place.is_relative_to(named) or f"/.{place.name}." in named.as_posix()
        is_write = error.filename or error.errno in _OF_A_DISK or re.search(_WITHOUT_NUMBER, str(error))
        if not is_ours or not is_write:
            raise
        raise workspace.not_written(place, error) from None


def scratch() -> AbstractContextManager[Path]:
    """A temporary directory for gigabytes: unlike those of tempfile, the next one replaces that of a killed process."""
    return temporary_dir(workspace.scratch_dir() / "tmp", "scratch")


@contextmanager
def temporary_dir(parent: Path, name: str) -> Iterator[Path]:
    """Yield a new directory in `parent` and delete it at the end; begin with `discard_abandoned`."""
    with explaining(parent / name):
        parent.mkdir(parents=True, exist_ok=True)
        discard_abandoned(parent / name)
        directory, descriptor = Path(tempfile.mkdtemp(dir=parent, prefix=f".{name}.", suffix=".partial")), None
        try:
            (directory / _INSIDE).mkdir()
            with suppress(OSError, ModuleNotFoundError):  # Windows and some file systems have no locks
                if (descriptor := _try_lock(directory / _LOCK)) is not None:
                    os.write(descriptor, b"locked")  # only from now on can it be found abandoned
            yield directory / _INSIDE
        finally:
            if descriptor is not None:
                os.close(descriptor)
            _delete(directory)


def discard_abandoned(final: Path) -> None:
    """Delete the temporary directories that killed processes left next to `final`."""
    final = final.resolve()
    for lock in final.parent.glob(f".{glob.escape(final.name)}.*.partial/{_LOCK}"):
        with suppress(FileNotFoundError):  # its process has just deleted it
            if lock.stat().st_size and (descriptor := _try_lock(lock)) is not None:
                if (older := lock.with_name(_INSIDE) / _REPLACED).exists() and not final.exists():
                    older.rename(final)  # killed between two renames
                _delete(lock.parent)
                os.close(descriptor)


def _delete(directory: Path) -> None:
    for path in (directory / _INSIDE, directory):  # the lock last: this process may be killed too
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def replacing(final: Path) -> Iterator[Path]:
    """Yield a temporary path for a file or a directory. On success it is flushed to disk and renamed to `final`.

    Otherwise it is deleted and `final` stays as it was. A link stays one. Raises SaigaError if it cannot be written.
    """
    final = final.resolve()
    with temporary_dir(final.parent, final.name) as directory:
        partial = directory / final.name
        yield partial
        os.umask(umask := os.umask(0o077))
        for path in (*partial.rglob("*"), partial):
            if path.is_file() and not path.is_symlink():  # safetensors makes files that no other user can read
                path.chmod(path.stat().st_mode | (0o666 & ~umask))
            _fsync(path)
        if final.is_dir():
            final.rename(directory / _REPLACED)  # deleted with the temporary directory
        partial.replace(final)
        _fsync(final.parent)


def _fsync(path: Path) -> None:
    """Flush a file or directory to disk."""
    if os.name == "nt":  # which flushes only what is open for writing
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(file: Path, text: str) -> Path:
    """Replace `file` in one step; see `replacing`."""
    with replacing(file) as partial:
        partial.write_text(text, encoding="utf-8")
    return file


@contextmanager
def lock_file(file: Path, used: Path, patience_s: float) -> Iterator[int]:
    """Lock `file`, which is created and at the end removed. `used` is what it stands for: NFS locks only files.

    Yields the file descriptor, which keeps the lock as long as any process that inherited it lives.
    """
    deadline, is_reported = time.monotonic() + patience_s, False
    with explaining(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        while (descriptor := _try_lock(file)) is None:
            if time.monotonic() > deadline:
                raise SaigaError(f"Another run is using {used}. Wait for it, or choose another run_dir.")
            if not is_reported:
                print(f"Waiting for another run that is using {used} …", flush=True)
                is_reported = True
            time.sleep(0.1)
    try:
        yield descriptor
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)


def _try_lock(file: Path) -> int | None:
    import fcntl  # not on Windows, where chat and publishing work without it

    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), file.stat()):  # else the last owner has removed it
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    return None
