"""A file that is not what was written does not pass, wherever it differs."""

import gguf
import numpy as np
import pytest

from saigakit import export
from saigakit.errors import SaigaError
from saigakit.llamacpp import container, quantization, read_back, streaming
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


METADATA = {
    "general.architecture": "llama",
    "general.name": "имя",
    "tokenizer.ggml.tokens": ["а", "b", "<s>"],
    "tokenizer.ggml.scores": [0.5, -1.25, 0.1],
}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "x.gguf"


@pytest.fixture
def written(file, monkeypatch):
    """What was written, part by part: the matrix in two."""
    monkeypatch.setattr(streaming, "_NUMBERS", 1)
    monkeypatch.setattr(streaming, "_ROWS", 512)
    start = container.write_header(writer_of(file), SHAPES, TYPES)
    (parts,) = streaming.fill([streaming.Target(file, TYPES, start)], SHAPES, lambda name, rows: TENSORS[name][rows])
    return parts


def flip(file, place):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_a_file_as_it_was_written_passes(file, written):
    assert [part.tensor for part in sorted(written, key=lambda part: part.offset)] == [*SHAPES, "blk.0.ffn_up.weight"]
    read_back.require_written(file, written)
    read_back.require_tensors(file, METADATA, SHAPES, TYPES)


def test_a_flipped_bit_is_found_and_its_tensor_named(file, written):
    for part in written:
        flip(file, part.offset + part.size - 1)
        with pytest.raises(SaigaError, match=rf"came out wrong: {part.tensor} is not on the disk"):
            read_back.require_written(file, written)
        flip(file, part.offset + part.size - 1)


def test_a_file_that_was_cut_short_is_found(file, written):
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(SaigaError, match="is not on the disk"):
        read_back.require_written(file, written)


def test_every_flipped_bit_of_the_head_is_found(file, written):
    head = min(part.offset for part in written)
    end, passed = len(file.read_bytes()[:head].rstrip(b"\0")), []
    for place in range(end):
        flip(file, place)
        try:
            read_back.require_tensors(file, METADATA, SHAPES, TYPES)
            passed.append(place)
        except SaigaError:
            pass
        flip(file, place)
    assert [place for place in passed if place != 4] == []  # 4: version 2 is read like version 3


def test_the_arrays_of_a_large_vocabulary_are_those_of_gguf_itself(tiny, tmp_path):
    made = export.to_gguf(model="saiga_tiny", adapter=None, output=tmp_path / "x.gguf")
    ours = read_back._metadata(*read_back._reader(made))
    plain = {key: field.contents() for key, field in gguf.GGUFReader(made).fields.items() if key in ours}
    assert {type(value) for value in plain.values()} >= {str, int, float, list}
    for key, value in plain.items():
        if isinstance(value, list) and isinstance(value[0], str):
            value = [item.encode() for item in value]
        assert list(ours[key]) == value if isinstance(value, list) else ours[key] == value, key


@pytest.mark.parametrize("size", [0, 5, 8, 4096, 4099])
def test_one_other_byte_changes_the_checksum(size):
    flat = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    for place in {0, size // 2, size - 1} if size else ():
        other = flat.copy()
        other[place] ^= 64
        assert streaming.checksum(other) != streaming.checksum(flat)
    assert streaming.checksum(flat) == streaming.checksum(flat.copy())


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory):
    return export.to_gguf(model="saiga_tiny", adapter=None, output=tmp_path_factory.mktemp("made") / "x.gguf")


def test_ids_that_differ_name_the_text(exported, monkeypatch):
    tokenizer = encoding.load_tokenizer("saiga_tiny")
    assert (
        read_back.said_of_ids(exported, tokenizer, ["Привет", "Ёж"]) == "2 held-out texts have the ids of the training"
    )
    encode = tokenizer.encode_text
    monkeypatch.setattr(tokenizer, "encode_text", lambda text: encode(text)[: -1 if text == "Ёж" else None])
    with pytest.raises(SaigaError, match="Ёж"):
        read_back.said_of_ids(exported, tokenizer, ["Привет", "Ёж"])


def test_a_text_that_llama_cpp_cannot_read_as_text_is_told_and_no_reason_to_lose_the_file(exported, monkeypatch):
    encode = encoding.GgufTokenizer.encode_text

    def refusing(self, text):
        if "<tool>" in text:
            raise SaigaError("llama.cpp would read '<tool>' inside a text as a special token.")
        return encode(self, text)

    monkeypatch.setattr(encoding.GgufTokenizer, "encode_text", refusing)
    said = read_back.said_of_ids(exported, encoding.load_tokenizer("saiga_tiny"), ["Привет", "a <tool> b"])
    assert said.startswith(
        "1 held-out texts have the ids of the training, and 1 cannot be read as text: llama.cpp would"
    )


def test_many_cores_share_the_few_chunks_that_are_in_memory(monkeypatch):
    large = {"token_embd.weight": (128256, 4096), "blk.0.ffn_down.weight": (4096, 14336)}
    for cores in (1, 4, 96):
        monkeypatch.setattr(quantization, "cores", lambda cores=cores: cores)
        assert streaming.memory(large, 128, 1) < 1e9


@pytest.mark.parametrize("ggml_type", ["Q4_K", "Q4_0", "F16"])
def test_rows_that_are_shared_out_give_the_same_bytes(ggml_type, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    matrix = np.random.default_rng(4).normal(size=(77, 512)).astype(np.float32)
    whole = quantization.quantise(matrix, ggml_type)
    monkeypatch.setattr(quantization, "_SHARE", 512 * 5)
    with ThreadPoolExecutor(3) as pool:
        assert quantization.quantise(matrix, ggml_type, pool=pool).tobytes() == whole.tobytes()
