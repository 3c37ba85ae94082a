"""Write files so that they are complete or absent, and hash them."""

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
    """Raises SaigaError if it exists already."""
    if path.exists():
        raise SaigaError(f"{path} is there already; nothing was overwritten. Delete it or choose another name.")


def partial_of(final: Path) -> Path:
    """The temporary name, next to `final`, of what is still being written."""
    return final.with_name(f".{final.name}.partial")


def discard_partial(final: Path) -> Path:
    """The temporary name of a file or directory, free again if a killed run left something under it."""
    partial = partial_of(final)
    if partial.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
    else:
        partial.unlink(missing_ok=True)
    return partial


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary name to write to. When the block ends well it is flushed to disk and renamed to `file`.

    Otherwise it is removed, and `file` stays as it was. Raises SaigaError if the disk does not take it.
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
    """Replaces `file` as a whole; see `replacing`."""
    with replacing(file) as partial:
        partial.write_text(text, encoding="utf-8")
    return file
