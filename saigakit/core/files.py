"""Hash files, and write them so that each is either complete or absent."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from saigakit.errors import SaigaError


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def require_absent(path: Path) -> None:
    if path.exists():
        raise SaigaError(f"{path} already exists; nothing was overwritten. Delete it or choose another name.")


def partial_of(final: Path) -> Path:
    """The temporary path, next to `final`, of a file or directory that is being written."""
    return final.with_name(f".{final.name}.partial")


def discard_partial(final: Path) -> Path:
    """Delete what a killed run left at the temporary path of `final`, and return that path."""
    partial = partial_of(final)
    if partial.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
    else:
        partial.unlink(missing_ok=True)
    return partial


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yield a temporary path to write to. On success it is flushed to disk and renamed to `file`.

    Otherwise it is deleted and `file` stays as it was. Raises SaigaError if the disk is full or fails.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = discard_partial(file)
        yield partial
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(file)
    except OSError as error:
        raise SaigaError(f"{file} could not be written: {error}.") from None
    finally:
        with suppress(OSError):
            partial_of(file).unlink(missing_ok=True)


def write_text(file: Path, text: str) -> Path:
    """Replace `file` in one step; see `replacing`."""
    with replacing(file) as partial:
        partial.write_text(text, encoding="utf-8")
    return file
