"""Replace a conversation's texts with placeholders and fill them in again after a template has rendered them."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Filler = Callable[[Sequence[str]], str]
_BLANK = "\u205f"  # a space that Jinja's trim and str.strip remove, JSON leaves alone, and no template contains
_FIRST, _LAST = "\U000f0000", "\U000f0001"
_PLACEHOLDER = re.compile(f"({_BLANK}?){_FIRST}([0-9]+)({_LAST}+)({_BLANK}?)")
_PLAIN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")  # some templates check the length of a call's id
# What templates compare and look up in tools and calls: OpenAI's keys and the keywords of JSON Schema.
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
    """`messages` and `tools` with placeholders, and the `texts` that these replace."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    texts: list[str]
    paths: list[str]  # of each text: "messages[2].content", "tools[0].function.name"

    @property
    def key(self) -> str:
        """Equal for conversations of the same shape, which need only one rendering of the template."""
        return json.dumps([self.messages, self.tools])


def mask(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> Masked:
    """Keep roles, numbers, the keywords of JSON Schema, and ids of calls that are letters and digits."""
    masker = _Masker()
    masked = [masker.mask_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    masked_tools = None if tools is None else [masker.mask_value(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
    return Masked(masked, masked_tools, masker.texts, masker.paths)


class _Masker:
    def __init__(self) -> None:
        self.texts: list[str] = []
        self.paths: list[str] = []

    def mask_message(self, message: Mapping[str, Any], path: str) -> dict[str, Any]:
        masked = {"role": message["role"]}
        for key in ("content", "reasoning_content"):  # texts whatever they are, even a keyword of JSON Schema
            masked |= {key: self.placeholder(message[key], f"{path}.{key}")} if key in message else {}
        return masked | {
            key: self.mask_value(message[key], f"{path}.{key}", key) for key in message if key not in masked
        }

    def mask_value(self, value: object, path: str, key: str = "") -> Any:  # noqa: ANN401  # JSON of any kind
        if isinstance(value, Mapping):
            return {
                self.mask_value(k, f"{path}.{k}"): self.mask_value(item, f"{path}.{k}", k) for k, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.mask_value(item, f"{path}[{index}]") for index, item in enumerate(value)]
        if not isinstance(value, str) or value in _STRUCTURE:
            return value
        return value if key in ("id", "tool_call_id") and _PLAIN_ID.fullmatch(value) else self.placeholder(value, path)

    def placeholder(self, text: str, path: str) -> str:
        if not text:  # templates test whether there is any
            return ""
        self.texts.append(text)
        self.paths.append(path)
        return f"{_BLANK}{_FIRST}{len(self.texts) - 1}{_LAST}{_BLANK}"


def mark_as_json(text: str) -> str:
    """Note in the placeholders that their texts must be escaped once more."""
    return _PLACEHOLDER.sub(lambda found: f"{found[1]}{_FIRST}{found[2]}{found[3]}{_LAST}{found[4]}", text)


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A placeholder after rendering."""

    number: int
    is_stripped_left: bool
    is_stripped_right: bool
    times_escaped: int

    def fill(self, texts: Sequence[str]) -> str:
        text = texts[self.number]
        text = text.lstrip() if self.is_stripped_left else text
        text = text.rstrip() if self.is_stripped_right else text
        for _ in range(self.times_escaped):
            text = json.dumps(text, ensure_ascii=False)[1:-1]
        return text


def make_filler(text: str) -> Filler:
    """Return a function that fills in texts, stripped and escaped as the template did with their placeholders."""
    parts: list[str | _Rendered] = []
    end = 0
    for found in _PLACEHOLDER.finditer(text):
        placeholder = _Rendered(int(found[2]), not found[1], not found[4], len(found[3]) - 1)
        parts += [text[end : found.start()], placeholder]
        end = found.end()
    if not parts:
        return lambda _: text
    parts.append(text[end:])
    return lambda texts: "".join([part if isinstance(part, str) else part.fill(texts) for part in parts])


def find_placeholders(text: str) -> set[int]:
    """The indices of the texts whose placeholders are in `text`."""
    return {int(found[2]) for found in _PLACEHOLDER.finditer(text)}


def last_start(text: str) -> int:
    """Where the last placeholder in `text` begins; the end of `text` if it has none."""
    return max([found.start() for found in _PLACEHOLDER.finditer(text)], default=len(text))
