"""Make the demo's records from a Russian WordNet: short texts, and the terms they define as JSON."""

import json
import random
import re
import sqlite3
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from saigakit.core.files import write_text
from saigakit.demo import packages
from saigakit.errors import SaigaError

Pair = tuple[str, str]  # term, definition
Record = dict[str, list[dict[str, str]]]

_WORD = r"[а-яё]+(?:-[а-яё]+)*"
_DEFINITION = re.compile(rf"{_WORD}(?:,? {_WORD})*")
_LABELS = re.compile(r"(?:\{\{[^{}]*\}\}[ ,;-]*(?:(?:и|или|также)\b[ ,]*)?)+")
# The dictionary's labels of coarse words and slang.
_COARSE_LABEL = re.compile(
    r"\{\{(?:помета\|)?[^{}|]*\b(?:вульг|обсц|мат\b|груб|бран|презр|пренебр|эвф|табу|унич|секс|крим|угол"
    r"|жарг|сленг|мол\.|студ|школьн|сниж|прост|фам\b)"
)
# Definitions that begin as a remark, refer to another sense or to grammar, or are cut off.
_REMARK = re.compile(
    r"(?:и|а|или|но|то есть|о|об|обо|также|чаще|обычно|см|это)\b"
    r"|.*\b(?:эт[аиоу]\w*|так(?:ого|ому|им|ими|их|ой|ая|ую|ие)(?!,)|глагол\w*|гл|ср)\b|.*-л\b"
)

DEFINED = (0,) * 5 + (1,) * 9 + (2,) * 6  # terms defined in each of twenty texts
FIRST = ("весы", "биология")  # terms of the first text in train.jsonl and held_out.jsonl, which readers see first
INSTRUCTION = 'Определения в JSON: [{"term": "…", "definition": "…"}] или []'


class Style(NamedTuple):
    """The sentences of a text, with and without a definition."""

    phrasings: list[str]
    fillers: list[str]


_TEXTS = Path(__file__).with_name("wordnet_texts.toml")
_texts = tomllib.loads(_TEXTS.read_text(encoding="utf-8"))
SEEN, UNSEEN = Style(**_texts["seen"]), Style(**_texts["unseen"])
_COARSE = _texts["coarse"]
_COARSE_STEM = re.compile(rf"\b(?:{'|'.join(_COARSE['at_the_beginning'])})|{_COARSE['after_any_prefix']}")


def packaged_records() -> Path:
    """The directory of the demo's train.jsonl and held_out.jsonl, made once per version of this module."""
    return packages.packaged_records(write_records, Path(__file__), _TEXTS, Path(packages.__file__))


