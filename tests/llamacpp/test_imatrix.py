"""Importance matrices as files: llama.cpp's two forms, damaged ones and those of another model."""

import struct

import gguf
import numpy as np
import pytest

from saigakit.errors import SaigaError
from saigakit.llamacpp.imatrix import Importance, Squares

NAMES = ("blk.0.attn_q.weight", "blk.0.ffn_down.weight")
SHAPES = {NAMES[0]: (8, 6), NAMES[1]: (6, 10), "token_embd.weight": (20, 6), "blk.0.attn_norm.weight": (6,)}


def made(count=7.0):
    rng = np.random.default_rng(1)
    squares = {name: Squares(rng.random(SHAPES[name][-1]).astype(np.float32), count) for name in NAMES}
    return Importance(squares, ("train.jsonl",), 3, 512)


def binary(matrix, calls=4):
    """The form before GGUF: mean squares times calls."""
    entries = b"".join(
        struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(mean)) + (mean * calls).tobytes()
        for name, mean in matrix.items()
    )
    return struct.pack("<i", len(matrix)) + entries + struct.pack("<ii", calls, 5) + b"a.txt"


def same(one, other):
    return list(one) == list(other) and all(np.array_equal(one[name], other[name]) for name in one)


def test_reads_what_it_writes(tmp_path):
    written = made()
    read = Importance.read(written.write(tmp_path / "imatrix.gguf"))
    assert same(written, read)
    assert (read.datasets, read.chunks, read.chunk_size) == (("train.jsonl",), 3, 512)


def test_the_file_has_the_tensors_and_keys_of_llama_cpp(tmp_path):
    reader = gguf.GGUFReader(made().write(tmp_path / "imatrix.gguf"))
    assert [tensor.name for tensor in reader.tensors] == [
        f"{name}.{part}" for name in NAMES for part in ("in_sum2", "counts")
    ]
    assert [list(tensor.shape) for tensor in reader.tensors] == [[6, 1], [1, 1], [10, 1], [1, 1]]
    keys = [key for key in reader.fields if not key.startswith("GGUF.")]
    assert keys == ["general.type", "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"]


def test_reads_the_older_binary_form(tmp_path):
    file = tmp_path / "imatrix.dat"
    file.write_bytes(binary(made()))
    read = Importance.read(file)
    for name, mean in made().items():
        np.testing.assert_allclose(read[name], mean, rtol=1e-6)
    assert (read.datasets, read.chunks) == (("a.txt",), 4)


@pytest.mark.parametrize("form", ["gguf", "binary"])
def test_refuses_a_file_truncated_anywhere(tmp_path, form):
    whole = made().write(tmp_path / "whole").read_bytes() if form == "gguf" else binary(made())
    end = len(whole) if form == "gguf" else len(whole) - 13  # after the entries
    for size in {*range(0, end - 32, 7), end - 33}:
        file = tmp_path / "cut"
        file.write_bytes(whole[:size])
        with pytest.raises(SaigaError, match="cut short or damaged"):
            Importance.read(file)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_refuses_an_invalid_number_naming_its_tensor(tmp_path, bad):
    matrix = made()
    matrix.squares[NAMES[1]].sums[3] = bad
    with pytest.raises(SaigaError, match=rf"damaged \({NAMES[1]} has"):
        Importance.read(matrix.write(tmp_path / "imatrix.gguf"))


def test_refuses_a_count_of_zero(tmp_path):
    with pytest.raises(SaigaError, match=rf"damaged \({NAMES[0]} has 0 tokens"):
        Importance.read(made(count=0.0).write(tmp_path / "imatrix.gguf"))


def test_refuses_a_model(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("a", np.zeros(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(SaigaError, match=r"general.type is None"):
        Importance.read(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"a.in_sum2": (1, 4)}, "a has no counts"),
        ({"a.counts": (1, 1)}, r"a.counts has no sums"),
        ({"a.in_sum2": (2, 4), "a.counts": (2, 1)}, "a has 2 counts: a mixture of experts"),
        ({}, "it contains no tensors"),
    ],
)
def test_refuses_sums_without_matching_counts(tmp_path, tensors, reason):
    writer = gguf.GGUFWriter(tmp_path / "made.gguf", "none")
    writer.add_string("general.type", "imatrix")
    for name, shape in tensors.items():
        writer.add_tensor(name, np.ones(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(SaigaError, match=reason):
        Importance.read(tmp_path / "made.gguf")


@pytest.mark.parametrize("form", ["gguf", "binary"])
def test_a_damaged_byte_raises_no_other_error(tmp_path, form):
    """Only SaigaError, or none: a float that became another float cannot be recognised."""
    whole = made().write(tmp_path / "whole").read_bytes() if form == "gguf" else binary(made())
    rng, refused = np.random.default_rng(2), 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
        (tmp_path / "damaged").write_bytes(damaged)
        try:
            Importance.read(tmp_path / "damaged").require_fit(SHAPES, "damaged")
        except SaigaError:
            refused += 1
    assert refused > 50


def test_accepts_the_matrix_of_this_model():
    made().require_fit(SHAPES, "imatrix.gguf")


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        ({**SHAPES, NAMES[1]: (6, 12)}, f"{NAMES[1]} has 10 columns there and 12 here"),
        ({NAMES[0]: (8, 6)}, f"this one has no {NAMES[1]}"),
        ({**SHAPES, "blk.1.attn_q.weight": (8, 6)}, "lacks blk.1.attn_q.weight"),
    ],
)
def test_refuses_the_matrix_of_another_model_naming_the_tensor(shapes, reason):
    with pytest.raises(SaigaError, match=reason):
        made().require_fit(shapes, "imatrix.gguf")


def test_does_not_overwrite_a_file(tmp_path):
    file = made().write(tmp_path / "imatrix.gguf")
    with pytest.raises(SaigaError, match="already exists"):
        made().write(file)
    assert [each.name for each in tmp_path.iterdir()] == ["imatrix.gguf"]
