"""Turn a JSON schema into a grammar, in which the strings marked as quotations are literal words of a text."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from types import GenericAlias
from typing import Any, cast

from saigakit.core.lazy import jsonschema, pydantic
from saigakit.errors import SaigaError, suggestion

Schema = dict[str, Any]
AnySchema = Mapping[str, Any] | type[Any] | GenericAlias
QUOTE = "x-quote"
MARK = re.compile(r"\udcff\[(\w+)\]")  # something else than text, which never contains \udcff
# As Python's json writes them, and so the records of the notebooks.
_ITEM_SEPARATOR, _KEY_SEPARATOR = ", ", ": "
_STYLE = {"whitespace_flexible": False, "item_separator": _ITEM_SEPARATOR, "key_separator": _KEY_SEPARATOR}
_NOTES = {"$schema", "$id", "$defs", "$comment", "title", "description", "default", "examples", "deprecated", QUOTE}
# The keywords that may stand around a quotation; around other values llguidance decides.
_AROUND = {
    "object": {"type", "properties", "required", "additionalProperties"},
    "array": {"type", "items", "minItems", "maxItems"},
    "string": {"type"},
}
_COUNTS, _MOST_REPEATED = ("minItems", "maxItems", "minLength", "maxLength"), 2000  # in llama.cpp's own grammars
_PLAIN = ("boolean", "integer", "number")
# Blanks, also escaped ones, at neither end of a quotation, which is not empty.
_SOLID = r'([^\s\\]|\\(["\\]|u00(0[0-8ef]|1[0-9ab])))'
_INSIDE = r'([^\\]|\\(["\\nrtbf]|u[0-9a-f]{4}))'
_TRIMMED = f"/{_SOLID}({_INSIDE}*{_SOLID})?/"
_WORD = re.compile(r"\w+|\s|[^\w\s]")
# Any JSON value for llama.cpp's own grammars; without a limit a number could go on until the last token.
_NATIVE_VALUES = r'''
value: object | array | string | number | boolean | "null"
object: "{" (string ": " value (", " string ": " value)*)? "}"
array: "[" (value (", " value)*)? "]"
string: "\"" char* "\""
char: [^"\\\x00-\x1F] | "\\" (["\\/bfnrt] | "u00" [0-9a-fA-F]{2})
number: integer ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,3})?
integer: "-"? ("0" | [1-9] [0-9]{0,15})
boolean: "true" | "false"'''


def read_schema(schema: AnySchema, quotes: Sequence[str] = ()) -> Schema:
    """A schema, or that of a pydantic model or any type that pydantic knows; properties in `quotes` are marked.

    Objects without "additionalProperties" get none. Raises SaigaError for a name that no property has.
    """
    try:
        is_given = isinstance(schema, Mapping)
        found: Schema = (
            json.loads(json.dumps(schema)) if is_given else pydantic.TypeAdapter(cast(Any, schema)).json_schema()
        )
        checker = jsonschema.Draft202012Validator
        checker.check_schema(found, format_checker=checker.FORMAT_CHECKER)  # also the regular expressions
    except jsonschema.SchemaError as error:
        raise SaigaError(f"This is not a JSON schema: {error.json_path}: {error.message[:300]}.") from None
    except (TypeError, pydantic.PydanticUserError):
        raise SaigaError(f"{str(schema)[:60]} is neither a JSON schema nor a type that pydantic knows.") from None
    parts = list(subschemas(found))
    for each in parts:
        if "properties" in each and "allOf" not in each:
            each.setdefault("additionalProperties", False)
    properties = [pair for each in parts for pair in each.get("properties", {}).items()]
    for name in quotes:
        if not (marked := [value for each, value in properties if each == name]):
            names = dict(properties)
            known = f"It has {', '.join(names) or 'none'}."
            raise SaigaError(f"quotes: the schema has no property {name!r}.{suggestion(name, names)} {known}")
        if not all(_mark(value, found) for value in marked):
            raise SaigaError(f"quotes: {name!r} is no free string in the schema, so it cannot be a quotation.")
    for each in parts:
        is_around = each.keys() & {"$ref", "anyOf", "items"} or each.get("type") in ("array", "object")
        if each.get(QUOTE) and is_around and not _mark(each, found):
            raise SaigaError(f"{QUOTE} stands where there is no string: {literal(each)[:200]}.")
    return found


def _mark(schema: Any, root: Schema) -> bool:  # noqa: ANN401  # a schema, or a bool
    """Mark the free strings that a value, the items of a list or a choice can be. Whether there are any."""
    if not isinstance(schema, dict):
        return False
    schema.pop(QUOTE, None)
    if "$ref" in schema:
        schema |= json.loads(json.dumps(find_reference(root, schema.pop("$ref"))))
        return "properties" not in schema and _mark(schema, root)
    if parts := [*schema.get("anyOf", ()), *([schema["items"]] if "items" in schema else ())]:
        return sum(_mark(part, root) for part in parts) > 0
    if {"enum", "const", "properties", "oneOf", "allOf"} & schema.keys():
        return False
    kinds = schema.get("type", "string")
    if "string" not in ([kinds] if isinstance(kinds, str) else kinds):
        return False
    schema[QUOTE] = True
    return True


def subschemas(schema: object) -> Iterator[Schema]:
    if isinstance(schema, dict):
        yield schema
        for keyword, value in schema.items():
            if keyword in ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"):
                yield from subschemas(list(value.values()))
            elif keyword not in ("const", "enum", "default", "examples"):
                yield from subschemas(value)
    elif isinstance(schema, list):
        for part in schema:
            yield from subschemas(part)


def find_reference(root: Schema, reference: str) -> Schema:
    """What a `$ref` stands for."""
    found: Any = root
    for part in reference.removeprefix("#").split("/")[1:]:
        found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
    if not re.match(r"#(/|$)", reference) or not isinstance(found, dict):
        raise SaigaError(f"$ref {reference!r} is not in the schema. Only references inside it can be followed.")
    return dict(found)


def make_grammar(schema: Schema, text: str, prefix: str = "") -> str:
    """Of the answers that begin with `prefix`, fit the schema and quote from `text`, for llguidance.

    Raises SaigaError for a keyword that cannot be held where a quotation stands.
    """
    rules = _Rules(schema)
    start = rules.expression(schema, "the schema")
    lines = [f"start: {quote(prefix)} {start}", *rules.lines]
    if rules.has_quotes:
        words = [json.dumps(word, ensure_ascii=False)[1:-1] for word in _WORD.findall(text)]
        lines.append(f"QUOTE: %regex {json.dumps({'substring_chunks': words}, ensure_ascii=False)} & {_TRIMMED}")
    return "\n".join(lines)


def json_rule(schema: Schema) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': _STYLE}, ensure_ascii=False)}"


def native_rules(schema: Schema, name: str) -> list[str]:
    """The rule `name` of the answers that fit, and those that it needs, for `native_grammar`."""
    rules = _NativeRules(schema, name)
    return [f"{name}: {rules.expression(schema, 'the schema')}", *rules.lines]


def native_grammar(lines: Sequence[str]) -> str:
    """In llama.cpp's own notation, GBNF, the rules written as llguidance's."""
    return re.sub(r"^(\w+):", r"\1 ::=", "\n".join([*lines, _NATIVE_VALUES]), flags=re.MULTILINE)


def quote(text: str, **rules: str) -> str:
    """As literals, tokens and rules of a grammar; what a MARK stands for is the id of a token or one of `rules`."""
    parts = enumerate(MARK.split(text))
    return " ".join(rules.get(part, f"<[{part}]>") if i % 2 else literal(part) for i, part in parts if part)


def literal(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


class _Rules:
    """The rules of a grammar, one for each schema that contains a quotation."""

    _around = _AROUND
    _limit = f"where a quotation ({QUOTE}) stands"

    def __init__(self, root: Schema, prefix: str = "") -> None:
        self._root, self._prefix, self.lines = root, prefix, list[str]()
        self._of_reference: dict[str, str] = {}
        self.has_quotes = False

    def expression(self, schema: Schema | bool, where: str) -> str:
        """What a value that fits `schema` looks like."""
        if isinstance(schema, bool):
            schema = {} if schema else {"not": {}}
        if not self._has_quote(schema):
            defs = {"$defs": self._root["$defs"]} if "$defs" in self._root else {}
            return self._rule(json_rule({**defs, **schema}))
        if "$ref" in schema:
            return self._reference(schema["$ref"], where)
        choices = schema.get("anyOf", [])
        if isinstance(schema.get("type"), list):
            choices = [{**schema, "type": each} for each in schema["type"]]
        if choices:
            return f"({' | '.join(self.expression(each, where) for each in choices)})"
        kind = schema.get("type", "object" if "properties" in schema else "array" if "items" in schema else "string")
        if kind == "null":
            return '"null"'
        unknown = set(schema) - _NOTES - self._around.get(kind, {"type"})
        if unknown or kind not in self._around or schema.get("additionalProperties"):
            name = next(iter(sorted(unknown)), "additionalProperties" if kind in self._around else f"type {kind!r}")
            raise SaigaError(f"{where}: {name} cannot be held {self._limit}. Leave it out.")
        return {"object": self._object, "array": self._array}.get(kind, self._string)(schema, where)

    def _has_quote(self, schema: Schema, seen: frozenset[str] = frozenset()) -> bool:
        for each in subschemas({name: value for name, value in schema.items() if name != "$defs"}):
            if each.get(QUOTE):
                return True
            if (name := each.get("$ref")) and name not in seen and self._quotes(name, seen):
                return True
        return False

    def _quotes(self, reference: str, seen: frozenset[str]) -> bool:
        return self._has_quote(find_reference(self._root, reference), seen | {reference})

    def _reference(self, reference: str, where: str) -> str:
        if reference not in self._of_reference:
            # first: it may contain itself
            self._of_reference[reference] = name = f"{self._prefix}ref{len(self._of_reference)}"
            self.lines.append(f"{name}: {self.expression(find_reference(self._root, reference), where)}")
        return self._of_reference[reference]

    def _rule(self, body: str) -> str:
        self.lines.append(f"{self._prefix}rule{len(self.lines)}: {body}")
        return self.lines[-1].partition(":")[0]

    def _string(self, _schema: Schema, _where: str) -> str:
        self.has_quotes = True
        return r'"\"" QUOTE "\""'

    def _array(self, schema: Schema, where: str) -> str:
        low, high = schema.get("minItems", 0), schema.get("maxItems")
        item = self._rule(self.expression(schema.get("items", True), f"{where}, items"))
        if high == 0:
            return '"[]"'
        more = f"({literal(_ITEM_SEPARATOR)} {item}){{{max(low - 1, 0)},{'' if high is None else high - 1}}}"
        return f'"[" ({item} {"" if high == 1 else more}){"" if low else "?"} "]"'

    def _object(self, schema: Schema, where: str) -> str:
        rest_at_first = rest_after_another = '"}"'
        for name, value in reversed(schema["properties"].items()):
            key = literal(literal(name) + _KEY_SEPARATOR)
            pair = f"{key} {self.expression(value, f'{where}, {name}')} {rest_after_another}"
            with_separator = f"{literal(_ITEM_SEPARATOR)} {pair}"
            if name in schema.get("required", ()):
                rest_at_first, rest_after_another = self._rule(pair), self._rule(with_separator)
            else:
                rest_at_first = self._rule(f"{pair} | {rest_at_first}")
                rest_after_another = self._rule(f"{with_separator} | {rest_after_another}")
        return f'"{{" {rest_at_first}'


class _NativeRules(_Rules):
    """The rules of a whole schema for llama.cpp's own grammars, which hold fewer keywords than llguidance."""

    _around = {**_AROUND, "string": {"type", "minLength", "maxLength"}} | {kind: {"type"} for kind in _PLAIN}
    _limit = "with the vocabulary of this model"

    def expression(self, schema: Schema | bool, where: str) -> str:
        if schema is True or (schema and not set(schema) - _NOTES):
            return "value"
        if schema and any(schema.get(name, 0) > _MOST_REPEATED for name in _COUNTS):
            raise SaigaError(f"{where}: {', '.join(_COUNTS)} can be {_MOST_REPEATED} at most {self._limit}.")
        if schema and (values := schema.get("enum", [schema["const"]] if "const" in schema else [])):
            return f"({' | '.join(literal(literal(value)) for value in values)})"
        return super().expression(schema, where)

    def _has_quote(self, schema: Schema, seen: frozenset[str] = frozenset()) -> bool:
        return True  # nothing is left to llguidance

    def _object(self, schema: Schema, where: str) -> str:
        is_any = "properties" not in schema and schema.get("additionalProperties", True)
        return "object" if is_any else super()._object({"properties": {}, **schema}, where)

    def _string(self, schema: Schema, _where: str) -> str:
        low, high = schema.get("minLength", 0), schema.get("maxLength", "")
        return rf'"\"" char{{{low},{high}}} "\""' if schema.get("type", "string") == "string" else schema["type"]


