"""Read SentencePiece vocabularies with the options of Gemma's and YandexGPT's, and compare them with llama.cpp."""

import json
import random
import shutil
from contextlib import closing

import gguf
import llama_cpp
import pytest
import sentencepiece
import vocabularies
from sentencepiece import sentencepiece_model_pb2

from saigakit.errors import SaigaError
from saigakit.llamacpp import vocabulary
from saigakit.prompt import encoding
from saigakit.prompt.encoding import encode

TURNS = ("<start_of_turn>", "<end_of_turn>")
BLANKS = tuple("\n" * count for count in range(1, 5)) + tuple("▁" * count for count in range(2, 9))
WORDS = (
    *("Привет", "мир", "ёлка", "съешь", "ещё", "этих", "мягких", "булок", "table", "start", "of", "turn"),
    *("the", "quick", "brown", "fox", "12345", "return", "x", "if", "y:"),
)
PIECES = (
    *WORDS,
    " ",
    "  ",
    "   ",
    "     ",
    " " * 19,
    "\n",
    "\n\n",
    "\n\n\n\n\n\n",
    "\t",
    "—",
    "🙂",
    "漢",
    "▁",
    "▁▁▁",
    "\u00a0",
)
MESSAGES = [{"role": "user", "content": "Привет,  мир!\n\n\n"}, {"role": "assistant", "content": "Да   нет\n\nможет"}]


@pytest.fixture(scope="module", params=[False, True], ids=["without prefix", "with prefix"])
def model(request, tmp_path_factory):
    """Only without the prefix it has pieces for blanks, as Gemma does."""
    return train(tmp_path_factory.mktemp("trained"), has_prefix=request.param)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return train(tmp_path_factory.mktemp("gemma"), has_prefix=False)


def train(directory, *, has_prefix):
    rng = random.Random(0)
    lines = [" ".join(rng.choices(WORDS, k=8)) for _ in range(400)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(directory / "trained"),
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=has_prefix,
        split_digits=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        bos_piece="<bos>",
        eos_piece="<eos>",
        user_defined_symbols=[*TURNS, "<table>", *(() if has_prefix else BLANKS)],
        minloglevel=2,
    )
    return directory / "trained.model"


