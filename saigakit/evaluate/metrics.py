"""Score answers against references: exact match, valid JSON, F1 of list items, function calls and restraint."""

import json
from collections import Counter
from collections.abc import Sequence
from itertools import takewhile

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


def shares(answers: Sequence[str], references: Sequence[str], is_call: Sequence[bool] = ()) -> dict[str, float]:
    """The metrics from 0 to 1, by their names in results.json.

    `is_call`: whether a reference is a call of functions; if any is, these metrics are of calls instead of JSON.
    """
    pairs = list(zip(answers, references, strict=True))
    exact = [is_exact(answer, reference) for answer, reference in pairs]
    if not any(is_call):
        json_valid = sum(map(is_json, answers)) / len(pairs)
        return {"exact": sum(exact) / len(pairs), "json_valid": json_valid, "f1": f1(answers, references)}
    mark = _beginning_of_calls([reference for reference, due in zip(references, is_call, strict=True) if due])
    called = [equal for equal, due in zip(exact, is_call, strict=True) if due]
    silent = [mark not in answer for answer, due in zip(answers, is_call, strict=True) if not due]
    restraint = {"restraint": sum(silent) / len(silent)} if silent else {}
    return {"exact": sum(exact) / len(pairs), "calls": sum(called) / len(called), **restraint}


def _beginning_of_calls(references: Sequence[str]) -> str:
    """What all calls begin with, up to the name of the function, such as "<tool_call>\n{"."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(min(references), max(references), strict=False))
    return "".join(letter for letter, _ in same).partition('"')[0] or "{"