def write_records(directory: Path, *, train: int = 640, held_out: int = 200, seed: int = 7) -> tuple[Path, Path]:
    """Write train.jsonl and held_out.jsonl without duplicates; no term of an evaluation text occurs in training.

    Half of the evaluation texts consist of phrasings and fillers that training never shows. The first text of each file
    is a single plain definition.
    """
    print("Making the demo's records from the WordNet …", flush=True)
    for_train, for_test = (_endless(pairs) for pairs in _split(definitions(), seed))
    rng = random.Random(seed + 1)
    texts: set[str] = set()
    rows = [_definition(for_train, texts), *_records(for_train, SEEN, train - 1, rng, texts)]
    tests = [_definition(for_test, texts), *_records(for_test, SEEN, held_out - held_out // 2 - 1, rng, texts)]
    tests += _records(for_test, UNSEEN, held_out // 2, rng, texts)
    directory.mkdir(parents=True, exist_ok=True)
    return (
        write_text(directory / "train.jsonl", _jsonl(rows)),
        write_text(directory / "held_out.jsonl", _jsonl(tests)),
    )


def _split(pairs: Sequence[Pair], seed: int) -> tuple[list[Pair], list[Pair]]:
    """Split off a quarter for the evaluation, with terms that no definition and no sentence contains.

    Both parts are in random order after the terms of FIRST.
    """
    written = chain((definition for _, definition in pairs), *SEEN)
    words = set(re.findall(r"[а-яё]+", " ".join(written).lower()))
    shuffled = random.Random(seed).sample(pairs, len(pairs))
    shuffled.sort(key=lambda pair: pair[0] not in FIRST)
    apart = [pair for pair in shuffled if pair[0] not in words][: len(pairs) // 4]
    held_out = set(apart)
    return [pair for pair in shuffled if pair not in held_out], apart


def _endless(pairs: Sequence[Pair]) -> Iterator[Pair]:
    yield from pairs
    raise SaigaError(f"{len(pairs)} definitions are not enough for so many records: ask for fewer.")


def _definition(pairs: Iterator[Pair], texts: set[str]) -> Record:
    """A record of one definition in the plainest phrasing; its text is added to `texts`."""
    term, definition = next(pairs)
    text = SEEN.phrasings[0].format(T=term.capitalize(), d=definition)
    texts.add(text)
    return _conversation(text, [{"term": term.capitalize(), "definition": definition}])


def _records(pairs: Iterator[Pair], style: Style, count: int, rng: random.Random, texts: set[str]) -> list[Record]:
    """`count` records whose texts are not in `texts`; they are added to it."""
    kinds = [DEFINED[index % len(DEFINED)] for index in range(count)]
    rng.shuffle(kinds)
    found: list[Record] = []
    for defined in kinds:
        text, items = _text(pairs, style, defined, rng)
        while text in texts:
            text, items = _text(pairs, style, defined, rng)
        texts.add(text)
        found.append(_conversation(text, items))
    return found


def _text(pairs: Iterator[Pair], style: Style, defined: int, rng: random.Random) -> tuple[str, list[dict[str, str]]]:
    """A text that defines `defined` terms, and the items in the order of the text."""
    fillers = rng.randint(0, 1) if defined else rng.randint(2, 3)
    patterns = rng.choices(style.phrasings, k=defined) + rng.sample(style.fillers, fillers)
    rng.shuffle(patterns)
    sentences, items = [], []
    for pattern in patterns:
        term, definition = next(pairs) if "{" in pattern else ("", "")
        sentences.append(pattern.format(T=term.capitalize(), t=term, d=definition))
        if "{d}" in pattern:
            items.append({"term": term.capitalize() if "{T}" in pattern else term, "definition": definition})
    return " ".join(sentences), items


def _conversation(text: str, items: list[dict[str, str]]) -> Record:
    roles = {"system": INSTRUCTION, "user": text, "assistant": json.dumps(items, ensure_ascii=False)}
    return {"messages": [{"role": role, "content": content} for role, content in roles.items()]}


def _jsonl(rows: Sequence[Record]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def definitions() -> list[Pair]:
    """(term, definition) with 3-6 words and at most 30 characters, both unique, in the order of the WordNet."""
    file = packages.package_file(packages.WORDNET)
    with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as database:
        rows = database.execute("SELECT lemma, definition FROM synsets ORDER BY synset_id").fetchall()
    coarse = {lemma for lemma, text in rows if _is_coarse(lemma, text)}
    pairs: dict[str, str] = {}
    taken: set[str] = set()
    for lemma, text in rows:
        definition = _plain(text)
        if lemma not in pairs and lemma not in coarse and definition not in taken and _is_clean(lemma, definition):
            pairs[lemma] = definition
            taken.add(definition)
    return list(pairs.items())


def _is_coarse(lemma: str, text: str) -> bool:
    """By a label or a stem in any sense; examples, which are quoted from books, do not count."""
    senses = re.sub(r"\{\{(?:пример|семантика)[^~]*|\u0301", "", text)
    return any(found.search(f"{lemma} {senses.lower()}") for found in (_COARSE_LABEL, _COARSE_STEM))


def _plain(text: str) -> str:
    """The first sense up to its first semicolon, without labels and wiki markup."""
    parts = text.split("#", 1)[0].split("~ru~")
    sense = re.split(r"\{\{(?:пример|семантика)|~", parts[2], maxsplit=1)[0] if len(parts) > 2 else ""
    sense = _LABELS.sub("", sense.strip(), count=1) if sense.lstrip().startswith("{{") else sense
    sense = re.sub(r"\[\[(?:[^\]|]*\|)?([^\]|]*)\]\]", r"\1", sense)
    sense = re.sub(r"'{2,}|<[^>]*>|\u0301", "", sense)
    return re.sub(r"\s+", " ", sense).strip(" ,.;").split(";")[0].strip(" ,.")


def _is_clean(term: str, definition: str) -> bool:
    return (
        re.fullmatch(r"[а-яё]{4,14}", term) is not None
        and _DEFINITION.fullmatch(definition) is not None
        and 3 <= len(definition.split()) <= 6
        and len(definition) <= 30
        and term[:-1] not in definition
        and _REMARK.match(definition) is None
    )
