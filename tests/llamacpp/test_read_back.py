"""Reading back finds every difference from what was written."""

import gguf
import numpy as np
import pytest

from saigakit import export
from saigakit.errors import SaigaError
from saigakit.llamacpp import quantization, read_back, streaming
from saigakit.prompt import encoding

SHAPES = {"output_norm.weight": (5,), "blk.0.ffn_up.weight": (700, 64)}
TYPES = {"output_norm.weight": "F32", "blk.0.ffn_up.weight": "Q8_0"}
TENSORS = {name: np.random.default_rng(1).normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def writer_of(file):
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_string("general.name", "имя")
    writer.add_token_list(["а", "b", "<s>"])
    writer.add_token_scores([0.5, -1.25, 0.1])
    return writer


@pytest.fixture
def file(tmp_path):
    return tmp_path / "x.gguf"


@pytest.fixture
def written(file, monkeypatch):
    """The parts that were written: the header, the vector, and two of the matrix."""
    monkeypatch.setattr(streaming, "_NUMBERS", 1)
    monkeypatch.setattr(streaming, "_ROWS", 512)
    start = streaming.write_header(writer_of(file), SHAPES, TYPES)
    (parts,) = streaming.write_tensors(
        [streaming.Target(file, TYPES, start)], SHAPES, lambda name, rows: TENSORS[name][rows]
    )
    return parts


def flip(file, place):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_accepts_a_file_as_it_was_written(file, written):
    names = [part.name for part in sorted(written, key=lambda part: part.offset)]
    assert names == ["the header", *SHAPES, "blk.0.ffn_up.weight"]
    read_back.require_written(file, written)


def test_finds_a_flipped_bit_and_names_its_part(file, written):
    for part in written:
        flip(file, part.offset + part.size - 1)
        with pytest.raises(SaigaError, match=rf"was not written correctly: {part.name} differs on disk"):
            read_back.require_written(file, written)
        flip(file, part.offset + part.size - 1)


def test_finds_a_truncated_file(file, written):
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(SaigaError, match="differs on disk"):
        read_back.require_written(file, written)


def test_finds_every_flipped_bit_of_the_header(file, written):
    header, *_ = written
    assert header.size == min(part.offset for part in written if part is not header)
    for place in range(header.size):
        flip(file, place)
        with pytest.raises(SaigaError, match="the header differs on disk"):
            read_back.require_written(file, written)
        flip(file, place)


@pytest.mark.parametrize("size", [0, 5, 8, 4096, 4099])
def test_a_single_changed_byte_changes_the_checksum(size):
    flat = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    for place in {0, size // 2, size - 1} if size else ():
        other = flat.copy()
        other[place] ^= 64
        assert streaming.checksum(other) != streaming.checksum(flat)
    assert streaming.checksum(flat) == streaming.checksum(flat.copy())


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory):
    return export.to_gguf(model="saiga_tiny", adapter=None, output=tmp_path_factory.mktemp("made") / "x.gguf")


def test_different_token_ids_are_refused_naming_the_text(exported, monkeypatch):
    tokenizer = encoding.load_tokenizer("saiga_tiny")
    assert (
        read_back._check_ids(exported, tokenizer, ["Привет", "Ёж"])
        == "2 evaluation texts have the token ids of the training"
    )
    encode = tokenizer.encode_text
    monkeypatch.setattr(tokenizer, "encode_text", lambda text: encode(text)[: -1 if text == "Ёж" else None])
    with pytest.raises(SaigaError, match="Ёж"):
        read_back._check_ids(exported, tokenizer, ["Привет", "Ёж"])


def test_a_text_that_llama_cpp_cannot_tokenise_is_reported_without_failing(exported, monkeypatch):
    encode = encoding.GgufTokenizer.encode_text

    def refusing(self, text):
        if "<tool>" in text:
            raise SaigaError("llama.cpp would read '<tool>' inside a text as a special token.")
        return encode(self, text)

    monkeypatch.setattr(encoding.GgufTokenizer, "encode_text", refusing)
    said = read_back._check_ids(exported, encoding.load_tokenizer("saiga_tiny"), ["Привет", "a <tool> b"])
    assert said.startswith(
        "1 evaluation texts have the token ids of the training, and 1 cannot be tokenised as text: llama.cpp would"
    )


def test_memory_is_bounded_on_many_cores(monkeypatch):
    large = {"token_embd.weight": (128256, 4096), "blk.0.ffn_down.weight": (4096, 14336)}
    for cores in (1, 4, 96):
        monkeypatch.setattr(quantization, "usable_cores", lambda cores=cores: cores)
        assert streaming.memory_needed(large, 128, 1) < 1e9
