"""Convert a tokenizer's files to the vocabulary of a GGUF, so that llama.cpp gives the same token ids."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from saigakit.core.lazy import gguf
from saigakit.errors import SaigaError
from saigakit.prompt import encoding, template
from saigakit.prompt.backends import (
    NORMALIZATION_KEY,
    TOKENIZER_JSON_KEY,
    GgufTokenizer,
    gguf_vocabulary,
    sentencepiece_tokens,
)
from saigakit.prompt.encoding import FastTokenizer
from saigakit.weights.base_files import read_json

Token = tuple[str, int, float]  # text, type, score
# Token types; SentencePiece and llama.cpp use the same numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<｜.*｜>|<unused.*>|<pad>|<mask>|<2mass>|\[@BOS@\]", re.DOTALL)
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # GGUF's names by Hugging Face's
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS, _SPACES = r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START = r"[^\r\n\p{L}\p{N}]?"
_CASED = rf"{_START}{_UPPER}*{_LOWER}+|{_START}{_UPPER}+{_LOWER}*"
_SIGNS_OR_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
# llama.cpp's name for how a tokenizer.json splits text before the merges.
_PRE_TOKENIZERS = {
    (rf"{_WORDS}|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}", "bytes"): "llama-bpe",
    (rf"{_WORDS}|\p{{N}}|{_SIGNS}|{_SPACES}", "bytes"): "qwen2",
    (rf"{_CASED}|\p{{N}}|{_SIGNS_OR_SLASHES}|{_SPACES}", "bytes"): "tekken",
    ("digits", "words and bytes"): "smollm",
    ("words and bytes",): "gpt-2",
}
# llama.cpp's pattern lacks combining marks: "за́мок" with its stress mark is one word, but three for llama.cpp.
_INEXACT = frozenset({"tekken"})
_IGNORES_MERGES = frozenset({"llama-bpe", "tekken"})  # here llama.cpp takes a word that is a token without merging it
PROBE = (  # a text in which tokenizers would differ
    "Привет! Ёлка — «съешь» ещё, и\u0306од: №5, 3,14 и 12345 ₽ 🙂 don't I'LL\n\n  два  пробела\tТаб \r\nКонец. "
    "<s> </s> <|im_end|>"
)


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Tokens in the order of their ids, as many as the embeddings have rows."""

    model: str  # llama.cpp's "llama" (SentencePiece) or "gpt2" (byte-level BPE)
    pre: str
    tokens: list[Token]  # byte-level BPE has no scores
    merges: list[str] | None = None
    special_ids: Mapping[str, int] = field(default_factory=dict)  # by GGUF's names
    adds_bos: bool = False  # whether programs prepend it to a prompt
    has_prefix_space: bool = True  # SentencePiece: before text at the start and after a special token
    is_nfc: bool = False  # whether texts are normalised to Unicode's composed form
    tokenizer_json: str | None = None  # if llama.cpp splits text differently

    @classmethod
    def from_tokenizer(cls, tokenizer_dir: Path, tokenizer: FastTokenizer, config: Mapping[str, Any]) -> Self:
        """Raises SaigaError for a tokenizer that llama.cpp lacks, or with more tokens than the base has rows."""
        vocabulary = cls._read_files(tokenizer_dir, config["vocab_size"])
        return replace(
            vocabulary,
            special_ids=_special_ids([text for text, _, _ in vocabulary.tokens], tokenizer, config),
            adds_bos=_adds_bos(tokenizer_dir, tokenizer),
            has_prefix_space=tokenizer.has_prefix_space,
            is_nfc=tokenizer.is_nfc,
        )

    @classmethod
    def _read_files(cls, tokenizer_dir: Path, rows: int) -> Self:
        file = tokenizer_dir / "tokenizer.json"
        if not file.is_file():
            return cls._read_sentencepiece(tokenizer_dir / "tokenizer.model", rows)
        content = read_json(file)
        if content["model"].get("type") != "BPE":
            raise SaigaError(f"{file} is of type {content['model'].get('type')}; only BPE can be exported to GGUF.")
        if not content["model"].get("byte_fallback"):
            return cls._read_byte_level(file, content, rows)
        if (tokenizer_dir / "tokenizer.model").is_file():
            return cls._read_sentencepiece(tokenizer_dir / "tokenizer.model", rows)
        return cls._read_byte_fallback(content, rows)

    @classmethod
    def _read_sentencepiece(cls, file: Path, rows: int) -> Self:
        proto, added = sentencepiece_tokens(file)
        # llama.cpp's converter makes user-defined pieces normal tokens too.
        rename = {USER_DEFINED: NORMAL}
        pieces = enumerate(proto.pieces)
        found = {i: (piece.piece, rename.get(piece.type, piece.type), piece.score) for i, piece in pieces}
        return cls(model="llama", pre="default", tokens=_arrange(found, added, rows))

    @classmethod
    def _read_byte_fallback(cls, content: Mapping[str, Any], rows: int) -> Self:
        """SentencePiece saved as tokenizer.json: the score of a piece is the rank of the merge that creates it."""
        ranks: dict[str, int] = {}
        for rank, merge in enumerate(content["model"]["merges"]):
            ranks.setdefault("".join(_pair(merge)), rank)
        types = {f"<0x{byte:02X}>": BYTE for byte in range(256)} | {content["model"].get("unk_token"): UNKNOWN}
        found = {
            index: (piece, types.get(piece, NORMAL), -float(ranks.get(piece, len(ranks))))
            for piece, index in content["model"]["vocab"].items()
        }
        control = {index for index, (_, kind, _) in found.items() if kind in (UNKNOWN, CONTROL)}
        added = [token for token in content["added_tokens"] if token["id"] not in control]
        return cls(model="llama", pre="default", tokens=_arrange(found, added, rows))

    @classmethod
    def _read_byte_level(cls, file: Path, content: Mapping[str, Any], rows: int) -> Self:
        found = {index: (text, NORMAL, 0.0) for text, index in content["model"]["vocab"].items()}
        pre = _pre_tokenizer(file, content.get("pre_tokenizer") or {})
        if bool(content["model"].get("ignore_merges")) != (pre in _IGNORES_MERGES):
            _require_merges(file, content, pre)
        return cls(
            model="gpt2",
            pre=pre,
            tokens=_arrange(found, content["added_tokens"], rows),
            merges=[" ".join(_pair(merge)) for merge in content["model"]["merges"]],
            tokenizer_json=json.dumps(content, ensure_ascii=False) if pre in _INEXACT else None,
        )

    def write_metadata(self, writer: "gguf.GGUFWriter") -> None:
        """Write the keys that llama.cpp's own converter writes."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        texts, types, scores = map(list, zip(*self.tokens, strict=True))
        writer.add_token_list(texts)
        if self.model == "llama":
            writer.add_token_scores(scores)
        writer.add_token_types(types)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        for name, token_id in self.special_ids.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token_id)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(False)
        writer.add_add_space_prefix(self.model == "llama" and self.has_prefix_space)
        if self.tokenizer_json is not None:
            writer.add_string(TOKENIZER_JSON_KEY, self.tokenizer_json)
        if self.is_nfc:
            writer.add_string(NORMALIZATION_KEY, "NFC")


def _special_ids(texts: Sequence[str], tokenizer: FastTokenizer, config: Mapping[str, Any]) -> dict[str, int]:
    """From the tokenizer, else from config.json; eot is what ends a turn, if that is not eos."""
    ids: dict[str, int] = {}
    for name, gguf_name in _SPECIAL.items():
        number = config.get(f"{name}_token_id")
        number = number[0] if isinstance(number, list) else number
        text = tokenizer.variables.get(f"{name}_token")
        if text in texts:
            ids[gguf_name] = texts.index(text)
        elif number is not None:
            ids[gguf_name] = number
    (end_of_turn,) = encoding.end_of_turn_ids(tokenizer)
    return ids if ids.get("eos") == end_of_turn else {**ids, "eot": end_of_turn}


def _adds_bos(tokenizer_dir: Path, tokenizer: FastTokenizer) -> bool:
    """As in tokenizer_config.json, unless the template writes it already."""
    turn = [{"role": "user", "content": "?"}]
    prompt = template.render(turn, tokenizer.chat_template, add_generation_prompt=True, variables=tokenizer.variables)
    if prompt.startswith(tokenizer.variables.get("bos_token", "")):
        return False
    return read_json(tokenizer_dir / "tokenizer_config.json", {}).get("add_bos_token") is True


def _pair(merge: str | Sequence[str]) -> Sequence[str]:
    """Older tokenizer.json files store a merge as one string."""
    return merge.split(" ") if isinstance(merge, str) else merge


def _arrange(found: dict[int, Token], added: Sequence[Mapping[str, Any]], rows: int) -> list[Token]:
    """Add tokens to `found`, and return all by id, padded to `rows`. Raises SaigaError if there are more."""
    for token in added:
        text = token["content"]
        if token.get("special") or _LOOKS_SPECIAL.fullmatch(text):  # as in llama.cpp's converter
            found[token["id"]] = (text, CONTROL, -1000.0)
        else:  # llama.cpp searches for these in the raw text, where a space is not yet `▁`
            found[token["id"]] = (text.replace("▁", " "), USER_DEFINED, -1000.0)
    if max(found) >= rows:
        raise SaigaError(
            f"The tokenizer has {max(found) + 1} tokens, but the embeddings of the base have {rows} rows: "
            "they belong to different models. Give the tokenizer of this base."
        )
    return [found.get(i, (f"[PAD{i}]", UNUSED, -10000.0)) for i in range(rows)]


def _pre_tokenizer(file: Path, content: Mapping[str, Any]) -> str:
    steps = tuple(_step(part) for part in content.get("pretokenizers", [content]))
    if steps not in _PRE_TOKENIZERS:
        raise SaigaError(
            f"{file} splits text in an unknown way ({steps}), so llama.cpp would give other token ids. "
            f"Supported are the tokenizers of {', '.join(_PRE_TOKENIZERS.values())}."
        )
    return _PRE_TOKENIZERS[steps]


def _require_merges(file: Path, content: Mapping[str, Any], pre: str) -> None:
    """Raises SaigaError if merges do not make each token: then llama.cpp's other `ignore_merges` changes the ids."""
    from tokenizers import models

    model, added = content["model"], {token["content"] for token in content["added_tokens"]}
    merging = models.BPE(model["vocab"], [(left, right) for left, right in map(_pair, model["merges"])])
    if split := [word for word in model["vocab"].keys() - added if len(merging.tokenize(word)) > 1]:
        problem = f"its merges do not make {len(split)} of its tokens, such as {min(split)!r}"
        raise SaigaError(f"{file}: {problem}, and llama.cpp's ignore_merges for {pre} differs, so its ids would too.")


def _step(part: Mapping[str, Any]) -> str:
    match part:
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False}:
            return pattern
        case {"type": "Digits", "individual_digits": True}:
            return "digits"
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(use_regex)}:
            return "words and bytes" if use_regex else "bytes"
    return json.dumps(part, ensure_ascii=False)


def compare_ids(gguf_file: Path, tokenizer: FastTokenizer, texts: Sequence[str]) -> list[SaigaError]:
    """Returns why llama.cpp cannot read some texts as text. Raises SaigaError if it gives other ids to one."""
    refused = []
    with gguf_vocabulary(gguf_file) as llm:
        llama_cpp_tokenizer = GgufTokenizer(llm)
        for text in texts:
            try:
                found = llama_cpp_tokenizer.encode_text(text)
            except SaigaError as error:
                refused.append(error)
                continue
            if found != (wanted := tokenizer.encode_text(text)):
                raise SaigaError(
                    f"llama.cpp reads {text!r} as {found}, but the model was trained on {wanted}: saigakit cannot "
                    "export this tokenizer."
                )
    return refused
