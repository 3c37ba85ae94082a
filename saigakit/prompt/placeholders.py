"""A conversation's words into placeholders and back, so that a template's own text can be told from a user's."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

Filler = Callable[[Sequence[str]], str]
_BLANK = "\u205f"  # a space that Jinja's trim and str.strip take away, JSON leaves alone, and no template spells
_FIRST, _LAST = "\U000f0000", "\U000f0001"
_HOLDER = re.compile(f"({_BLANK}?){_FIRST}([0-9]+)({_LAST}+)({_BLANK}?)")
_PLAIN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")  # some templates ask how long the id of a call is
# What templates compare and look up in tools and calls: OpenAI's keys and the words of JSON Schema.
_WORDS = """
    type function name description parameters arguments id index strict return returns
    object array string number integer boolean null properties required items enum const default format title
    nullable examples additionalProperties patternProperties propertyNames prefixItems minItems maxItems uniqueItems
    contains minimum maximum exclusiveMinimum exclusiveMaximum multipleOf minLength maxLength pattern anyOf oneOf
    allOf not if then else $ref $defs $schema definitions
"""
_STRUCTURE = frozenset(_WORDS.split())


@dataclass(frozen=True)
class Masked:
    """`messages` and `tools` with a placeholder for each text of the user; `texts` are what they stand for."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    texts: list[str]
    paths: list[str]  # of each text: "messages[2].content", "tools[0].function.name"

    @property
    def key(self) -> str:
        """Equal for conversations of one shape, which one rendering of a template serves."""
        return json.dumps([self.messages, self.tools])


def mask(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> Masked:
    """The roles stay; so do numbers, the words of JSON Schema, and ids of calls that are letters and digits."""
    taken = _Taken()
    made = [taken.message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    described = None if tools is None else [taken.out_of(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
    return Masked(made, described, taken.texts, taken.paths)


class _Taken:
    """The texts that have been exchanged for placeholders so far."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.paths: list[str] = []

    def message(self, message: Mapping[str, Any], path: str) -> dict[str, Any]:
        made = {"role": message["role"], "content": self.holder(message["content"], f"{path}.content")}
        return made | {key: self.out_of(message[key], f"{path}.{key}", key) for key in message if key not in made}

    def out_of(self, value: object, path: str, key: str = "") -> Any:  # noqa: ANN401  # JSON of any kind
        if isinstance(value, Mapping):
            return {self.out_of(k, f"{path}.{k}"): self.out_of(item, f"{path}.{k}", k) for k, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.out_of(item, f"{path}[{index}]") for index, item in enumerate(value)]
        if not isinstance(value, str) or value in _STRUCTURE:
            return value
        return value if key in ("id", "tool_call_id") and _PLAIN_ID.fullmatch(value) else self.holder(value, path)

    def holder(self, text: str, path: str) -> str:
        if not text:  # templates ask whether there is any
            return ""
        self.texts.append(text)
        self.paths.append(path)
        return f"{_BLANK}{_FIRST}{len(self.texts) - 1}{_LAST}{_BLANK}"


def quoted(text: str) -> str:
    """JSON that holds placeholders: what they stand for must be escaped once more."""
    return _HOLDER.sub(lambda found: f"{found[1]}{_FIRST}{found[2]}{found[3]}{_LAST}{found[4]}", text)


@dataclass(frozen=True, slots=True)
class _Held:
    """A placeholder as a template left it."""

    number: int
    is_stripped_left: bool
    is_stripped_right: bool
    times_quoted: int

    @classmethod
    def of(cls, found: re.Match[str]) -> Self:
        return cls(int(found[2]), not found[1], not found[4], len(found[3]) - 1)

    def original(self, texts: Sequence[str]) -> str:
        made = texts[self.number]
        made = made.lstrip() if self.is_stripped_left else made
        made = made.rstrip() if self.is_stripped_right else made
        for _ in range(self.times_quoted):
            made = json.dumps(made, ensure_ascii=False)[1:-1]
        return made


def filler(text: str) -> Filler:
    """What puts texts in the place of their placeholders: stripped on a side where the template stripped the
    placeholder, and escaped as often as it was written as JSON."""
    parts: list[str | _Held] = []
    end = 0
    for found in _HOLDER.finditer(text):
        parts += [text[end : found.start()], _Held.of(found)]
        end = found.end()
    if not parts:
        return lambda _: text
    parts.append(text[end:])
    return lambda texts: "".join([part if isinstance(part, str) else part.original(texts) for part in parts])


def held(text: str) -> set[int]:
    """The numbers of the texts whose placeholders are in `text`."""
    return {int(found[2]) for found in _HOLDER.finditer(text)}
