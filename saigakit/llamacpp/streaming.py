"""Write GGUF files: the header, and the tensors of several files at once, in chunks of rows on all cores."""

import ctypes
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from saigakit.core import workspace
from saigakit.core.display import Every
from saigakit.core.lazy import gguf, np, torch
from saigakit.errors import SaigaError
from saigakit.llamacpp import quantization
from saigakit.weights.tensors import Array, Bytes, Shape

_NUMBERS = 1 << 20  # per chunk, approximately: 4 MB in float32
_ALIGNMENT = 32  # GGUF's default: each tensor starts at a multiple of it
_ROWS = 128  # a chunk has a multiple of them: an adapter's product is computed in such blocks
_FLUSH_S = 0.25
_COPIES = 5  # float32 chunks that a worker holds: base, update, reordered, and spare
_MOST_CORES = 16  # that work on chunks, to bound the memory
_to_disk = getattr(os, "fdatasync", os.fsync)  # macOS has only fsync
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
ReadRows = Callable[[str, slice], Array]


@dataclass(frozen=True)
class Target:
    """A file with its header written; the bytes of its tensors begin at `start`."""

    file: Path
    types: Mapping[str, str]
    start: int


@dataclass(frozen=True)
class Written:
    """Where the header or rows of a tensor were written, with their checksum."""

    name: str
    offset: int
    size: int
    checksum: int


@dataclass(frozen=True)
class _Chunk:
    name: str
    rows: slice
    columns: int  # 1 for a vector, which is always in float32

    @property
    def numbers(self) -> int:
        return int(self.rows.stop - self.rows.start) * self.columns


def total_bytes(metadata_bytes: int, shapes: Mapping[str, Shape], types: Mapping[str, str]) -> int:
    """Bytes of the file; `metadata_bytes` is the size that `write_header` gives a file without tensors."""
    table = sum(8 + len(name.encode()) + 4 + 8 * len(shape) + 4 + 8 for name, shape in shapes.items())
    _, end = _layout(shapes, types, _padded(metadata_bytes + table))
    return end


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def write_header(writer: "gguf.GGUFWriter", shapes: Mapping[str, Shape], types: Mapping[str, str]) -> int:
    """Write metadata and the table of tensors; returns the offset where their bytes start."""
    for name, shape in shapes.items():
        size, number = quantization.tensor_bytes(shape, types[name]), gguf.GGMLQuantizationType[types[name]]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=number)
    writer.write_header_to_file()
    with closing(writer):
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        stream = (writer.fout or [])[0]
        stream.flush()
        return _padded(stream.tell())


def _layout(shapes: Mapping[str, Shape], types: Mapping[str, str], start: int) -> tuple[dict[str, int], int]:
    """Where each tensor starts, the first one at `start`, and where the file ends."""
    offsets = {}
    for name, shape in shapes.items():
        offsets[name] = start
        start += _padded(quantization.tensor_bytes(shape, types[name]))
    return offsets, start


def workers() -> int:
    """One more than the cores that are used: while one waits for the disk, the others compute."""
    return min(quantization.usable_cores(), _MOST_CORES) + 1


def memory_needed(shapes: Mapping[str, Shape], row_multiple: int, files: int) -> int:
    """Bytes that `write_tensors` allocates, without the page cache of the files that it reads."""
    largest = max((chunk.numbers for chunk in _chunks(shapes, row_multiple)), default=0)
    return workers() * largest * 4 * (_COPIES + files)


def write_tensors(
    targets: Sequence[Target],
    shapes: Mapping[str, Shape],
    read: ReadRows,
    *,
    row_multiple: int = 1,
    importance: Mapping[str, Array] | None = None,
) -> list[list[Written]]:
    """Read every tensor once, in chunks of a multiple of `row_multiple` rows.

    Returns the parts of each file, the header first.
    """
    layouts = [_layout(shapes, target.types, target.start) for target in targets]
    with ExitStack() as stack:
        files = [stack.enter_context(target.file.open("r+b", buffering=0)).fileno() for target in targets]
        for file, (_, end) in zip(files, layouts, strict=True):
            os.ftruncate(file, end)  # the final length: padding stays zero
        headers = [os.pread(file, target.start, 0) for file, target in zip(files, targets, strict=True)]

        def write_chunk(chunk: _Chunk) -> list[Written]:
            tensor, weights = read(chunk.name, chunk.rows), (importance or {}).get(chunk.name)
            parts = []
            for file, target, (starts, _) in zip(files, targets, layouts, strict=True):
                ggml_type = target.types[chunk.name]
                content = _encode(chunk.name, tensor, ggml_type, weights)
                offset = starts[chunk.name] + quantization.tensor_bytes((chunk.columns,), ggml_type) * chunk.rows.start
                parts.append(Written(chunk.name, offset, len(content), checksum(content)))
                _write_at(file, content, offset)
            return parts

        with _single_threaded_torch(), _flushing(files), ThreadPoolExecutor(workers()) as workers_pool:
            try:
                results = workers_pool.map(write_chunk, _chunks(shapes, row_multiple))
                written = _collect(results, sum(end for _, end in layouts))
            except BaseException:
                workers_pool.shutdown(wait=False, cancel_futures=True)
                raise
    return [
        [Written("the header", 0, len(header), checksum(header)), *(parts[index] for parts in written)]
        for index, header in enumerate(headers)
    ]


def _chunks(shapes: Mapping[str, Shape], row_multiple: int) -> Iterator[_Chunk]:
    unit = math.lcm(_ROWS, row_multiple)
    for name, shape in shapes.items():
        columns = math.prod(shape[1:])
        step = unit * max(1, _NUMBERS // (unit * columns))
        for first in range(0, shape[0], step):
            yield _Chunk(name, slice(first, min(first + step, shape[0])), columns)


def _collect(results: Iterable[list[Written]], total: int) -> list[list[Written]]:
    """Wait for all chunks, reporting progress every few seconds."""
    is_due, collected, done = Every(), [], 0
    for parts in results:
        collected.append(parts)
        done += sum(part.size for part in parts)
        if is_due():
            left = is_due.left(done, total)
            sizes = f"{done / workspace.GB:.2f} of {total / workspace.GB:.2f} GB"
            print(f"{sizes} written, about {left:.0f} s left", flush=True)
    return collected


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
    # Let malloc reuse freed chunks, which the system would have to zero: two threads merged in half the time.
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:  # glibc's
        mallopt(_M_TRIM_THRESHOLD, 1 << 28)
        mallopt(_M_MMAP_THRESHOLD, 1 << 25)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _encode(name: str, tensor: Array, ggml_type: str, importance: "Array | None") -> memoryview:
    if ggml_type == "F32":
        return np.ascontiguousarray(tensor, np.float32).data.cast("B")
    try:
        return quantization.quantise(tensor, ggml_type, importance).data.cast("B")
    except SaigaError as error:
        raise SaigaError(f"{name}: {error}") from None


def checksum(content: "bytes | memoryview | Bytes") -> int:
    """The sum of 8-byte words and remaining bytes modulo 2**64, as fast as memory is read."""
    flat = np.frombuffer(content, np.uint8)
    end = flat.size // 8 * 8
    words = np.add.reduce(flat[:end].view(np.uint64), dtype=np.uint64)
    return (int(words) + int(np.add.reduce(flat[end:], dtype=np.uint64))) % 2**64


def _write_at(file: int, content: memoryview, offset: int) -> None:
    while content:
        written = os.pwrite(file, content, offset)
        content, offset = content[written:], offset + written
