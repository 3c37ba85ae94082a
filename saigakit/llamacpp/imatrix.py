"""Compute, read and write importance matrices: how much each column of a weight matters to quantisation."""

import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from saigakit.core import install
from saigakit.core.display import Every
from saigakit.core.files import replacing, require_absent, sha256
from saigakit.core.lazy import gguf, llama_cpp, np
from saigakit.errors import SaigaError
from saigakit.llamacpp import forward, libggml
from saigakit.weights.tensors import Array, Shape

Sums: TypeAlias = "np.ndarray[tuple[int, ...], np.dtype[np.float64]]"
_SUMS, _COUNTS = ".in_sum2", ".counts"
_DATASETS, _CHUNKS, _CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"


@dataclass(frozen=True)
class Squares:
    """The squared inputs of a weight, summed over `count` tokens."""

    sums: Array  # one per column
    count: float


@dataclass(frozen=True, eq=False)
class Importance(Mapping[str, Array]):
    """Mean squared input of each column in float32, by the GGUF name of the weight."""

    squares: Mapping[str, Squares]
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    chunk_size: int = 512  # tokens

    def __getitem__(self, name: str) -> Array:
        found = self.squares[name]
        mean: Array = found.sums / np.float32(found.count)
        return mean

    def __iter__(self) -> Iterator[str]:
        return iter(self.squares)

    def __len__(self) -> int:
        return len(self.squares)

    @staticmethod
    def read(path: str | Path) -> "Importance":
        """Read a file of llama.cpp, GGUF or the older binary form. Raises SaigaError if it is damaged."""
        file = Path(path)
        try:
            with file.open("rb") as stream:
                is_gguf = stream.read(4) == b"GGUF"
            matrix = _read_gguf(file) if is_gguf else _read_binary(file.read_bytes())
            if not matrix.squares:
                raise ValueError("it contains no tensors")
            for name, squares in matrix.squares.items():
                _require_sound(name, squares)
        except (OSError, ValueError, KeyError, IndexError, OverflowError, struct.error, MemoryError) as error:
            reason = str(error).strip() or type(error).__name__
            raise SaigaError(
                f"{file} is not an importance matrix of llama.cpp, or it is cut short or damaged ({reason[:200]}). "
                "Download it again, or leave `importance` out."
            ) from None
        return matrix

    def require_fit(self, shapes: Mapping[str, Shape], origin: str | Path) -> None:
        """Raises SaigaError if it does not fit `shapes`, of the file to be quantised."""
        hint = "Compute it from this model's records, download the one of this model, or leave `importance` out."
        for name in self:
            if name not in shapes:
                raise SaigaError(f"{origin} belongs to another model: this one has no {name}. {hint}")
            if (columns := len(self.squares[name].sums)) != shapes[name][-1]:
                raise SaigaError(
                    f"{origin} belongs to another model: {name} has {columns} columns there and {shapes[name][-1]} "
                    f"here. {hint}"
                )
        for name, shape in shapes.items():
            if len(shape) == 2 and name.startswith("blk.") and name not in self:
                raise SaigaError(f"{origin} lacks {name}: it is incomplete or belongs to another model. {hint}")

    def write_metadata(self, writer: "gguf.GGUFWriter", file: Path) -> None:
        """The keys that llama.cpp's tool adds to a quantised model, without names of local files."""
        writer.add_string("quantize.imatrix.file", f"sha256:{sha256(file)}")
        writer.add_uint32("quantize.imatrix.entries_count", len(self))
        if self.chunks:
            writer.add_uint32("quantize.imatrix.chunks_count", self.chunks)

    def write(self, path: str | Path) -> Path:
        """Write llama.cpp's GGUF form. Raises SaigaError if the file exists."""
        file = Path(path)
        require_absent(file)
        writer = gguf.GGUFWriter(None, "imatrix")
        writer.kv_data[0].clear()  # llama.cpp's files have no general.architecture
        writer.add_string("general.type", "imatrix")
        writer.add_array(_DATASETS, list(self.datasets))
        writer.add_uint32(_CHUNKS, self.chunks)
        writer.add_uint32(_CHUNK_SIZE, self.chunk_size)
        for name in sorted(self.squares):
            squares = self.squares[name]
            writer.add_tensor(name + _SUMS, squares.sums.reshape(1, -1))
            writer.add_tensor(name + _COUNTS, np.full((1, 1), squares.count, dtype=np.float32))
        with replacing(file) as partial, closing(writer):
            writer.write_header_to_file(partial)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        return file


def _read_gguf(file: Path) -> Importance:
    reader = gguf.GGUFReader(file)
    if (kind := _value(reader, "general.type")) != "imatrix":
        raise ValueError(f"general.type is {kind!r}, expected 'imatrix'")
    # Copies: the reader's arrays are views of the file, which may change.
    tensors = {tensor.name: tensor.data.astype("float32").ravel() for tensor in reader.tensors}
    found = {}
    for name in [name.removesuffix(_SUMS) for name in tensors if name.endswith(_SUMS)]:
        if name + _COUNTS not in tensors:
            raise ValueError(f"{name} has no counts")
        counts = tensors.pop(name + _COUNTS)
        if len(counts) != 1:
            raise ValueError(f"{name} has {len(counts)} counts: a mixture of experts, which is not supported")
        found[name] = Squares(tensors[name + _SUMS], float(counts[0]))
    if unmatched := [name for name in tensors if name.endswith(_COUNTS)]:
        raise ValueError(f"{unmatched[0]} has no sums")
    chunks, size = (int(_value(reader, key) or 0) for key in (_CHUNKS, _CHUNK_SIZE))
    return Importance(found, tuple(_value(reader, _DATASETS) or ()), chunks, size)


