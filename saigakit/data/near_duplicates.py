"""Find near-duplicates: records whose user texts have most phrases in common."""

import math
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain, compress, islice, pairwise
from operator import not_
from typing import TYPE_CHECKING, Any

from saigakit.core.lazy import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Keys = NDArray[np.uint64]
    Indices = NDArray[np.int64]

SAMPLE = 1000  # records that are searched for boilerplate
THRESHOLD = 0.65  # the Jaccard similarity above which two records are near-duplicates
MIN_SHINGLES = 10  # records with fewer are only compared exactly
_SHARED_BY, _SHARED_AT_LEAST, _SHARED_AT_MOST = 0.2, 10, 50  # of the sample: how many records share boilerplate
_SLOTS = 128  # the standard error of a similarity of 0.7 is 0.03
_SAME_BY_CHANCE = 1 / 256  # each slot is reduced to one byte
_LEAST_SAME = math.ceil(_SLOTS * (THRESHOLD + (1 - THRESHOLD) * _SAME_BY_CHANCE))
_BAND = 5  # slots that candidates share: a similarity of 0.75 does in one of the 25 bands with probability 0.999
_KEY = 8  # slots of a sort key; those beyond the band sort the most similar of a big band together
_BANDS = range(0, _SLOTS - _KEY + 1, _BAND)  # their first slots
_NEIGHBOURS = 2  # compared on each side; 1 misses none of 500 among 60,000 that share half of their sentences
_SEED = 42
_BATCH = 1000  # records; rensa signs a batch in one call
_BEYOND_BAND = 8 * (_KEY - _BAND)  # bits of a sort key
_VERIFIED = 1 << 16  # pairs verified at once, 8 MiB of slots
_WORDS = re.compile(r"\w+")
_CHANGED_WORD = re.compile(rb"(?<=\x01\x01)\x00{1,2}(?=\x01\x01)")  # an edited word within boilerplate


@dataclass(frozen=True)
class Signatures:
    """One row per record. `judged` is False for records that are only compared exactly."""

    slots: "NDArray[np.uint8]"
    texts: "Keys"  # hashes; `audit` counts those with equal texts: as duplicates or as one question, different answers
    judged: "NDArray[np.bool]"

    def __len__(self) -> int:
        return len(self.texts)


class Signer:
    """Make Signatures from a stream of texts, 137 bytes each. Use one `boilerplate` for all that is compared."""

    def __init__(self, boilerplate: frozenset[str]) -> None:
        self._boilerplate = boilerplate
        self._slots, self._judged, self._texts = bytearray(), bytearray(), array("Q")
        self._batch: list[list[str]] = []

    def add(self, text: str) -> None:
        own = split_shingles(text, self._boilerplate)
        self._judged.append(len(set(own)) >= MIN_SHINGLES)
        self._texts.append(digest(text))
        self._batch.append(own)
        if len(self._batch) == _BATCH:
            self._sign()

    def finish(self) -> Signatures:
        self._sign()
        slots = np.frombuffer(self._slots, np.uint8).reshape(-1, _SLOTS)
        return Signatures(slots, np.frombuffer(self._texts, np.uint64), np.frombuffer(self._judged, np.bool))

    def _sign(self) -> None:
        import rensa

        rows = rensa.RMinHash.digest_matrix_from_token_sets(self._batch, _SLOTS, _SEED).to_rows()
        self._slots += np.array(rows, np.uint32).astype(np.uint8).tobytes()  # the low byte: the high ones are small
        self._batch = []


def digest(text: str) -> int:
    """The same in every process, unlike `hash`."""
    return int.from_bytes(blake2b(text.encode("utf-8"), digest_size=8).digest())


def join_user_texts(messages: Iterable[Mapping[str, Any]]) -> str:
    """The text by which records are compared."""
    return "\n".join(message["content"] for message in messages if message["role"] == "user")


def find_boilerplate(texts: Iterable[str]) -> frozenset[str]:
    """Phrases, such as a common instruction, that more than 20 % of the first SAMPLE texts share, and at least 10.

    50 texts suffice, because an instruction may have several wordings. Pick texts from all over the records.
    """
    sampled = [set(_pairs(text)) for text in islice(texts, SAMPLE)]
    counts = Counter(chain.from_iterable(sampled))
    least = min(max(math.floor(_SHARED_BY * len(sampled)) + 1, _SHARED_AT_LEAST), _SHARED_AT_MOST)
    return frozenset(shingle for shingle, count in counts.items() if count >= least)


def split_shingles(text: str, common: frozenset[str]) -> list[str]:
    """The pairs of adjacent words, without boilerplate and edited words in it."""
    pairs = _pairs(text)
    is_common = bytes(map(common.__contains__, pairs))
    return list(compress(pairs, map(not_, _CHANGED_WORD.sub(lambda run: b"\x01" * len(run[0]), is_common))))


def find_within(records: Signatures) -> "Indices":
    """For each record the index of an earlier near-duplicate or -1; also -1 for one with an equal text."""
    near = np.full(len(records), -1)
    rows = _distinct(records)
    for start in _BANDS:
        keys, ordered = _sorted(records, rows, start)
        for apart in range(1, _NEIGHBOURS + 1):
            together = keys[apart:] >> _BEYOND_BAND == keys[:-apart] >> _BEYOND_BAND
            one, other = ordered[apart:][together], ordered[:-apart][together]
            _verify(near, np.maximum(one, other), np.minimum(one, other), records, records)
    return near


def find_across(records: Signatures, training: Signatures) -> "Indices":
    """For each record the index of a near-duplicate in training or -1; also -1 for one with an equal text."""
    near = np.full(len(records), -1)
    candidates = np.flatnonzero(records.judged & ~np.isin(records.texts, training.texts))
    rows = _distinct(training)
    if not len(rows):
        return near
    for start in _BANDS:
        keys, ordered = _sorted(training, rows, start)
        own = _keys(records, candidates, start)
        position = np.searchsorted(keys, own)
        for apart in range(-_NEIGHBOURS, _NEIGHBOURS):
            at = np.clip(position + apart, 0, len(keys) - 1)
            together = keys[at] >> _BEYOND_BAND == own >> _BEYOND_BAND
            _verify(near, candidates[together], ordered[at[together]], records, training)
    return near


def _pairs(text: str) -> list[str]:
    return list(map(" ".join, pairwise(_WORDS.findall(text.casefold()))))


def _distinct(records: Signatures) -> "Indices":
    """The first record with each text, in order."""
    first = np.unique(records.texts, return_index=True)[1]
    return np.sort(first[records.judged[first]])


def _keys(records: Signatures, rows: "Indices", start: int) -> "Keys":
    return records.slots[rows, start : start + _KEY].view(">u8").ravel().astype("uint64")


def _sorted(records: Signatures, rows: "Indices", start: int) -> tuple["Keys", "Indices"]:
    keys = _keys(records, rows, start)
    order = keys.argsort(kind="stable")
    return keys[order], rows[order]


def _verify(near: "Indices", rows: "Indices", others: "Indices", records: Signatures, among: Signatures) -> None:
    """Compare the full signatures of candidate pairs and enter near-duplicates in `near`."""
    is_open = near[rows] < 0
    rows, others = rows[is_open], others[is_open]
    for start in range(0, len(rows), _VERIFIED):
        row, other = rows[start : start + _VERIFIED], others[start : start + _VERIFIED]
        same = (records.slots[row] == among.slots[other]).sum(axis=1) >= _LEAST_SAME
        near[row[same]] = other[same]
