"""Answers and references into shares: exact, valid JSON, F1. No model is needed, and nothing is forgiven."""

import json
from collections import Counter
from collections.abc import Sequence

_NOT_JSON = object()


def parse(text: str) -> object:
    """The JSON value that the whole text is, or a mark that is no JSON value."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return _NOT_JSON


def is_json(text: str) -> bool:
    return parse(text) is not _NOT_JSON


def is_exact(answer: str, reference: str) -> bool:
    """The same JSON value; the same text where the reference is not JSON."""
    return _canonical(answer) == _canonical(reference)


def _canonical(text: str) -> str:
    value = parse(text)
    return text.strip() if value is _NOT_JSON else json.dumps(value, sort_keys=True)


def _items(text: str) -> Counter[str]:
    """The items of a JSON list, or the one thing that the text is; what cannot be read is one wrong item."""
    value = parse(text)
    if value is _NOT_JSON:
        return Counter([text.strip()])
    return Counter(json.dumps(item, sort_keys=True) for item in (value if isinstance(value, list) else [value]))


def f1(answers: Sequence[str], references: Sequence[str]) -> float:
    """Over all items of all lists together (micro); 1 where there is nothing to find and nothing was found.

    An item counts when it is equal as a whole: a right term with a wrong definition is wrong.
    """
    found = [_items(answer) for answer in answers]
    wanted = [_items(reference) for reference in references]
    hits = sum((a & b).total() for a, b in zip(found, wanted, strict=True))
    total = sum(items.total() for items in (*found, *wanted))
    return 2 * hits / total if total else 1.0


def shares(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """From 0 to 1, in the names of results.json."""
    pairs = list(zip(answers, references, strict=True))
    return {
        "exact": sum(is_exact(answer, reference) for answer, reference in pairs) / len(pairs),
        "json_valid": sum(map(is_json, answers)) / len(pairs),
        "f1": f1(answers, references),
    }
