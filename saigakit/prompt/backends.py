"""Tokenise text with Hugging Face's tokenizers or with llama.cpp, never parsing special tokens in it."""

import io
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, redirect_stderr
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from saigakit.core.files import sha256_of_text
from saigakit.core.lazy import llama_cpp, tokenizers
from saigakit.errors import SaigaError
from saigakit.prompt.sandbox import BROKEN
from saigakit.prompt.template import broken
from saigakit.weights.base_files import read_json

NORMALIZATION_KEY = "saigakit.unicode_normalization"  # in a GGUF: llama.cpp itself never normalises
# In a GGUF, by its specification: the tokenizer.json, for vocabularies that llama.cpp splits differently (tekken).
TOKENIZER_JSON_KEY = "tokenizer.huggingface.json"
Ids = list[int]
# A letter or digit before a sign: all pre-tokenizers of llama.cpp's byte-level vocabularies end a word between the two.
_WORD_END = re.compile(r"[A-Za-z0-9](?=[|>\]_/:-])")


class Tokenizer(Protocol):
    """What `encode` needs; both implementations give the same ids."""

    chat_template: str
    special_tokens: Mapping[str, int]
    variables: Mapping[str, str]  # bos_token, eos_token …, which the template may use

    def encode_text(self, text: str) -> Ids:
        """Encode ordinary text: what looks like a special token stays text."""

    def encode_texts(self, texts: Sequence[str]) -> list[Ids]:
        """Encode many texts, on all cores if possible."""

    def decode(self, ids: Sequence[int]) -> str:
        """Decode without special tokens."""


