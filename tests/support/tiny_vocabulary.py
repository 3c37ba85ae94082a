"""Make saigakit/demo/tiny/tokenizer.model from its records.jsonl: byte-pair encoding with bytes as a fallback."""

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

SPACE = "▁"
# Pieces of the vocabulary with and without a leading space, so that a loader that drops it gets other ids.
ROLES = ("system", "user", "bot")
_LETTERS = "абвгдеёжзийклмнопрстуфхцчшщъыьэюя"
_LATIN = "abcdefghijklmnopqrstuvwxyz"
_SIGNS = "0123456789.,:;!?-–—()[]{}<>«»„“\"'/\\|_+=*&%$#@^~`№"
ALPHABET = _LETTERS + _LETTERS.upper() + _LATIN + _LATIN.upper() + _SIGNS
_LAST = -1e9  # score of whitespace-only pieces in Llama's model, which merge last


def sentencepiece_model(texts: Iterable[str], size: int) -> bytes:
    """A serialised ModelProto of `size` pieces; the same texts give the same bytes."""
    from sentencepiece import sentencepiece_model_pb2

    spm: Any = sentencepiece_model_pb2  # protobuf creates its classes at run time
    kind = spm.ModelProto.SentencePiece
    pieces = [("<unk>", 0.0, kind.UNKNOWN), ("<s>", 0.0, kind.CONTROL), ("</s>", 0.0, kind.CONTROL)]
    pieces += [(f"<0x{byte:02X}>", 0.0, kind.BYTE) for byte in range(256)]
    spaces = [(SPACE * length, _LAST, kind.NORMAL) for length in range(1, 17)]
    count = size - len(pieces) - len(spaces) - len(ALPHABET)
    ranked = [*_merges(texts, count), *ALPHABET]
    pieces += [(piece, float(-rank), kind.NORMAL) for rank, piece in enumerate(ranked)]
    pieces += spaces
    model = spm.ModelProto()
    for piece, score, type_ in pieces:
        model.pieces.add(piece=piece, score=score, type=type_)
    trainer = model.trainer_spec
    trainer.model_type = spm.TrainerSpec.BPE
    trainer.vocab_size, trainer.byte_fallback, trainer.split_digits = len(pieces), True, True
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def _merges(texts: Iterable[str], count: int) -> list[str]:
    """The first `count` merges of byte-pair encoding, in order."""
    frequency = Counter(SPACE + word for text in texts for word in text.split())
    frequency |= dict.fromkeys(ROLES, 2_000_000) | dict.fromkeys((SPACE + role for role in ROLES), 1_000_000)
    words = {word: list(word) for word in frequency}
    merges: list[str] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in words.items():
            for pair in pairwise(parts):
                if not any(character.isdigit() for character in "".join(pair)):
                    pairs[pair] += frequency[word]
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append("".join(best))
        words = {word: _merged(parts, best) for word, parts in words.items()}
    return merges


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged
