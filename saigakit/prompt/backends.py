"""Text to ids without control tokens, by the tokenizers library or by llama.cpp: two of one protocol, the same ids."""

import io
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from saigakit.errors import SaigaError

if TYPE_CHECKING:
    import llama_cpp
    import tokenizers

NORMALIZATION_KEY = "saigakit.unicode_normalization"  # of a GGUF: llama.cpp itself never normalises
# Of a GGUF, by its specification: the tokenizer.json, where llama.cpp splits words otherwise than it (tekken).
TOKENIZER_JSON_KEY = "tokenizer.huggingface.json"
Ids = list[int]


class Tokenizer(Protocol):
    """What `encode` needs; Hugging Face's and llama.cpp's give the same ids."""

    chat_template: str
    special_tokens: Mapping[str, int]
    variables: Mapping[str, str]  # bos_token, eos_token … as the template may name them

    def encode_text(self, text: str) -> Ids:
        """Ids of ordinary text: what looks like a special token stays text."""

    def encode_texts(self, texts: Sequence[str]) -> list[Ids]:
        """The same for many, on all cores where it can."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""


class FastTokenizer:
    """A tokenizer over the tokenizers library, without its special-token parsing.

    `is_nfc`: whether it composes the characters of a text (Unicode's normal form NFC) before it splits it.
    `has_prefix_space`: whether a run of text after a special token begins with SentencePiece's space.
    """

    def __init__(self, tokenizer: "tokenizers.Tokenizer", chat_template: str, variables: Mapping[str, str]) -> None:
        import tokenizers

        content = json.loads(tokenizer.to_str())
        blanks = [token for token in content["added_tokens"] if not token["special"] and not token["content"].strip()]
        self.special_tokens: Mapping[str, int] = {
            token["content"]: token["id"] for token in content["added_tokens"] if token not in blanks
        }
        content["model"]["vocab"] |= {
            token["content"]: token["id"] for token in blanks
        }  # or their ids were counted anew
        content |= {"added_tokens": blanks, "post_processor": None, "truncation": None, "padding": None}
        self.is_nfc, self.has_prefix_space = _is_nfc(content), _has_prefix_space(content)
        self._text_only = tokenizers.Tokenizer.from_str(json.dumps(content))
        self._special_ids = set(self.special_tokens.values())
        self.chat_template = chat_template
        self.variables: Mapping[str, str] = dict(variables)

    def encode_text(self, text: str) -> Ids:
        return self.encode_texts([text])[0]

    def encode_texts(self, texts: Sequence[str]) -> list[Ids]:
        return [found.ids for found in self._text_only.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._text_only.decode([i for i in ids if i not in self._special_ids])
        return text


def _steps(part: Mapping[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """The members of a Sequence, or the one step that there is."""
    return [] if part is None else list(part.get(name, [part]))


def _is_nfc(content: Mapping[str, Any]) -> bool:
    return any(step["type"] == "NFC" for step in _steps(content.get("normalizer"), "normalizers"))


def _has_prefix_space(content: Mapping[str, Any]) -> bool:
    """`prepend_scheme` "first" means the beginning of a whole prompt, where a special token stands: set to "never"."""
    for step in _steps(content.get("pre_tokenizer"), "pretokenizers"):
        if step.get("prepend_scheme") == "first":
            step["prepend_scheme"] = "never"
        if step["type"] == "Metaspace":
            return bool(step["prepend_scheme"] == "always")
    return any(step["type"] == "Prepend" for step in _steps(content.get("normalizer"), "normalizers"))


class GgufTokenizer:
    """The tokenizer inside a GGUF file, by llama.cpp; by its tokenizer.json where the file holds one."""

    def __init__(self, llm: "llama_cpp.Llama") -> None:
        import llama_cpp
        import tokenizers

        self._llm = llm
        vocabulary = llama_cpp.llama_model_get_vocab(llm.model)
        kinds = {i: llama_cpp.llama_vocab_get_attr(vocabulary, i) for i in range(llm.n_vocab())}
        special = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED
        names = {
            i: llama_cpp.llama_vocab_get_text(vocabulary, i).decode("utf-8")
            for i, kind in kinds.items()
            if kind & special
        }
        is_added = {i: kinds[i] & llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED for i in names}
        # Runs of blanks are text like any other.
        names = {i: token for i, token in names.items() if token.strip() or not is_added[i]}
        self.special_tokens: Mapping[str, int] = {token: i for i, token in names.items()}
        # llama.cpp finds these in any text, even when asked not to look for special tokens.
        found = [name for i, name in names.items() if is_added[i]]
        longest_first = sorted(found, key=len, reverse=True)
        self._always_found = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        if "tokenizer.chat_template" not in llm.metadata:
            raise SaigaError("This GGUF holds no chat template, so its prompt format is unknown.")
        self.chat_template = llm.metadata["tokenizer.chat_template"]
        self._has_prefix_space = llm.metadata.get("tokenizer.ggml.add_space_prefix") == "true"
        whole = llm.metadata.get(TOKENIZER_JSON_KEY)
        self._exact = FastTokenizer(tokenizers.Tokenizer.from_str(whole), "", {}) if whole else None
        self._normalizes = llm.metadata.get(NORMALIZATION_KEY) == "NFC"
        ids = {"bos_token": llm.token_bos(), "eos_token": llm.token_eos()}
        self.variables: Mapping[str, str] = {name: names[i] for name, i in ids.items() if i in names}

    def encode_text(self, text: str) -> Ids:
        if self._exact is not None:
            return self._exact.encode_text(text)
        if self._normalizes:
            text = unicodedata.normalize("NFC", text)
        return [i for part in self._cut(text) for i in self._llm.tokenize(part.encode("utf-8"), False, False)]

    def encode_texts(self, texts: Sequence[str]) -> list[Ids]:
        return self._exact.encode_texts(texts) if self._exact else [self.encode_text(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        special = set(self.special_tokens.values())
        text = b"".join(piece(self._llm, i) for i in ids if i not in special).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self._has_prefix_space else text

    def _cut(self, text: str) -> list[str]:
        """The text in parts that hold no whole user-defined token, cut where byte-level BPE never merges."""
        cuts = [0]
        while found := self._always_found.search(text, cuts[-1]):
            cut = _WORD_END.search(text, found.start(), found.end())
            if cut is None or self._llm.metadata.get("tokenizer.ggml.model") != "gpt2":
                raise SaigaError(
                    f"llama.cpp would read {found.group()!r} inside a text as a special token. Take it out of the text."
                )
            cuts.append(cut.end())
        return [text[start:end] for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]


@contextmanager
def gguf_vocabulary(file: Path) -> Iterator["llama_cpp.Llama"]:
    """A GGUF of which only the metadata and the vocabulary are loaded."""
    import llama_cpp

    with redirect_stderr(io.StringIO()):  # it warns that a vocabulary has no context
        llm = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    with closing(llm):
        yield llm


def piece(llm: "llama_cpp.Llama", token: int) -> bytes:
    """Bytes of a token, part of a character perhaps; control tokens have none."""
    import ctypes

    import llama_cpp

    vocabulary = llama_cpp.llama_model_get_vocab(llm.model)
    size = 64
    while True:  # llama-cpp-python's own loses what is longer than 32
        buffer = (ctypes.c_char * size)()
        used = llama_cpp.llama_token_to_piece(vocabulary, token, buffer, size, 0, False)
        if used >= 0:
            return buffer.raw[:used]
        size = -used  # the length that it needs


# A letter before a sign: all pre-tokenizers of llama.cpp's byte-level vocabularies end a word between the two.
_WORD_END = re.compile(r"[A-Za-z](?=[|>\]_/:-])")


def from_json(file: Path) -> "tokenizers.Tokenizer":
    """Raises SaigaError where the file is damaged."""
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing more exact
        raise SaigaError(f"{file} is damaged or of an unknown kind ({error}); fetch it again.") from None


def from_sentencepiece(file: Path, saved: "tokenizers.Tokenizer | None" = None) -> "tokenizers.Tokenizer":
    """tokenizer.model with its scores and the prefix space after every special token (`legacy`), as in llama.cpp.

    `saved`: the same vocabulary with tokens that were added to it, which are taken from there.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    spm: Any = sentencepiece_model_pb2  # protobuf makes its classes at run time
    proto = spm.ModelProto.FromString(file.read_bytes())
    _require_identity(file, proto.normalizer_spec)
    vocabulary = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == piece.NORMAL}
    merges = [
        (score, (text[:cut], text[cut:]))
        for text, score in scores.items()
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]
    merges.sort(key=lambda item: -item[0])  # the best score merges first; ties in vocabulary order
    tokenizer = Tokenizer(
        BPE(vocabulary, [pair for _, pair in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    control = [piece.piece for piece in proto.pieces if piece.type in (piece.CONTROL, piece.UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    added = {} if saved is None else saved.get_added_tokens_decoder()
    for number, token in sorted(added.items()):
        if token.content in vocabulary:
            continue
        tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != number:
            raise SaigaError(f"{file} and the tokenizer.json beside it are of two vocabularies; fetch both again.")
    return tokenizer


def _require_identity(file: Path, normalizer: Any) -> None:  # noqa: ANN401  # protobuf makes its class at run time
    changed = normalizer.remove_extra_whitespaces or not normalizer.add_dummy_prefix
    if normalizer.precompiled_charsmap or changed:
        raise SaigaError(
            f"{file} changes texts before it splits them ({normalizer.name}), and saigakit does not know how. "
            "Use the tokenizer.json of this model."
        )