def _value(reader: "gguf.GGUFReader", key: str) -> Any:  # noqa: ANN401  # of any GGUF type
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _read_binary(content: bytes) -> Importance:
    """Entries of name, calls, and mean square times calls; then the total of calls and the dataset's name."""
    position = 0

    def take(size: int) -> bytes:
        nonlocal position
        if not 0 <= size <= len(content) - position:
            raise ValueError(f"{size} bytes are announced at {position}, but {len(content) - position} are left")
        position += size
        return content[position - size : position]

    def take_int() -> int:
        return int(struct.unpack("<i", take(4))[0])

    found = {}
    for _ in range(take_int()):
        name = take(take_int()).decode("utf-8")
        calls = take_int()
        found[name] = Squares(np.frombuffer(take(4 * take_int()), dtype="<f4").astype(np.float32), float(calls))
    chunks = take_int() if position < len(content) else 0
    dataset = take(take_int()).decode("utf-8", "replace") if position < len(content) else ""
    return Importance(found, (dataset,) if dataset else (), chunks)


def _require_sound(name: str, squares: Squares) -> None:
    if not (squares.count > 0 and squares.sums.size and np.isfinite(squares.sums).all() and (squares.sums >= 0).all()):
        raise ValueError(f"{name} has {squares.count:g} tokens, or sums that are negative or not finite")


def compute_importance(
    gguf_file: Path, rows: Sequence[Sequence[int]], *, dataset: str, n_gpu_layers: int = 0
) -> Importance:
    """Sum the squares of each weight's inputs over rows of token ids, named `dataset` in the file.

    Unlike in llama.cpp's own tool, every row starts a new sequence, as in training.
    """
    observer, is_due, length = _Observer(), Every(), max(map(len, rows))
    with forward.open_model(gguf_file, n_ctx=length, n_gpu_layers=n_gpu_layers, on_tensor=observer.observe) as model:
        for done, ids in enumerate(rows, start=1):
            # Logits of every position: otherwise the last layer is computed only for the last token.
            for _ in model.logits(ids, [True] * len(ids)):
                if observer.error is not None:
                    raise observer.error
            if is_due():
                print(f"Importance matrix: {done} of {len(rows)} rows read", flush=True)
    squares = {name: Squares(sums.astype("float32"), float(count)) for name, (sums, count) in observer.found.items()}
    return Importance(squares, (dataset,), len(rows), length)


def _require_layout() -> None:
    """Raises SaigaError if `libggml.Tensor` does not find the sources of a product."""
    ggml = libggml.load()
    context = ggml.ggml_init(libggml.ContextParams(1 << 16, None, True))
    try:
        weight, activation = (ggml.ggml_new_tensor_2d(context, libggml.F32, 32, rows) for rows in (3, 5))
        product = ggml.ggml_mul_mat(context, weight, activation)
        found = libggml.Tensor.from_address(product)
        if (*found.ne[:2], *found.src[:2]) != (3, 5, weight, activation):
            raise SaigaError(
                f"llama-cpp-python {llama_cpp.__version__} has an unknown tensor layout, which computing an importance "
                f"matrix depends on. Install {install.PINS['llama-cpp-python']['version']}, or give a file as "
                "`importance`."
            )
    finally:
        ggml.ggml_free(context)


class _Observer:
    """Sums of squares and token counts by weight."""

    def __init__(self) -> None:
        _require_layout()
        self.found: dict[str, tuple[Sums, int]] = {}
        self._ggml = libggml.load()
        self.error: Exception | None = None

    def observe(self, node: int, asks: bool) -> bool:
        """llama.cpp's cb_eval: asks whether a node is wanted, calls again with its result; False then stops it."""
        try:
            if self._ggml.ggml_op_desc(node) != b"MUL_MAT":
                return not asks
            weight, activation = libggml.Tensor.from_address(node).src[:2]
            # The scheduler decorates names that it copies between devices: CUDA0#blk.0.attn_k.weight#0.
            name = self._ggml.ggml_get_name(weight).decode().split("#")[:2][-1]
            is_wanted = name.startswith("blk.") and name.endswith(".weight")
            if is_wanted and not asks:
                self._add(name, activation)
            return is_wanted or not asks
        except Exception as error:  # ctypes would print it and continue
            self.error = error
            return False

    def _add(self, name: str, activation: int) -> None:
        tensor, rows = libggml.Tensor.from_address(activation), self._ggml.ggml_nrows(activation)
        if tensor.type != libggml.F32 or not self._ggml.ggml_is_contiguous(activation):
            raise SaigaError(f"The inputs of {name} are not plain float32 on this device; give `importance` as a file.")
        inputs = np.empty((rows, tensor.ne[0]), dtype=np.float32)
        self._ggml.ggml_backend_tensor_get(activation, inputs.ctypes.data, 0, inputs.nbytes)
        sums = np.square(inputs).sum(axis=0, dtype=np.float64)
        if not np.isfinite(sums).all():
            raise SaigaError(f"The inputs of {name} are not finite: the model is damaged or its training diverged.")
        before, count = self.found.get(name, (0.0, 0))
        self.found[name] = (before + sums, count + rows)
