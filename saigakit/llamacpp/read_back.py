"""A finished GGUF file into a sentence that says what can read it: gguf's reader, llama.cpp, the user's own records."""

import logging
import os
import struct
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saigakit.errors import SaigaError
from saigakit.llamacpp import container, quantization, streaming
from saigakit.llamacpp.streaming import Written
from saigakit.prompt import encoding
from saigakit.prompt.backends import gguf_vocabulary
from saigakit.prompt.encoding import FastTokenizer

if TYPE_CHECKING:
    import gguf

    from saigakit.weights.tensors import Shape


def require_readable(file: Path, tensors: int, tokenizer: FastTokenizer, texts: Sequence[str]) -> str:
    """What can read the file, in a sentence. Raises SaigaError where llama.cpp finds something else in it."""
    _require_loadable(file)
    readers = [f"gguf reads its {tensors} tensors", "llama.cpp loads it and finds every block valid"]
    if texts:
        readers.append(said_of_ids(file, tokenizer, texts))
    return f"Read back: {', '.join(readers)}."


def said_of_ids(file: Path, tokenizer: FastTokenizer, texts: Sequence[str]) -> str:
    """Raises SaigaError with the first text that llama.cpp reads as other ids than those of the training."""
    refused: list[SaigaError] = []
    with gguf_vocabulary(file) as llm:
        theirs = encoding.GgufTokenizer(llm)
        for text in texts:
            try:
                got = theirs.encode_text(text)
            except SaigaError as error:  # as it will answer when somebody writes this to the model
                refused.append(error)
                continue
            if got != (wanted := tokenizer.encode_text(text)):
                raise SaigaError(
                    f"llama.cpp reads {text!r} as {got}, and the model was trained on {wanted}: saigakit cannot export "
                    "this tokenizer."
                )
    said = f"{len(texts) - len(refused)} held-out texts have the ids of the training"
    return f"{said}, and {len(refused)} cannot be read as text: {refused[0]}" if refused else said


def require_written(file: Path, written: Sequence[Written]) -> None:
    """Reads every part again. Raises SaigaError that names the tensor whose bytes are others."""
    with file.open("rb") as stream, ThreadPoolExecutor(quantization.cores()) as pool:

        def is_there(part: Written) -> bool:
            content = os.pread(stream.fileno(), part.size, part.offset)
            return len(content) == part.size and streaming.checksum(memoryview(content)) == part.total

        for part, is_same in zip(written, pool.map(is_there, written), strict=True):
            if not is_same:
                raise _wrong(file, f"{part.tensor} is not on the disk as it was written, at byte {part.offset}")


def require_tensors(
    file: Path, wanted: Mapping[str, Any], shapes: Mapping[str, "Shape"], types: Mapping[str, str]
) -> None:
    """gguf's reader finds the metadata and every tensor in its place. Raises SaigaError with the first difference."""
    try:
        reader, arrays = _reader(file)
        there = _metadata(reader, arrays)
    except (ValueError, KeyError, IndexError, OverflowError, struct.error) as error:
        raise _wrong(file, f"gguf cannot read it ({error})") from None
    if lost := sorted(wanted.keys() ^ there.keys()):
        raise _wrong(file, f"{lost[0]} is in it and should not be, or the other way round")
    if other := [key for key, value in wanted.items() if not _is_same(there[key], value)]:
        raise _wrong(file, f"{other[0]} is not what was written")
    places = container.offsets(shapes, types, reader.data_offset)
    table = [
        (name, types[name], tuple(shape), places[name], quantization.size(shape, types[name]))
        for name, shape in shapes.items()
    ]
    found = [
        (each.name, each.tensor_type.name, tuple(reversed(each.shape.tolist())), each.data_offset, each.n_bytes)
        for each in reader.tensors
    ]
    if found != table:
        raise _wrong(file, f"its {len(found)} tensors have other types, sizes or places than the {len(table)} written")


def _metadata(reader: "gguf.GGUFReader", arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Key to value; texts of a list are bytes."""
    return {
        key: arrays[key] if key in arrays else field.contents()
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.")
    }


def _is_same(there: Any, value: Any) -> bool:  # noqa: ANN401  # whatever a GGUF holds
    import numpy as np

    if isinstance(value, float):
        return bool(np.float32(value) == np.float32(there))
    if not isinstance(value, list):
        return bool(there == value)
    if value and isinstance(value[0], str | bytes):
        return bool([item.encode() if isinstance(item, str) else item for item in value] == there)
    return bool(np.array_equal(np.asarray(value, np.float32), np.asarray(there, np.float32)))


def _reader(file: Path) -> "tuple[gguf.GGUFReader, dict[str, Any]]":
    """gguf's reader, and the arrays of the metadata, of which itself it makes several objects for each item.

    Measured: 62 s and 570 MB for 128,000 tokens with their merges, and in this way 2.6 s and 67 MB.
    """
    import gguf

    arrays: list[Any] = []

    class Reader(gguf.GGUFReader):
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:  # noqa: ANN401  # as its base class has it
            if raw_type != gguf.GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            kind, count = struct.unpack("<IQ", self.data[orig_offs : orig_offs + 12].tobytes())
            start = orig_offs + 12
            found: Any
            if kind == gguf.GGUFValueType.STRING:
                found, size = _texts(self.data[start:].data, count)
            else:
                found = self._get(start, self.gguf_scalar_to_np[gguf.GGUFValueType(kind)], count)
                size = found.nbytes
            arrays.append(found)
            return 12 + size, [self.data[orig_offs : start + size]], [], [gguf.GGUFValueType.ARRAY]

    made = Reader(file)
    names = [name for name, field in made.fields.items() if field.types[:1] == [gguf.GGUFValueType.ARRAY]]
    return made, dict(zip(names, arrays, strict=True))


def _texts(data: memoryview, count: int) -> tuple[list[bytes], int]:
    """Texts that lie one behind another, each after its length, and the bytes of them all."""
    found, place = [], 0
    for _ in range(count):
        (length,) = struct.unpack_from("<Q", data, place)
        place += 8 + length
        if place > len(data):
            raise ValueError("a list of texts goes beyond its end")
        found.append(bytes(data[place - length : place]))
    return found, place


def _require_loadable(file: Path) -> None:
    """By its pages mapped into memory; weights are not packed anew, which would copy them."""
    import llama_cpp

    params = llama_cpp.llama_model_default_params()
    params.load_mode, params.n_gpu_layers = llama_cpp.LLAMA_LOAD_MODE_MMAP, 0
    params.check_tensors, params.use_extra_bufts = True, False
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # a hundred lines otherwise
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), params)
    if not model:
        raise _wrong(file, "llama.cpp does not load it")
    llama_cpp.llama_model_free(model)


def _wrong(file: Path, what: str) -> SaigaError:
    return SaigaError(f"{file} came out wrong: {what}. The disk may be failing; run again.")
