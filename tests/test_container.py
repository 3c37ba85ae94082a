import gguf
import numpy as np
import pytest

from saigakit import container
from saigakit.errors import SaigaError

SHAPES = {"output_norm.weight": (5,), "blk.0.ffn_up.weight": (3, 64)}
TYPES = {"output_norm.weight": "F32", "blk.0.ffn_up.weight": "Q8_0"}
TENSORS = {name: np.random.default_rng(1).normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def write(file, shapes=SHAPES):
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_string("general.name", "имя")
    container.write(writer, shapes, TYPES, TENSORS.__getitem__)
    return file


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "x.gguf")


@pytest.fixture
def total(tmp_path):
    return container.total_bytes(write(tmp_path / "empty.gguf", {}).stat().st_size, SHAPES, TYPES)


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


def test_progress_counts_bytes_and_says_how_long_still(capsys, monkeypatch):
    progress = container._Progress(4, 4 * 10**9)
    start = progress.start
    for second in (4, 8, 12, 13):
        monkeypatch.setattr(container.time, "monotonic", lambda second=second: start + second)
        progress.add(10**9)
    assert capsys.readouterr().out == "3 of 4 tensors, 3.00 of 4.00 GB, about 4 s left\n"
