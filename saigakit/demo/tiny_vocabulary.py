"""Texts into a SentencePiece model of Llama 2's kind: byte fallback, prefix space, pieces with scores."""

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

SIZE = 768  # a multiple of 32, as every dimension of the tiny model is: ggml's blocks
SPACE = "▁"
# Whole words of the vocabulary, with and without the space before them: loaders that drop it get other ids.
ROLES = ("system", "user", "bot")
_LETTERS = "абвгдеёжзийклмнопрстуфхцчшщъыьэюя"
_LATIN = "abcdefghijklmnopqrstuvwxyz"
_SIGNS = "0123456789.,:;!?-–—()[]{}<>«»„“\"'/\\|_+=*&%$#@^~`№"
ALPHABET = _LETTERS + _LETTERS.upper() + _LATIN + _LATIN.upper() + _SIGNS
_LAST = -1e9  # the score of whitespace-only pieces in Llama's model: they merge after everything else


def sentencepiece_model(texts: Iterable[str]) -> bytes:
    """A serialised ModelProto of SIZE pieces; the same texts give the same bytes."""
    from sentencepiece import sentencepiece_model_pb2

    spm: Any = sentencepiece_model_pb2  # protobuf makes its classes at run time
    kind = spm.ModelProto.SentencePiece
    pieces = [("<unk>", 0.0, kind.UNKNOWN), ("<s>", 0.0, kind.CONTROL), ("</s>", 0.0, kind.CONTROL)]
    pieces += [(f"<0x{byte:02X}>", 0.0, kind.BYTE) for byte in range(256)]
    spaces = [(SPACE * length, _LAST, kind.NORMAL) for length in range(1, 17)]
    count = SIZE - len(pieces) - len(spaces) - len(ALPHABET)
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
    """The `count` pieces that byte-pair encoding learns, in the order in which they merge."""
    frequency = Counter(SPACE + word for text in texts for word in text.split())
    frequency |= dict.fromkeys(ROLES, 2_000_000) | dict.fromkeys((SPACE + role for role in ROLES), 1_000_000)
    words = {word: list(word) for word in frequency}
    learned: list[str] = []
    while len(learned) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in words.items():
            for pair in pairwise(parts):
                if not any(character.isdigit() for character in pair[1] + pair[0]):
                    pairs[pair] += frequency[word]
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        learned.append("".join(best))
        words = {word: _merged(parts, best) for word, parts in words.items()}
    return learned


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged
