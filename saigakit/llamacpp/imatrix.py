"""Token ids of the user's records into an importance matrix: how much each column of a weight matters to quantising."""

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from saigakit.core.files import replacing, require_absent
from saigakit.errors import SaigaError

if TYPE_CHECKING:
    import gguf

    from saigakit.weights.tensors import Array, Shape

_SUMS, _COUNTS = ".in_sum2", ".counts"
_DATASETS, _CHUNKS, _CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"


@dataclass(frozen=True)
class Squares:
    """Of the numbers that one column was multiplied with: their sum, and how many tokens they come from."""

    sums: "Array"  # one for each column
    count: float


@dataclass(frozen=True, eq=False)
class Importance(Mapping[str, "Array"]):
    """GGUF name of a weight to the mean square of what each of its columns is multiplied with, in float32."""

    squares: Mapping[str, Squares]
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    chunk_size: int = 512  # tokens

    def __getitem__(self, name: str) -> "Array":
        import numpy as np

        found = self.squares[name]
        mean: Array = found.sums / np.float32(found.count)
        return mean

    def __iter__(self) -> Iterator[str]:
        return iter(self.squares)

    def __len__(self) -> int:
        return len(self.squares)

    @classmethod
    def of_file(cls, path: str | Path) -> Self:
        """llama.cpp's own file, GGUF or the older binary form. Raises SaigaError where it is damaged."""
        file = Path(path)
        try:
            with file.open("rb") as stream:
                is_gguf = stream.read(4) == b"GGUF"
            made = cls(*(_read_gguf(file) if is_gguf else _read_binary(file.read_bytes())))
        except (OSError, ValueError, KeyError, IndexError, OverflowError, struct.error, MemoryError) as error:
            reason = str(error).strip() or type(error).__name__
            raise SaigaError(
                f"{file} is no importance matrix of llama.cpp, or it is cut short or damaged ({reason[:200]}). "
                "Fetch it again, or leave `importance` out."
            ) from None
        for name, squares in made.squares.items():
            _require_sound(file, name, squares)
        return made

    def require_fit(self, shapes: Mapping[str, "Shape"], origin: str | Path) -> None:
        """`shapes` are those of the file to be quantised. Raises SaigaError that names a tensor where they differ."""
        hint = "Make it of this model's records, fetch the one of this very model, or leave `importance` out."
        for name in self:
            if name not in shapes:
                raise SaigaError(f"{origin} is of another model: this one has no {name}. {hint}")
            if (columns := len(self.squares[name].sums)) != shapes[name][-1]:
                raise SaigaError(
                    f"{origin} is of another model: {name} has {columns} columns there and {shapes[name][-1]} here. "
                    f"{hint}"
                )
        for name, shape in shapes.items():
            if len(shape) == 2 and name.startswith("blk.") and name not in self:
                raise SaigaError(f"{origin} has nothing of {name}: it is incomplete or of another model. {hint}")

    def describe(self, writer: "gguf.GGUFWriter", file: Path) -> None:
        """The keys that llama.cpp's tool writes into a quantised model; of the paths, names alone."""
        writer.add_string("quantize.imatrix.file", file.name)
        if self.datasets:
            writer.add_string("quantize.imatrix.dataset", Path(self.datasets[0]).name)
        writer.add_uint32("quantize.imatrix.entries_count", len(self))
        if self.chunks:
            writer.add_uint32("quantize.imatrix.chunks_count", self.chunks)

    def write(self, path: str | Path) -> Path:
        """llama.cpp's GGUF form. Raises SaigaError if the file exists already."""
        file = Path(path)
        require_absent(file)
        with replacing(file) as partial:
            self._write(partial)
        return file

    def _write(self, file: Path) -> None:
        import gguf
        import numpy as np

        writer = gguf.GGUFWriter(file, "imatrix")
        writer.kv_data[0].clear()  # llama.cpp's has no general.architecture
        writer.add_string("general.type", "imatrix")
        writer.add_array(_DATASETS, list(self.datasets))
        writer.add_uint32(_CHUNKS, self.chunks)
        writer.add_uint32(_CHUNK_SIZE, self.chunk_size)
        for name in sorted(self.squares):
            squares = self.squares[name]
            writer.add_tensor(name + _SUMS, squares.sums.reshape(1, -1))
            writer.add_tensor(name + _COUNTS, np.full((1, 1), squares.count, dtype=np.float32))
        writer.write_header_to_file()
        try:
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


_Read = tuple[dict[str, Squares], tuple[str, ...], int, int]


def _read_gguf(file: Path) -> _Read:
    import gguf

    reader = gguf.GGUFReader(file)
    if (kind := _value(reader, "general.type")) != "imatrix":
        raise ValueError(f"general.type is {kind!r}, expected 'imatrix'")
    # Copies: the reader's are views of the file, which may change.
    tensors = {tensor.name: tensor.data.astype("float32").ravel() for tensor in reader.tensors}
    found = {}
    for name in [name.removesuffix(_SUMS) for name in tensors if name.endswith(_SUMS)]:
        if name + _COUNTS not in tensors:
            raise ValueError(f"{name} has no counts")
        counts = tensors.pop(name + _COUNTS)
        if len(counts) != 1:
            raise ValueError(f"{name} has {len(counts)} counts: a mixture of experts, which is not supported")
        found[name] = Squares(tensors[name + _SUMS], float(counts[0]))
    if alone := [name for name in tensors if name.endswith(_COUNTS)]:
        raise ValueError(f"{alone[0]} has no sums")
    if not found:
        raise ValueError("it holds no tensor")
    chunks, size = (int(_value(reader, key) or 0) for key in (_CHUNKS, _CHUNK_SIZE))
    return found, tuple(_value(reader, _DATASETS) or ()), chunks, size


def _value(reader: "gguf.GGUFReader", key: str) -> Any:  # noqa: ANN401  # of any of GGUF's types
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _read_binary(content: bytes) -> _Read:
    """Entries of name, calls, and mean square times calls; then the calls of all, and the data set's name."""
    import numpy as np

    place = 0

    def taken(size: int) -> bytes:
        nonlocal place
        if not 0 <= size <= len(content) - place:
            raise ValueError(f"{size} bytes are announced at {place}, and {len(content) - place} are left")
        place += size
        return content[place - size : place]

    def number() -> int:
        return int(struct.unpack("<i", taken(4))[0])

    found = {}
    for _ in range(number()):
        name = taken(number()).decode("utf-8")
        calls = number()
        found[name] = Squares(np.frombuffer(taken(4 * number()), dtype="<f4").astype(np.float32), float(calls))
    if not found:
        raise ValueError("it holds no tensor")
    chunks = number() if place < len(content) else 0
    dataset = taken(number()).decode("utf-8", "replace") if place < len(content) else ""
    return found, (dataset,) if dataset else (), chunks, 512


def _require_sound(file: Path, name: str, squares: Squares) -> None:
    import numpy as np

    if not (squares.count > 0 and squares.sums.size and np.isfinite(squares.sums).all() and (squares.sums >= 0).all()):
        raise SaigaError(
            f"{file}: {name} is damaged: {squares.count:g} tokens, sums that are not all finite and positive. "
            "Fetch or make it again."
        )


def sampled(rows: Sequence[Sequence[int]], tokens: int) -> list[Sequence[int]]:
    """Rows evenly spread over all, of about so many tokens together."""
    total = sum(map(len, rows))
    count = max(1, min(len(rows), len(rows) * tokens // max(1, total)))
    return [rows[index * len(rows) // count] for index in range(count)]
