import gguf
import numpy as np
import pytest

from saigakit.llamacpp import streaming

SHAPES = {"output_norm.weight": (5,), "blk.0.ffn_up.weight": (3, 64)}
TYPES = {"output_norm.weight": "F32", "blk.0.ffn_up.weight": "Q8_0"}
TENSORS = {name: np.random.default_rng(1).normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def write_header(file, shapes):
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_string("general.name", "имя")
    return streaming.write_header(writer, shapes, TYPES)


def write(file):
    target = streaming.Target(file, TYPES, write_header(file, SHAPES))
    streaming.write_tensors([target], SHAPES, lambda name, rows: TENSORS[name][rows])
    return file


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "x.gguf")


@pytest.fixture
def total(tmp_path):
    write_header(tmp_path / "empty.gguf", {})
    return streaming.total_bytes((tmp_path / "empty.gguf").stat().st_size, SHAPES, TYPES)


def test_estimates_the_size_of_the_file_to_the_byte(file, total):
    assert file.stat().st_size == total


def test_gguf_reads_what_was_written(file):
    reader = gguf.GGUFReader(file)
    assert reader.get_field("general.name").contents() == "имя"
    first, second = reader.tensors
    assert {each.name: each.tensor_type.name for each in (first, second)} == TYPES
    assert {each.name: tuple(reversed(each.shape.tolist())) for each in (first, second)} == SHAPES
    assert np.array_equal(first.data, TENSORS["output_norm.weight"])
    assert second.data.tobytes() == gguf.quants.quantize(TENSORS[second.name], gguf.GGMLQuantizationType.Q8_0).tobytes()
