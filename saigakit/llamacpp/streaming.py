"""Tensors of a model into several GGUF files at once: chunks of rows are read, quantised and written on all cores."""

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

_NUMBERS = 1 << 20  # of a chunk, about: 4 MB in float32
_ROWS = 128  # a chunk's rows are a multiple: an adapter's product is computed in such blocks
_FLUSH_S = 0.25
_COPIES = 5  # float32 chunks that a worker holds at a time: the base's, the update, reordered, and one to spare
_READERS = 4  # at most so many cores have a chunk of their own, which bounds the memory
_to_disk = getattr(os, "fdatasync", os.fsync)  # macOS has the second one alone
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
Read = Callable[[str, slice], "Array"]


@dataclass(frozen=True)
class Target:
    """A file with its header written; its tensors' bytes begin at `start`."""

    file: Path
    types: Mapping[str, str]
    start: int


@dataclass(frozen=True)
class Written:
    """Some rows of a tensor as they went into a file; `total` is their checksum."""

    tensor: str
    offset: int
    size: int
    total: int


@dataclass(frozen=True)
class _Chunk:
    name: str
    rows: slice
    columns: int  # 1 of a vector
    is_matrix: bool

    @property
    def numbers(self) -> int:
        return int(self.rows.stop - self.rows.start) * self.columns


def workers() -> int:
    """One more than cores: while one waits for the disk, the others compute. More than a few share their rows out."""
    return min(quantization.cores(), _READERS) + 1


def memory(shapes: Mapping[str, "Shape"], whole_rows: int, files: int) -> int:
    """Bytes that `fill` holds at once, beside the pages of the files that it reads."""
    largest = max((chunk.numbers for chunk in _chunks(shapes, whole_rows)), default=0)
    return workers() * largest * 4 * (_COPIES + files)


def fill(
    targets: Sequence[Target],
    shapes: Mapping[str, "Shape"],
    read: Read,
    *,
    whole_rows: int = 1,
    importance: Mapping[str, "Array"] | None = None,
) -> list[list[Written]]:
    """Every tensor is read once, by chunks of a multiple of `whole_rows` rows, and goes into every file.

    Returns what went into each. Raises SaigaError that names the tensor where a number overflows its type.
    """
    work = _Work(_chunks(shapes, whole_rows))
    progress = _Progress(shapes, [target.types for target in targets])
    offsets = [container.offsets(shapes, target.types, target.start) for target in targets]
    written: list[list[Written]] = [[] for _ in targets]
    with ExitStack() as stack:
        spare = stack.enter_context(ThreadPoolExecutor(quantization.cores()))
        pool_of_rows = spare if quantization.cores() > _READERS else None
        files = [stack.enter_context(_opened(target, shapes)) for target in targets]

        def run() -> None:
            for chunk in work:
                try:
                    tensor = read(chunk.name, chunk.rows)
                    weights = (importance or {}).get(chunk.name)
                    for file, target, places, parts in zip(files, targets, offsets, written, strict=True):
                        ggml_type = target.types[chunk.name]
                        made = _bytes(tensor, ggml_type, weights, chunk, pool_of_rows)
                        offset = places[chunk.name] + _row_bytes(chunk, ggml_type) * chunk.rows.start
                        parts.append(Written(chunk.name, offset, len(made), checksum(made)))
                        _write_at(file, made, offset)
                    progress.add(chunk)
                except BaseException:
                    work.stop()
                    raise

        with _one_thread_each(), _flushed(files), ThreadPoolExecutor(workers()) as pool:
            try:
                running = [pool.submit(run) for _ in range(workers())]
                for one in running:
                    one.result()
            except BaseException:
                work.stop()
                raise
    return written


def _chunks(shapes: Mapping[str, "Shape"], whole_rows: int) -> Iterator[_Chunk]:
    unit = math.lcm(_ROWS, whole_rows)
    for name, shape in shapes.items():
        columns = math.prod(shape[1:])
        step = unit * max(1, _NUMBERS // (unit * columns))
        for first in range(0, shape[0], step):
            yield _Chunk(name, slice(first, min(first + step, shape[0])), columns, len(shape) > 1)


class _Work:
    """Chunks shared out among threads, in order, until one fails."""

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
def _opened(target: Target, shapes: Mapping[str, "Shape"]) -> Iterator[int]:
    """At its final length: what no tensor fills stays zero."""
    file = os.open(target.file, os.O_WRONLY)
    try:
        os.ftruncate(file, target.start + container.tensor_bytes(shapes, target.types))
        yield file
    finally:
        os.close(file)


@contextmanager
def _flushed(files: Sequence[int]) -> Iterator[None]:
    """What is written goes to the disk while the rest is computed, and all of it has at the end."""
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
def _one_thread_each() -> Iterator[None]:
    """Every core has a worker already; threads of torch's and of numpy's products would stand in their way.

    Measured: OpenBLAS's threads, which wait by spinning, took half of the processor time of an export.
    """
    import torch

    _keep_freed_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _keep_freed_memory() -> None:
    """A chunk that is freed is at hand for the next one, not given back to the system, which has to zero it anew.

    Measured: two threads that merge took half the time, or less where others were at work too.
    """
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:  # glibc's
        mallopt(_M_TRIM_THRESHOLD, 1 << 28)
        mallopt(_M_MMAP_THRESHOLD, 1 << 25)


def _row_bytes(chunk: _Chunk, ggml_type: str) -> int:
    return quantization.size((chunk.columns,), ggml_type) if chunk.is_matrix else 4


def _bytes(
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
    """The sum of the 8-byte words and the bytes of the rest, modulo 2**64: as fast as memory is read."""
    import numpy as np

    flat = np.frombuffer(content, np.uint8)
    whole = flat.size // 8 * 8
    words = np.add.reduce(flat[:whole].view(np.uint64), dtype=np.uint64)
    return (int(words) + int(np.add.reduce(flat[whole:], dtype=np.uint64))) % 2**64


def _write_at(file: int, content: memoryview, offset: int) -> None:
    while content:
        written = os.pwrite(file, content, offset)
        content, offset = content[written:], offset + written


class _Progress:
    """A line now and then."""

    def __init__(self, shapes: Mapping[str, "Shape"], types: Sequence[Mapping[str, str]]) -> None:
        self.types, self._lock, self._is_due = types, threading.Lock(), Every()
        self.total = sum(quantization.size(shape, each[name]) for each in types for name, shape in shapes.items())
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
