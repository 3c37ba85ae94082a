"""Read, quantise and write a model's tensors to several GGUF files at once, in chunks of rows on all cores."""

import ctypes
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from saigakit.core import workspace
from saigakit.core.display import Every
from saigakit.errors import SaigaError
from saigakit.llamacpp import container, quantization

if TYPE_CHECKING:
    from saigakit.llamacpp.quantization import Bytes
    from saigakit.weights.tensors import Array, Shape

_NUMBERS = 1 << 20  # per chunk, approximately: 4 MB in float32
_ROWS = 128  # a chunk has a multiple of them: an adapter's product is computed in such blocks
_FLUSH_S = 0.25
_COPIES = 5  # float32 chunks that a worker holds: base, update, reordered, and spare
_READERS = 4  # most cores that work on chunks of their own, to bound the memory
_to_disk = getattr(os, "fdatasync", os.fsync)  # macOS has only fsync
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
ReadRows = Callable[[str, slice], "Array"]


@dataclass(frozen=True)
class Target:
    """A file with its header written; the bytes of its tensors begin at `start`."""

    file: Path
    types: Mapping[str, str]
    start: int


@dataclass(frozen=True)
class Written:
    """Where rows of a tensor were written, with their checksum."""

    tensor: str
    offset: int
    size: int
    checksum: int


@dataclass(frozen=True)
class _Chunk:
    name: str
    rows: slice
    columns: int  # 1 for a vector
    is_matrix: bool

    @property
    def numbers(self) -> int:
        return int(self.rows.stop - self.rows.start) * self.columns


def workers() -> int:
    """One more than the cores that read chunks: while one waits for the disk, the others compute."""
    return min(quantization.usable_cores(), _READERS) + 1


def memory_needed(shapes: Mapping[str, "Shape"], row_multiple: int, files: int) -> int:
    """Bytes that `write_tensors` allocates, without the page cache of the files that it reads."""
    largest = max((chunk.numbers for chunk in _chunks(shapes, row_multiple)), default=0)
    return workers() * largest * 4 * (_COPIES + files)


def write_tensors(
    targets: Sequence[Target],
    shapes: Mapping[str, "Shape"],
    read: ReadRows,
    *,
    row_multiple: int = 1,
    importance: Mapping[str, "Array"] | None = None,
) -> list[list[Written]]:
    """Read every tensor once, in chunks of a multiple of `row_multiple` rows, and write it to every file.

    Returns the parts written to each file. Raises SaigaError that names the tensor if a number overflows its type.
    """
    work = _Work(_chunks(shapes, row_multiple))
    progress = _Progress(shapes, [target.types for target in targets])
    offsets = [container.tensor_offsets(shapes, target.types, target.start) for target in targets]
    written: list[list[Written]] = [[] for _ in targets]
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(quantization.usable_cores()))
        row_pool = pool if quantization.usable_cores() > _READERS else None
        files = [stack.enter_context(_open_for_writing(target, shapes)) for target in targets]

        def run() -> None:
            for chunk in work:
                try:
                    tensor = read(chunk.name, chunk.rows)
                    weights = (importance or {}).get(chunk.name)
                    for file, target, starts, parts in zip(files, targets, offsets, written, strict=True):
                        ggml_type = target.types[chunk.name]
                        content = _encode(tensor, ggml_type, weights, chunk, row_pool)
                        offset = starts[chunk.name] + _row_bytes(chunk, ggml_type) * chunk.rows.start
                        parts.append(Written(chunk.name, offset, len(content), checksum(content)))
                        _write_at(file, content, offset)
                    progress.add(chunk)
                except BaseException:
                    work.stop()
                    raise

        with _single_threaded_torch(), _flushing(files), ThreadPoolExecutor(workers()) as workers_pool:
            try:
                for running in [workers_pool.submit(run) for _ in range(workers())]:
                    running.result()
            except BaseException:
                work.stop()
                raise
    return written


