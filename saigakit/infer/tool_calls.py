"""Answer with text or with calls of functions, whose arguments fit their JSON schemas, and run Python functions."""

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any, cast, get_type_hints

from saigakit.core.lazy import llama_cpp, pydantic
from saigakit.data.tool_calls import Tool, read_tools, to_json, value_problems
from saigakit.errors import DataError, SaigaError, masked
from saigakit.infer import engine, sequences
from saigakit.infer.constraint import Constraint
from saigakit.infer.extraction import render, validator, write
from saigakit.infer.schema import MARK, Schema, json_rule, literal, quote, read_schema
from saigakit.prompt import encoding
from saigakit.prompt.template import Message, Tools
from saigakit.registry import Sampling

_VALUES = re.compile(r'(?P<name>zqname)|(?P<arguments>{"zqщ": "zq", "zqk": 1})|(?P<id>zqcall000)')
_NO_VALUE = r"(?:(?!\udcff\[[a-z]).)*"
_CALLS = re.compile(
    rf"(?s)\s*(?P<trigger>{MARK.pattern}|[^\w\s\udcff][^\s\udcff]*|[^\udcff]+)(?P<first>{_NO_VALUE})"
    rf"(?P<call>\udcff\[[a-z]+\].*?\udcff\[[a-z]+\])(?:(?P<again>{_NO_VALUE})(?P=call))?(?P<last>{_NO_VALUE})"
)


def answer(
    llm: "llama_cpp.Llama", messages: Sequence[Message], tools: Tools, *, max_new_tokens: int | None = None
) -> dict[str, Any]:
    """The most likely answer, in OpenAI's format: a text or, as soon as it begins a call, calls that fit `tools`.

    Arguments come in the order of the schema; thoughts are left out. Raises SaigaError for a schema that cannot be
    held, a chat template whose calls cannot be recognised, and a call without an end.
    """
    if not tools:
        pieces = engine.stream(llm, messages, sampling=Sampling(temperature=0.0), max_new_tokens=max_new_tokens)
        return {"role": "assistant", "content": "".join(pieces)}
    (tools, schemas), tokenizer = _read_tools(llm, tools), encoding.load_gguf_tokenizer(llm)
    prompt = encoding.encode(messages, tokenizer, tools=tools, add_generation_prompt=True)["input_ids"]
    room, form = engine.require_room(llm, prompt), _read_form(llm)
    constraint = Constraint(llm, _make_grammar(form, schemas))
    ids = sequences.answer(llm, prompt, constraint, max_new_tokens=min(room, max_new_tokens or room))
    constraint.require_no_error()
    text, rest = _split(form, write(llm, [token for token in ids if token not in engine.stop_ids(llm)]))
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if rest and not constraint.is_complete:
        raise SaigaError(f"The call has no end after {len(ids)} tokens. Give a larger max_new_tokens, or n_ctx.")
    taken = {call.get("id") for message in messages for call in message.get("tool_calls") or ()}
    for name, arguments, key in _read_calls(form, rest):
        problems = [problem.message for problem in validator(schemas[name]).iter_errors(arguments)]
        if problems := problems or value_problems(name, arguments):
            raise SaigaError(f"The arguments of {name!r} do not fit its schema: {problems[0]}.")
        if key is None or key in taken:
            key = next(made for number in count(1) if (made := f"call{number:05}") not in taken)
        taken.add(key)
        function = {"name": name, "arguments": to_json(arguments)}
        message.setdefault("tool_calls", []).append({"id": key, "type": "function", "function": function})
    return message


def _read_tools(llm: "llama_cpp.Llama", given: Tools) -> tuple[Tools, dict[str, Schema]]:
    problems: list[str] = []
    schemas: dict[str, Schema] = {}
    tools = read_tools({"tools": list(given)}, problems)
    for function in [tool["function"] for tool in tools]:
        name, parameters = function["name"], function.get("parameters", {})
        schemas[name] = read_schema({"properties": {}, **parameters, "type": "object"})
        try:
            Constraint(llm, f"start: {json_rule(schemas[name])}")
        except SaigaError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise DataError("The model cannot call these functions.", problems)
    return tools, schemas


def _read_form(llm: "llama_cpp.Llama") -> dict[str, str]:
    """Cut what is trained at the values of probes: "head" begins texts, "trigger" calls, "lead" may be before these."""
    plain, mixed, one, two = (_render(llm, *probe) for probe in (("zqtext", 0), ("zqtext", 1), ("", 1), ("", 2)))
    special, head = encoding.load_gguf_tokenizer(llm).special_tokens, plain.partition("zqtext")[0]
    found = _CALLS.fullmatch((two or one).removeprefix(head))
    keys = {f"{kind} key": key for key, kind in re.findall(r'"(\w+)": ?"?\udcff\[([a-z]+)\]', one)}
    if not found or bool(two) != bool(found["again"]) or not {"name key", "arguments key"} <= keys.keys():
        raise SaigaError("saigakit does not recognise how the chat template of this GGUF writes function calls.")
    thoughts = {*MARK.findall(head), *[str(special[name]) for name in ("<think>", "</think>") if name in special]}
    form = {"head": head, "lead": "ANY" if found["trigger"] in mixed else "BLANK", **keys, **found.groupdict("")}
    return {**form, "thoughts": f"(TEXT <[{','.join(sorted(thoughts))}]>)*" if thoughts else ""}


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


