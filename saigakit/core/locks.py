"""Lock a directory against other processes."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from saigakit.errors import SaigaError


@contextmanager
def lock_directory(directory: Path, patience_s: float) -> Iterator[int]:
    """Create and lock `directory`, and remove it at the end if it is empty.

    Yields the file descriptor, which keeps the lock as long as any process that inherited it lives. Raises SaigaError
    if another process keeps it for `patience_s`.
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
