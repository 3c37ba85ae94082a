"""Score answers against references: exact match, valid JSON and F1 of list items."""

import json
from collections import Counter
from collections.abc import Sequence

_NOT_JSON = object()


def parse_json(text: str) -> object:
    """The JSON value that the complete text is, or a mark that equals no JSON value."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return _NOT_JSON


def is_json(text: str) -> bool:
    return parse_json(text) is not _NOT_JSON


def is_exact(answer: str, reference: str) -> bool:
    """The same JSON value, or the same text if the reference is not JSON."""
    return _canonical(answer) == _canonical(reference)


def _canonical(text: str) -> str:
    value = parse_json(text)
    return text.strip() if value is _NOT_JSON else json.dumps(value, sort_keys=True)


def _items(text: str) -> Counter[str]:
    """The items of a JSON list; any other text counts as one item."""
    value = parse_json(text)
    if isinstance(value, list):
        return Counter(json.dumps(item, sort_keys=True) for item in value)
    return Counter([_canonical(text)])


def f1(answers: Sequence[str], references: Sequence[str]) -> float:
    """Micro-averaged over list items, which match only as a whole; 1 if nothing was to be found and nothing was."""
    found = [_items(answer) for answer in answers]
    wanted = [_items(reference) for reference in references]
    hits = sum((a & b).total() for a, b in zip(found, wanted, strict=True))
    total = sum(items.total() for items in (*found, *wanted))
    return 2 * hits / total if total else 1.0


def shares(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The three metrics from 0 to 1, by their names in results.json."""
    pairs = list(zip(answers, references, strict=True))
    return {
        "exact": sum(is_exact(answer, reference) for answer, reference in pairs) / len(pairs),
        "json_valid": sum(map(is_json, answers)) / len(pairs),
        "f1": f1(answers, references),
    }
