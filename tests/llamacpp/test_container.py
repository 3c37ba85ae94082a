import gguf
import numpy as np
import pytest

from saigakit.errors import SaigaError
from saigakit.llamacpp import container, streaming

SHAPES = {"output_norm.weight": (5,), "blk.0.ffn_up.weight": (3, 64)}
TYPES = {"output_norm.weight": "F32", "blk.0.ffn_up.weight": "Q8_0"}
TENSORS = {name: np.random.default_rng(1).normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def write_header(file, shapes):
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_string("general.name", "имя")
    return container.write_header(writer, shapes, TYPES)


def write(file):
    target = streaming.Target(file, TYPES, write_header(file, SHAPES))
    streaming.fill([target], SHAPES, lambda name, rows: TENSORS[name][rows])
    return file


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "x.gguf")


@pytest.fixture
def total(tmp_path):
    write_header(tmp_path / "empty.gguf", {})
    return container.total_bytes((tmp_path / "empty.gguf").stat().st_size, SHAPES, TYPES)


def test_the_size_is_known_to_the_byte_before_the_file_is_written(file, total):
    assert file.stat().st_size == total


def test_gguf_reads_back_what_was_written(file):
    first, second = gguf.GGUFReader(file).tensors
    assert np.array_equal(first.data, TENSORS["output_norm.weight"])
    assert second.data.tobytes() == gguf.quants.quantize(TENSORS[second.name], gguf.GGMLQuantizationType.Q8_0).tobytes()


def test_a_whole_file_passes(file, total):
    container.require_whole(file, SHAPES, TYPES, total)


def test_a_file_that_lost_its_end_does_not_pass(file, total):
    file.write_bytes(file.read_bytes()[:-32])
    with pytest.raises(SaigaError, match=f"{total - 32} bytes, expected 2 in {total}"):
        container.require_whole(file, SHAPES, TYPES, total)


def test_a_file_with_a_damaged_head_does_not_pass(file, total):
    file.write_bytes(b"\0" * 64 + file.read_bytes()[64:])
    with pytest.raises(SaigaError, match="0 tensors"):
        container.require_whole(file, SHAPES, TYPES, total)


def test_a_file_with_a_tensor_of_another_type_does_not_pass(file, total):
    with pytest.raises(SaigaError, match="came out wrong"):
        container.require_whole(file, SHAPES, {**TYPES, "blk.0.ffn_up.weight": "Q4_0"}, total)