def _chunks(shapes: Mapping[str, "Shape"], row_multiple: int) -> Iterator[_Chunk]:
    unit = math.lcm(_ROWS, row_multiple)
    for name, shape in shapes.items():
        columns = math.prod(shape[1:])
        step = unit * max(1, _NUMBERS // (unit * columns))
        for first in range(0, shape[0], step):
            yield _Chunk(name, slice(first, min(first + step, shape[0])), columns, len(shape) > 1)


class _Work:
    """Hands out chunks to threads in order, until one fails."""

    def __init__(self, chunks: Iterator[_Chunk]) -> None:
        self._chunks, self._lock, self._stopped = chunks, threading.Lock(), False

    def __iter__(self) -> Iterator[_Chunk]:
        while True:
            with self._lock:
                chunk = None if self._stopped else next(self._chunks, None)
            if chunk is None:
                return
            yield chunk

    def stop(self) -> None:
        self._stopped = True


@contextmanager
def _open_for_writing(target: Target, shapes: Mapping[str, "Shape"]) -> Iterator[int]:
    """Open the file at its final length: padding stays zero."""
    file = os.open(target.file, os.O_WRONLY)
    try:
        os.ftruncate(file, target.start + container.data_bytes(shapes, target.types))
        yield file
    finally:
        os.close(file)


@contextmanager
def _flushing(files: Sequence[int]) -> Iterator[None]:
    """Flush the files to disk while the rest is computed, and once more at the end."""
    ended = threading.Event()

    def flush() -> None:
        is_last = False
        while not is_last:
            is_last = ended.wait(_FLUSH_S)
            for file in files:
                _to_disk(file)

    with ThreadPoolExecutor(1) as pool:
        flushing = pool.submit(flush)
        try:
            yield
        finally:
            ended.set()
        flushing.result()


@contextmanager
def _single_threaded_torch() -> Iterator[None]:
    """Every core has a worker already, so further threads would only compete with them."""
    import torch

    _keep_freed_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _keep_freed_memory() -> None:
    """Make malloc reuse freed chunks instead of returning them to the system, which must zero new ones.

    Measured: two threads that merge took half the time, and less next to other processes.
    """
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:  # glibc's
        mallopt(_M_TRIM_THRESHOLD, 1 << 28)
        mallopt(_M_MMAP_THRESHOLD, 1 << 25)


def _row_bytes(chunk: _Chunk, ggml_type: str) -> int:
    return quantization.tensor_bytes((chunk.columns,), ggml_type) if chunk.is_matrix else 4


def _encode(
    tensor: "Array", ggml_type: str, importance: "Array | None", chunk: _Chunk, pool: Executor | None
) -> memoryview:
    import numpy as np

    if not chunk.is_matrix or ggml_type == "F32":
        return np.ascontiguousarray(tensor, np.float32).data.cast("B")
    try:
        return quantization.quantise(tensor, ggml_type, importance, pool).data.cast("B")
    except SaigaError as error:
        raise SaigaError(f"{chunk.name}: {error}") from None


def checksum(content: "memoryview | Bytes") -> int:
    """The sum of 8-byte words and remaining bytes modulo 2**64, as fast as memory is read."""
    import numpy as np

    flat = np.frombuffer(content, np.uint8)
    end = flat.size // 8 * 8
    words = np.add.reduce(flat[:end].view(np.uint64), dtype=np.uint64)
    return (int(words) + int(np.add.reduce(flat[end:], dtype=np.uint64))) % 2**64


def _write_at(file: int, content: memoryview, offset: int) -> None:
    while content:
        written = os.pwrite(file, content, offset)
        content, offset = content[written:], offset + written


class _Progress:
    """Prints a line every few seconds."""

    def __init__(self, shapes: Mapping[str, "Shape"], types: Sequence[Mapping[str, str]]) -> None:
        self.types, self._lock, self._is_due = types, threading.Lock(), Every()
        self.total = sum(
            quantization.tensor_bytes(shape, each[name]) for each in types for name, shape in shapes.items()
        )
        self.written = 0

    def add(self, chunk: _Chunk) -> None:
        rows = chunk.rows.stop - chunk.rows.start
        with self._lock:
            self.written += sum(_row_bytes(chunk, each[chunk.name]) * rows for each in self.types)
            if not self._is_due():
                return
            left = self._is_due.left(self.written, self.total)
        print(
            f"{self.written / workspace.GB:.2f} of {self.total / workspace.GB:.2f} GB written, about {left:.0f} s left",
            flush=True,
        )