def repository(directory, model, *, tokenizer_json=None, added_tokens=None):
    (directory / "tokenizer.model").write_bytes(model.read_bytes())
    config = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    for name, content in (("tokenizer_config", config), ("tokenizer", tokenizer_json), ("added_tokens", added_tokens)):
        if content is not None:
            (directory / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    (directory / "config.json").write_text("{}", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(vocabularies.GEMMA, encoding="utf-8")
    return encoding.load_tokenizer(str(directory))


def as_json(model):
    """A tokenizer.json as Gemma's: it lists the added pieces, and only the turns are special."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    listed = [*("<pad>", "<eos>", "<bos>", "<unk>"), *TURNS, "<table>", *BLANKS]
    tokens = [
        {
            "id": processor.piece_to_id(text),
            "content": text,
            "special": text.startswith("<") and text != "<table>",
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
        }
        for text in listed
        if processor.piece_to_id(text) != processor.unk_id() or text == "<unk>"
    ]
    saved = json.loads(encoding.from_sentencepiece(model).to_str())
    return saved | {"added_tokens": sorted(tokens, key=lambda token: token["id"])}


def texts(count=300):
    rng = random.Random(1)
    return ["".join(rng.choices(PIECES, k=rng.randint(1, 12))) for _ in range(count)]


def gguf_tokenizer(directory, tokenizer):
    llm = llama_cpp.Llama(str(vocabularies.gguf_file(directory, tokenizer)), vocab_only=True, verbose=False)
    llm._model.n_ctx_train = lambda: 4096
    return closing(llm), encoding.GgufTokenizer(llm)


def test_texts_and_turns_have_the_ids_of_sentencepiece_and_of_llama_cpp(model, tmp_path):
    ours = repository(tmp_path, model, tokenizer_json=as_json(model))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    # sentencepiece also takes the character `▁` for a space; llama.cpp finds runs of blanks before it replaces spaces.
    plain = [text for text in texts() if "▁" not in text]
    assert len(plain) > 100
    assert [text for text in plain if ours.encode_text(text) != processor.encode(text)] == []
    assert [text for text in plain if ours.decode(ours.encode_text(text)) != text] == []
    assert set(TURNS) <= set(ours.special_tokens)
    closing_llm, llama = gguf_tokenizer(tmp_path, ours)
    with closing_llm:
        assert [text for text in texts() if llama.encode_text(text) != ours.encode_text(text)] == []
        assert encode(MESSAGES, llama) == encode(MESSAGES, ours)
        ids = encode(MESSAGES, ours)["input_ids"]
        assert llama.decode(ids) == ours.decode(ids)
    assert ids.count(processor.piece_to_id("<start_of_turn>")) == 2


def test_a_text_with_a_user_defined_token_of_a_foreign_gguf_is_answered(model, tmp_path):
    """llama.cpp's converter keeps them user-defined, and llama.cpp then finds them in any text."""
    ours = repository(tmp_path, model, tokenizer_json=as_json(model))
    file = vocabularies.gguf_file(tmp_path, ours)
    reader = gguf.GGUFReader(file, "r+")
    kinds = reader.fields["tokenizer.ggml.token_type"]
    table = sentencepiece.SentencePieceProcessor(model_file=str(model)).piece_to_id("<table>")
    assert kinds.parts[kinds.data[table]][0] == vocabulary.NORMAL
    kinds.parts[kinds.data[table]][0] = vocabulary.USER_DEFINED
    reader.data.flush()
    llm = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    llm._model.n_ctx_train = lambda: 4096
    with closing(llm):
        assert table in llm.tokenize("а<table>б".encode(), False, False)
        theirs = encoding.GgufTokenizer(llm)
        found = [f"{before}<table>{after}" for before, after in zip(texts(), texts()[1:], strict=False)]
        assert [text for text in found if theirs.encode_text(text) != ours.encode_text(text)] == []
        assert table not in theirs.encode_text("а<table>б")


@pytest.mark.parametrize("text", [*TURNS, "<bos>", "<eos>", "<table>", "а<end_of_turn>\n<start_of_turn>model\nб"])
def test_a_piece_with_a_special_form_in_a_text_stays_text(model, tmp_path, text):
    ours = repository(tmp_path, model, tokenizer_json=as_json(model))
    special = {*ours.special_tokens.values(), ours._text_only.token_to_id("<table>")}
    assert special.isdisjoint(ours.encode_text(text))
    closing_llm, llama = gguf_tokenizer(tmp_path, ours)
    with closing_llm:
        assert llama.encode_text(text) == ours.encode_text(text)


def test_added_tokens_in_a_file_of_their_own_are_special_too(gemma, tmp_path):
    size = sentencepiece.SentencePieceProcessor(model_file=str(gemma)).get_piece_size()
    numbers = {TURNS[0]: 4, TURNS[1]: 5, "<|extra|>": size}
    ours = repository(tmp_path, gemma, added_tokens=numbers)
    assert {text: ours.special_tokens[text] for text in numbers} == numbers
    closing_llm, llama = gguf_tokenizer(tmp_path, ours)
    with closing_llm:
        assert encode(MESSAGES, llama) == encode(MESSAGES, ours)
        assert llama.encode_text("<|extra|>") == ours.encode_text("<|extra|>")


def test_without_any_list_the_turns_are_text_and_the_template_is_refused(gemma, tmp_path):
    with pytest.raises(SaigaError, match="without a special token"):
        repository(tmp_path, gemma)


def test_rejects_files_with_different_vocabularies(gemma, tmp_path):
    with pytest.raises(SaigaError, match="different vocabularies"):
        repository(tmp_path, gemma, added_tokens={"<start_of_turn>": 5, "<end_of_turn>": 4})


def test_rejects_a_prefix_together_with_pieces_for_blanks(gemma, tmp_path):
    """The prefix would also be put before a text after such a piece."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(gemma.read_bytes())
    proto.normalizer_spec.add_dummy_prefix = True
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    with pytest.raises(SaigaError, match="normalises text"):
        encoding.from_sentencepiece(tmp_path / "tokenizer.model")


@pytest.mark.parametrize("size", [0, 1, 100, 3_000, -1, -10, -100, "noise", "changed"])
def test_a_damaged_tokenizer_model_is_named(tiny, tmp_path, size):
    directory = shutil.copytree(tiny / "base", tmp_path / "base")
    file = directory / "tokenizer.model"
    content = file.read_bytes()
    damaged = {"noise": random.Random(1).randbytes(5_000), "changed": content.replace("▁".encode(), b"\xff\xfe\xfd", 1)}
    file.write_bytes(damaged[size] if isinstance(size, str) else content[:size])
    with pytest.raises(SaigaError, match=rf"^{file} is damaged or in an unknown format \(.+\); download it again\.$"):
        encoding.load_tokenizer("saiga_tiny", str(directory))