def find_quotes(schema: Schema, value: object, text: str) -> list[dict[str, Any]]:
    """Where the quotations of a value stand in the text: JSON pointer, first character and the one after the last.

    A string that is not in the text, because a choice allows it, is none.
    """
    found: list[dict[str, Any]] = []
    latest: dict[str, int] = {}  # a second quotation of the same words stands later, if they are there again
    for path, words in dict(_marked(schema, schema, value, "")).items():
        before = latest.get(words, -1)
        latest[words] = start = max(before, find_words(text, words, before + 1))
        if start >= 0:
            found.append({"path": path, "start": start, "end": start + len(words)})
    return found


def find_words(text: str, words: str, start: int = 0) -> int:
    """Where `words` stand from `start` on as whole words; -1 if they do not, or are blank at an end."""
    if words != words.strip() or not words:
        return -1
    while (start := text.find(words, start)) >= 0 and not (_is_cut(text, start) and _is_cut(text, start + len(words))):
        start += 1
    return start


def _is_cut(text: str, position: int) -> bool:
    """Whether no word of _WORD goes on over this position."""
    return not re.fullmatch(r"\w\w", text[max(position - 1, 0) : position + 1])


def _marked(root: Schema, schema: object, value: object, path: str) -> Iterator[tuple[str, str]]:
    """Path and text of each quotation in a value that fits the schema."""
    if not isinstance(schema, dict):
        return
    if "$ref" in schema:
        yield from _marked(root, find_reference(root, schema["$ref"]), value, path)
    for choice in schema.get("anyOf", ()):
        yield from _marked(root, choice, value, path)
    if isinstance(value, str) and schema.get(QUOTE):
        yield path, value
    elif isinstance(value, list) and "items" in schema:
        for index, item in enumerate(value):
            yield from _marked(root, schema["items"], item, f"{path}/{index}")
    elif isinstance(value, dict):
        for name, part in value.items():
            escaped = name.replace("~", "~0").replace("/", "~1")
            yield from _marked(root, schema.get("properties", {}).get(name, {}), part, f"{path}/{escaped}")
