"""Guess the JSON schema of a task from its records."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from saigakit.errors import SaigaError
from saigakit.infer.schema import QUOTE, Schema, find_words
from saigakit.prompt.questions import Question

_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}


def guess_schema(examples: Iterable[Question]) -> Schema:
    """The narrowest schema that all reference answers fit, with their order of keys.

    Strings that are literal words of every text are marked as quotations. Raises SaigaError if an answer is not JSON.
    """
    pairs: list[tuple[Any, str]] = []
    for example in examples:
        try:
            pairs.append((json.loads(str(example.answer["content"])), str(example.messages[-1]["content"])))
        except ValueError:
            answer = str(example.answer["content"])[:60]
            raise SaigaError(f"The answer {answer!r} is not JSON, so there is no schema to guess.") from None
    return _guess(pairs)


def _guess(pairs: Sequence[tuple[Any, str]]) -> Schema:
    """`pairs`: values at one place, each with the text that it is an answer to."""
    kinds: dict[str, Schema] = {}
    if objects := [(value, text) for value, text in pairs if isinstance(value, dict)]:
        names = dict.fromkeys(name for value, _ in objects for name in value)
        of_name = {name: [(value[name], text) for value, text in objects if name in value] for name in names}
        properties = {name: _guess(found) for name, found in of_name.items()}
        required = [name for name, found in of_name.items() if len(found) == len(objects)]
        kinds["object"] = {"type": "object", "properties": properties, "required": required}
    if arrays := [(value, text) for value, text in pairs if isinstance(value, list)]:
        items = [(item, text) for value, text in arrays for item in value]
        kinds["array"] = {"type": "array"} | ({"items": _guess(items)} if items else {"maxItems": 0})
    for value, _ in pairs:
        if name := _TYPES.get(type(value)):
            kinds[name] = {"type": name}
    if "number" in kinds:
        kinds.pop("integer", None)
    if "string" in kinds and all(find_words(text, value) >= 0 for value, text in pairs if isinstance(value, str)):
        kinds["string"][QUOTE] = True
    return next(iter(kinds.values())) if len(kinds) == 1 else {"anyOf": list(kinds.values())}