def _make_grammar(form: dict[str, str], schemas: Mapping[str, Schema]) -> str:
    """Of a text, or of calls that fit the schemas, perhaps after a text."""
    opening, is_token = f"{form['lead']} {quote(form['trigger'])}", MARK.fullmatch(form["trigger"])
    more = f"({quote(form['again'])} call)*" if form["again"] else ""
    lines = [
        f"start: {form['thoughts']} (TEXT | opening {quote(form['first'])} call {more} {quote(form['last'])})",
        f"opening{'' if is_token else '[lazy]'}: {opening}",
        f"TEXT: ANY{'' if is_token else f' & ~({opening} ANY)'}",
        "ANY: /(.|\\n)*/\nBLANK: /\\s*/\nID: /[A-Za-z0-9]{9}/",
        f"call: {' | '.join(f'call{number}' for number in range(len(schemas)))}",
    ]
    for number, (name, schema) in enumerate(schemas.items()):
        values = {"name": literal(literal(name)[1:-1]), "arguments": f"json{number}", "id": "ID"}
        lines += [f"call{number}: {quote(form['call'], **values)}", f"json{number}: {json_rule(schema)}"]
    return "\n".join(lines)


def _split(form: dict[str, str], answer: str) -> tuple[str, str]:
    """The text of an answer, and its calls."""
    lead = ".*?" if form["lead"] == "ANY" else rf"(?:.*?{MARK.pattern})??\s*"
    found = re.match(f"(?:{lead})(?={re.escape(form['trigger'])})", answer, re.DOTALL)
    end = found.end() if found else len(answer)
    text = MARK.split(answer[:end].removeprefix(form["head"]))[-1].strip()
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace"), answer[end:]  # a limit cuts characters


def _read_calls(form: dict[str, str], text: str) -> Iterator[tuple[str, Any, str | None]]:
    """The name, the arguments and perhaps the id of each call."""
    text = text.removeprefix((form["trigger"] + form["first"]).rpartition("{")[0])
    while text.startswith("{"):
        call, end = json.JSONDecoder().raw_decode(text)
        yield call[form["name key"]], call[form["arguments key"]], call.get(form.get("id key"))
        text = text[end:].removeprefix(form["again"].rpartition("{")[0].partition("}")[2])


def run_tools(
    llm: "llama_cpp.Llama", messages: Sequence[Message], functions: Sequence[Callable[..., Any]], *, max_rounds: int = 5
) -> list[Message]:
    """The conversation with the calls that the model makes of `functions`, their results or exceptions, and its answer.

    Raises SaigaError for a parameter without a type that pydantic knows, and if the model calls after `max_rounds`.
    """
    tools = [_describe(function) for function in functions]
    by_name = {function.__name__: pydantic.validate_call(function) for function in functions}
    conversation, called = list(messages), list[str]()
    for number in range(max_rounds + 1):
        conversation.append(answer(llm, conversation, tools))
        if "tool_calls" not in conversation[-1]:
            return conversation
        for call in conversation[-1]["tool_calls"] if number < max_rounds else ():
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            called.append(f"{name}({arguments})")
            try:
                content = to_json(by_name[name](**json.loads(arguments))).encode().decode()  # refuses half characters
            except Exception as error:  # the model reads it
                content = to_json({"error": masked(f"{type(error).__name__}: {error}")})
            conversation.append({"role": "tool", "tool_call_id": call["id"], "name": name, "content": content})
    raise SaigaError(f"The model still calls functions after {max_rounds} rounds: {', '.join(called)[:2000]}.")


def _describe(function: Callable[..., Any]) -> Tool:
    name, text, hints = function.__name__, inspect.getdoc(function) or "", get_type_hints(function)
    for key, parameter in inspect.signature(function).parameters.items():
        try:
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise LookupError(key)
            pydantic.TypeAdapter(hints[key]).json_schema()
        except (LookupError, pydantic.PydanticUserError):
            raise SaigaError(f"{name}: the type of the parameter `{parameter}` is missing or not supported.") from None
    parameters = pydantic.TypeAdapter[Any](cast(Any, function)).json_schema()
    for key, schema in parameters["properties"].items():
        schema.pop("title", None)
        note = re.search(rf"^\s*{key}\s*:\s+(.+)$", text, re.MULTILINE)
        schema |= {"description": note[1]} if note else {}
    description = re.split(r"\n\s*\n", text)[0]
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}
