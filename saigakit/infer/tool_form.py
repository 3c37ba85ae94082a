"""Read from a chat template how it writes calls of functions, hold answers to that form, and read calls in it."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saigakit.core.lazy import llama_cpp
from saigakit.errors import SaigaError
from saigakit.infer.constraint import require_holdable
from saigakit.infer.extraction import render
from saigakit.infer.schema import MARK, Schema, json_rule, literal, native_grammar, native_rules, quote
from saigakit.prompt import encoding

Rules = Callable[[Schema, str], list[str]]  # of the values that fit a schema, for the rule of this name
MAX_CALLS = 8  # in one answer: a bad model repeats a call without end
# The values of probes, whose places in a rendered call are marked.
_VALUES = re.compile(r'(?P<name>zqname)|(?P<arguments>{"zqщ": "zq", "zqk": 1})|(?P<id>zqcall000)')
_NO_VALUE = r"(?:(?!\udcff\[[a-z]).)*"
_CALLS = re.compile(
    rf"(?s)\s*(?P<trigger>{MARK.pattern}|[^\w\s\udcff][^\s\udcff]*|[^\udcff]+)(?P<first>{_NO_VALUE})"
    rf"(?P<call>\udcff\[[a-z]+\].*?\udcff\[[a-z]+\])(?:(?P<again>{_NO_VALUE})(?P=call))?(?P<last>{_NO_VALUE})"
)


@dataclass(frozen=True, kw_only=True)
class ToolForm:
    """What a template writes around the values of calls; a MARK stands for a special token, or a value."""

    head: str  # what begins a text, and is no part of it
    trigger: str  # what begins the calls; no text contains it
    is_after_text: bool  # whether there may be a text before the trigger
    first: str  # between the trigger and the first call
    call: str  # from the first value to the last, each a MARK with its name
    again: str  # between two calls; "" if the template writes one only
    last: str  # after the last call
    keys: Mapping[str, str]  # the keys of "name", "arguments" and perhaps "id" in the JSON object of a call
    thoughts: tuple[str, ...]  # the special tokens around thoughts, which come before the text; the first opens one

    def unmarked(self, names: Mapping[int, str]) -> "ToolForm":
        """The form with the texts of special tokens, for answers in which these are written out."""

        def write(text: str) -> str:
            return MARK.sub(lambda found: names[int(found[1])] if found[1].isdecimal() else found[0], text)

        texts = {name: write(getattr(self, name)) for name in ("head", "trigger", "first", "call", "again", "last")}
        return ToolForm(**{**vars(self), **texts, "thoughts": tuple(map(write, self.thoughts))})

    def token_ids(self) -> set[int]:
        """The special tokens of the form."""
        parts = (self.trigger, self.first, self.call, self.again, self.last, *self.thoughts)
        return {int(found) for found in MARK.findall("".join(parts)) if found.isdecimal()}

    def split(self, answer: str) -> tuple[str, str]:
        """The text of an answer, and its calls."""
        thoughts = "|".join(map(re.escape, self.thoughts)) or "(?!)"
        before = ".*?" if self.is_after_text else rf"(?:.*?(?:{thoughts}))??\s*"
        found = re.match(f"(?:{before})(?={re.escape(self.trigger)})", answer, re.DOTALL)
        end = found.end() if found else len(answer)
        text = answer[:end].removeprefix(self.head)
        if self.thoughts and text.rfind(self.thoughts[0]) > max(map(text.rfind, self.thoughts[1:]), default=-1):
            return "", answer[end:]  # a limit has cut the thought
        return re.split(thoughts, text)[-1].strip(), answer[end:]

    def settled(self, answer: str) -> str:
        """What the text of an answer that goes on begins with in any case."""
        text, calls = self.split(answer)
        if calls:
            return text
        if self.thoughts or self.head.startswith(answer):
            return ""
        ends = (len(answer) - size for size in range(len(self.trigger), 0, -1) if answer.endswith(self.trigger[:size]))
        return self.split(answer[: next(ends, len(answer))])[0]

    def read_calls(self, text: str) -> Iterator[tuple[str, Any, str | None]]:
        """The name, the arguments and perhaps the id of each call. Raises ValueError for another form."""
        text = text.removeprefix((self.trigger + self.first).rpartition("{")[0])
        between = self.again.rpartition("{")[0].partition("}")[2]
        while text.startswith("{"):
            call, end = json.JSONDecoder().raw_decode(text)
            yield call[self.keys["name"]], call[self.keys["arguments"]], call.get(self.keys.get("id"))
            text = text[end:].removeprefix(between)
        if text != self.last.partition("}")[2]:
            raise ValueError(f"it does not end as a call: {text[:60]!r}")


def read_form(llm: "llama_cpp.Llama") -> ToolForm:
    """Cut what is trained at the values of probes. Raises SaigaError for calls that are not JSON objects."""
    plain, mixed, one, two = (_render(llm, *probe) for probe in (("zqtext", 0), ("zqtext", 1), ("", 1), ("", 2)))
    special, head = encoding.load_gguf_tokenizer(llm).special_tokens, plain.partition("zqtext")[0]
    found = _CALLS.fullmatch((two or one).removeprefix(head))
    keys = {kind: key for key, kind in re.findall(r'"(\w+)": ?"?\udcff\[([a-z]+)\]', one)}
    if not found or bool(two) != bool(found["again"]) or not {"name", "arguments"} <= keys.keys():
        raise SaigaError("saigakit does not recognise how the chat template of this GGUF writes function calls.")
    thoughts = [str(special[name]) for name in ("<think>", "</think>") if name in special]
    marks = tuple(f"\udcff[{token}]" for token in dict.fromkeys([*thoughts, *MARK.findall(head)]))
    return ToolForm(
        head=head, is_after_text=found["trigger"] in mixed, keys=keys, thoughts=marks, **found.groupdict("")
    )


def _render(llm: "llama_cpp.Llama", content: str, number: int) -> str:
    """An answer with so many calls, with their values marked; "" if the template refuses it."""
    call = {"name": "zqname", "arguments": {"zqщ": "zq", "zqk": 1}}
    tool = {"name": "zqname", "description": "?", "parameters": {"type": "object", "properties": {}}}
    calls = [{"type": "function", "id": "zqcall000", "function": call}] * number
    message = {"role": "assistant", "content": content, **({"tool_calls": calls} if calls else {})}
    try:
        text = render(llm, [message], [{"type": "function", "function": tool}])
    except SaigaError:
        return ""
    return _VALUES.sub(lambda found: f"\udcff[{found.lastgroup}]", text)


def json_rules(schema: Schema, name: str) -> list[str]:
    """Raises SaigaError for a schema that llguidance cannot hold."""
    require_holdable(f"start: {json_rule(schema)}")
    return [f"{name}: {json_rule(schema)}"]


def make_grammar(
    form: ToolForm,
    schemas: Mapping[str, Schema],
    *,
    must_call: bool = False,
    max_calls: int = MAX_CALLS,
    ends: Iterable[int] = (),
) -> str:
    """Of a text, or of calls that fit the schemas, perhaps after a text, for llguidance; `must_call`: no text.

    `ends`: the tokens that may end an answer, for an engine whose llguidance knows only one of them.
    """
    end = f"{one_of(ends)}?" if ends else ""
    is_token, before = MARK.fullmatch(form.trigger), "ANY" if form.is_after_text and not must_call else "BLANK"
    opening, thoughts = f"{before} {quote(form.trigger)}", ",".join(MARK.findall("".join(form.thoughts)))
    lines = [
        f"start: {f'(TEXT <[{thoughts}]>)*' if thoughts else ''} ({'' if must_call else 'TEXT | '}opening calls) {end}",
        f"opening{'' if is_token else '[lazy]'}: {opening}",
        f"TEXT: ANY{'' if is_token else f' & ~({opening} ANY)'}",
        "ANY: /(.|\\n)*/\nBLANK: /\\s{0,4}/\nID: /[A-Za-z0-9]{9}/",
    ]
    return "\n".join([*lines, *_call_lines(form, schemas, json_rules, max_calls)])


def one_of(tokens: Iterable[int]) -> str:
    return f"<[{','.join(map(str, sorted(tokens)))}]>"


def make_native_grammar(form: ToolForm, schemas: Mapping[str, Schema]) -> str:
    """The same for llama.cpp itself, with a rule for each beginning of the trigger that a text may end with."""
    trigger, is_token = form.trigger, MARK.fullmatch(form.trigger)
    if is_token:
        lines = [f"root: !<[{is_token[1]}]>* (<[{is_token[1]}]> calls)?"]
    else:
        lines = ["root: text0", f"text{len(trigger)}: calls"]
    for size in range(0 if is_token else len(trigger)):
        after = {letter: _overlap(trigger[:size] + letter, trigger) for letter in dict.fromkeys(trigger)}
        known = "".join(f"\\U{ord(letter):08X}" for letter in after)
        choices = [f"{literal(letter)} text{number}" for letter, number in after.items()]
        lines.append(f"text{size}: ([^{known}] text0 | {' | '.join(choices)})?")
    return native_grammar([*lines, "ID: [A-Za-z0-9]{9}", *_call_lines(form, schemas, native_rules, MAX_CALLS)])


def _overlap(text: str, trigger: str) -> int:
    """The length of the longest beginning of `trigger` with which `text` ends."""
    return next(size for size in range(len(text), -1, -1) if text.endswith(trigger[:size]))


def _call_lines(form: ToolForm, schemas: Mapping[str, Schema], rules: Rules, max_calls: int) -> Sequence[str]:
    more = f"({quote(form.again)} call){{0,{max_calls - 1}}}" if form.again and max_calls > 1 else ""
    lines = [
        f"calls: {quote(form.first)} call {more} {quote(form.last)}",
        f"call: {' | '.join(f'call{number}' for number in range(len(schemas)))}",
    ]
    for number, (name, schema) in enumerate(schemas.items()):
        values = {"name": literal(literal(name)[1:-1]), "arguments": f"json{number}", "id": "ID"}
        lines += [f"call{number}: {quote(form.call, **values)}", *rules(schema, f"json{number}")]
    return lines