class FastTokenizer:
    """A tokenizer from the tokenizers library, with its special-token parsing removed.

    `is_nfc`: whether it normalises text to NFC before splitting it.
    `has_prefix_space`: whether text after a special token begins with SentencePiece's space.
    """

    def __init__(self, tokenizer: "tokenizers.Tokenizer", chat_template: str, variables: Mapping[str, str]) -> None:
        content = json.loads(tokenizer.to_str())
        added = content["added_tokens"]
        blanks = [token for token in added if not token["special"] and not token["content"].strip()]
        self.special_tokens: Mapping[str, int] = {
            token["content"]: token["id"] for token in added if token not in blanks
        }
        # Without an entry in the vocabulary they would get new ids.
        if blanks:  # Unigram has a list
            content["model"]["vocab"] |= {token["content"]: token["id"] for token in blanks}
        content |= {"added_tokens": blanks, "post_processor": None, "truncation": None, "padding": None}
        self.is_nfc = any(step["type"] == "NFC" for step in _steps(content.get("normalizer"), "normalizers"))
        self.has_prefix_space = _fix_prefix_space(content)
        self._text_only = tokenizers.Tokenizer.from_str(json.dumps(content))
        self._special_ids = set(self.special_tokens.values())
        self.chat_template = chat_template
        self.variables: Mapping[str, str] = dict(variables)

    def encode_text(self, text: str) -> Ids:
        return self.encode_texts([text])[0]

    def encode_texts(self, texts: Sequence[str]) -> list[Ids]:
        return [encoded.ids for encoded in self._text_only.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._text_only.decode([i for i in ids if i not in self._special_ids])
        return text


def _steps(part: Mapping[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """The members of a Sequence, or the only step."""
    return [] if part is None else list(part.get(name, [part]))


def _fix_prefix_space(content: Mapping[str, Any]) -> bool:
    """`prepend_scheme` "first" affects only the start of a prompt, which is a special token: set it to "never"."""
    for step in _steps(content.get("pre_tokenizer"), "pretokenizers"):
        if step.get("prepend_scheme") == "first":
            step["prepend_scheme"] = "never"
        if step["type"] == "Metaspace":
            return bool(step["prepend_scheme"] == "always")
    return any(step["type"] == "Prepend" for step in _steps(content.get("normalizer"), "normalizers"))


class GgufTokenizer:
    """The tokenizer inside a GGUF file: llama.cpp's, or the embedded tokenizer.json if there is one."""

    def __init__(self, llm: "llama_cpp.Llama") -> None:
        if "tokenizer.chat_template" not in llm.metadata:
            raise SaigaError("This GGUF has no chat template. Give one: saigakit chat FILE --chat-template chatml")
        self._llm = llm
        self.chat_template = llm.metadata["tokenizer.chat_template"]
        vocabulary = llama_cpp.llama_model_get_vocab(llm.model)
        names: dict[int, str] = {}
        self._blanks: list[str] = []
        ends: list[int] = []
        always_found: list[str] = []  # llama.cpp finds these in any text, even if it must not parse special tokens
        for token in range(llm.n_vocab()):
            kind = llama_cpp.llama_vocab_get_attr(vocabulary, token)
            is_added = bool(kind & llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED)
            if not is_added and not kind & llama_cpp.LLAMA_TOKEN_ATTR_CONTROL:
                continue
            if llama_cpp.llama_vocab_is_eog(vocabulary, token):
                ends.append(token)
            text = _text_of(vocabulary, token)
            if is_added and not text.strip():
                self._blanks.append(text)  # which are ordinary text
                continue
            names[token] = text
            always_found += [text] if is_added else []
        self.end_of_generation_ids = frozenset(ends)
        self.special_tokens: Mapping[str, int] = {text: token for token, text in names.items()}
        longest_first = sorted(always_found, key=len, reverse=True)
        self._always_found = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._has_prefix_space = has_prefix_space(llm)
        embedded = llm.metadata.get(TOKENIZER_JSON_KEY)
        self._exact = FastTokenizer(tokenizers.Tokenizer.from_str(embedded), "", {}) if embedded else None
        self._normalizes = llm.metadata.get(NORMALIZATION_KEY) == "NFC"
        ids = {"bos_token": llm.token_bos(), "eos_token": llm.token_eos()}
        self.variables: Mapping[str, str] = {name: names[i] for name, i in ids.items() if i in names}

    def encode_text(self, text: str) -> Ids:
        if self._exact is not None:
            return self._exact.encode_text(text)
        if self._normalizes:
            text = unicodedata.normalize("NFC", text)
        if self._llm.metadata.get("tokenizer.ggml.model") == "llama" and self._always_found.search(text):
            return self._text_only.encode_text(text)
        return [i for part in self._split(text) for i in self._llm.tokenize(part.encode("utf-8"), False, False)]

    def encode_texts(self, texts: Sequence[str]) -> list[Ids]:
        return self._exact.encode_texts(texts) if self._exact else [self.encode_text(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        special = set(self.special_tokens.values())
        text = b"".join(token_bytes(self._llm, i) for i in ids if i not in special).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self._has_prefix_space else text

    @cached_property
    def _text_only(self) -> FastTokenizer:
        """The SentencePiece vocabulary, in which nothing of a text is a user-defined token."""
        vocabulary = llama_cpp.llama_model_get_vocab(self._llm.model)
        texts = [_text_of(vocabulary, i) for i in range(self._llm.n_vocab())]
        scores = {
            text: llama_cpp.llama_vocab_get_score(vocabulary, i)
            for i, text in enumerate(texts)
            if llama_cpp.llama_vocab_get_attr(vocabulary, i) & llama_cpp.LLAMA_TOKEN_ATTR_NORMAL
        }
        ids = {text: i for i, text in enumerate(texts)}
        tokenizer = _merging_by_scores(ids, scores, has_prefix=self._has_prefix_space)
        tokenizer.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in self._blanks])
        return FastTokenizer(tokenizer, "", {})

    def _split(self, text: str) -> list[str]:
        """Cut every user-defined token in two, at a place where byte-level BPE never merges."""
        cuts = [0]
        while found := self._always_found.search(text, cuts[-1]):
            cut = _WORD_END.search(text, found.start(), found.end())
            if cut is None:
                raise SaigaError(f"llama.cpp reads {found.group()!r} in a text as a special token. Remove it.")
            cuts.append(cut.end())
        return [text[start:end] for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]


def _text_of(vocabulary: Any, token: int) -> str:  # noqa: ANN401  # a ctypes pointer
    text: bytes = llama_cpp.llama_vocab_get_text(vocabulary, token)
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        raise SaigaError(f"The vocabulary of this GGUF is damaged: token {token} is {text!r}.") from None


def vocabulary_sha256(llm: "llama_cpp.Llama") -> str:
    """Of the texts of all tokens."""
    vocabulary = llama_cpp.llama_model_get_vocab(llm.model)
    return sha256_of_text("\0".join(_text_of(vocabulary, token) for token in range(llm.n_vocab())))


def has_prefix_space(llm: "llama_cpp.Llama") -> bool:
    """Whether a SentencePiece vocabulary puts a blank before a text, as llama.cpp decides it."""
    is_default = "true" if llm.metadata.get("tokenizer.ggml.model") == "llama" else "false"
    return bool(llm.metadata.get("tokenizer.ggml.add_space_prefix", is_default) == "true")


@contextmanager
def gguf_vocabulary(file: Path) -> Iterator["llama_cpp.Llama"]:
    """Load only the metadata and the vocabulary of a GGUF."""
    with redirect_stderr(io.StringIO()):  # it warns that a vocabulary has no context
        try:
            llm = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
        except BROKEN as error:  # it compiles the template
            raise broken(error, file) from None
    with closing(llm):
        yield llm


def token_bytes(llm: "llama_cpp.Llama", token: int) -> bytes:
    """The bytes of a token, which may be part of a character; empty for control tokens."""
    import ctypes

    vocabulary = llama_cpp.llama_model_get_vocab(llm.model)
    size = 64
    while True:  # llama-cpp-python's own version truncates after 32 bytes
        buffer = (ctypes.c_char * size)()
        used = llama_cpp.llama_token_to_piece(vocabulary, token, buffer, size, 0, False)
        if used >= 0:
            return buffer.raw[:used]
        size = -used  # the length that it needs


def from_json_file(file: Path) -> "tokenizers.Tokenizer":
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing more specific
        raise SaigaError(f"{file} is damaged or in an unknown format ({error}); download it again.") from None


def sentencepiece_tokens(file: Path) -> tuple[Any, list[dict[str, Any]]]:
    """The model in a tokenizer.model, and the tokens that the files next to it add to its pieces or treat as special.

    Runs of blanks that SentencePiece finds in any text are among them; other pieces of this kind, such as `<table>`,
    are not: like every token that is not a control token, they never come from a text.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    spm: Any = sentencepiece_model_pb2  # protobuf makes its classes at run time
    try:
        proto = spm.ModelProto.FromString(file.read_bytes())
        if not all(isinstance(piece.piece, str) for piece in proto.pieces) or not proto.HasField("normalizer_spec"):
            raise DecodeError("a piece is not UTF-8, or the end is missing")
    except DecodeError as error:
        raise SaigaError(f"{file} is damaged or in an unknown format ({error}); download it again.") from None
    found = {i: {"id": i, "content": text} for text, i in read_json(file.parent / "added_tokens.json", {}).items()}
    decoder = read_json(file.parent / "tokenizer_config.json", {}).get("added_tokens_decoder", {})
    found |= {int(i): {**token, "id": int(i)} for i, token in decoder.items()}
    found |= {token["id"]: token for token in read_json(file.parent / "tokenizer.json", {}).get("added_tokens", [])}
    for i, piece in enumerate(proto.pieces):
        if piece.type == piece.USER_DEFINED and _is_blank(piece.piece):
            found[i] = {"id": i, "content": piece.piece}
        elif piece.type in (piece.CONTROL, piece.UNKNOWN) or not found.get(i, {"special": False}).get("special", True):
            found.pop(i, None)
    return proto, [found[i] for i in sorted(found)]


def _is_blank(text: str) -> bool:
    return not text.replace("▁", "").strip()


def from_sentencepiece(file: Path) -> "tokenizers.Tokenizer":
    """Read a tokenizer.model with its scores and the added tokens of the files next to it.

    If it puts a space before a text, it does so after every special token too (`legacy`), as llama.cpp does.
    """
    from tokenizers import AddedToken

    proto, added = sentencepiece_tokens(file)
    spec = proto.normalizer_spec
    has_blanks = any(_is_blank(token["content"]) for token in added)
    if spec.precompiled_charsmap or spec.remove_extra_whitespaces or (spec.add_dummy_prefix and has_blanks):
        raise SaigaError(
            f"{file} normalises text ({spec.name}) in a way that saigakit does not support. "
            "Use the tokenizer.json of this model."
        )
    vocabulary = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == piece.NORMAL}
    for token in added:
        if _is_blank(token["content"]):  # found in the raw text, where a space is not yet `▁`
            vocabulary.pop(token["content"], None)
            token["content"] = token["content"].replace("▁", " ")
            vocabulary[token["content"]] = token["id"]
    tokenizer = _merging_by_scores(vocabulary, scores, has_prefix=spec.add_dummy_prefix)
    control = [piece.piece for piece in proto.pieces if piece.type in (piece.CONTROL, piece.UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    flags = ("special", "lstrip", "rstrip", "single_word")
    tokenizer.add_tokens(  # in one call: each one prepares the search for all of them
        [AddedToken(t["content"], normalized=False, **{name: bool(t.get(name)) for name in flags}) for t in added]
    )
    if any(tokenizer.token_to_id(token["content"]) != token["id"] for token in added):
        raise SaigaError(f"{file} and the files next to it have different vocabularies; download them again.")
    return tokenizer


def _merging_by_scores(
    vocabulary: Mapping[str, int], scores: Mapping[str, float], *, has_prefix: bool
) -> "tokenizers.Tokenizer":
    """SentencePiece's BPE; `scores`: of the pieces that texts consist of. `has_prefix`: a space before each text."""
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    merges = [
        (score, (text[:cut], text[cut:]))
        for text, score in scores.items()
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]
    merges.sort(key=lambda item: -item[0])  # the best score merges first; ties in vocabulary order
    tokenizer = Tokenizer(
        BPE(dict(vocabulary), [pair for _, pair in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    prefix = [normalizers.Prepend("▁")] if has_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if has_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer
