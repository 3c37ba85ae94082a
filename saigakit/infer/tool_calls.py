"""Answer with text or with calls of functions, whose arguments fit their JSON schemas, and run Python functions."""

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any, Literal, cast, get_type_hints

from saigakit.core.lazy import llama_cpp, pydantic
from saigakit.data.tool_calls import Tool, read_tools, to_json, value_problems
from saigakit.errors import DataError, SaigaError, masked
from saigakit.infer import engine, sequences
from saigakit.infer.constraint import Constraint
from saigakit.infer.extraction import validator, write
from saigakit.infer.schema import Schema, read_schema
from saigakit.infer.tool_form import MAX_CALLS, Rules, ToolForm, json_rules, make_grammar, read_form
from saigakit.prompt import encoding
from saigakit.prompt.template import Message, Tools
from saigakit.registry import Sampling


def answer(
    llm: "llama_cpp.Llama",
    messages: Sequence[Message],
    tools: Tools,
    *,
    tool_choice: Literal["auto", "required"] = "auto",
    max_calls: int = MAX_CALLS,
    max_new_tokens: int | None = None,
) -> dict[str, Any]:
    """The most likely answer, in OpenAI's format: a text or, as soon as it begins a call, calls that fit `tools`.

    With `tool_choice="required"` it has a call. Arguments come in the order of the schema; thoughts are left out.
    Raises SaigaError for a schema that cannot be held, a chat template whose calls cannot be recognised, and a call
    without an end.
    """
    if not tools:
        pieces = engine.stream(llm, messages, sampling=Sampling(temperature=0.0), max_new_tokens=max_new_tokens)
        return {"role": "assistant", "content": "".join(pieces)}
    (tools, schemas), tokenizer = read_schemas(tools, json_rules), encoding.load_gguf_tokenizer(llm)
    prompt = encoding.encode(messages, tokenizer, tools=tools, add_generation_prompt=True)["input_ids"]
    room, form = engine.require_room(llm, prompt), read_form(llm)
    constraint = Constraint(llm, make_grammar(form, schemas, must_call=tool_choice == "required", max_calls=max_calls))
    ids = sequences.answer(llm, prompt, constraint, max_new_tokens=min(room, max_new_tokens or room))
    constraint.require_no_error()
    written = write(llm, [token for token in ids if token not in engine.stop_ids(llm)])
    if not constraint.is_complete and (tool_choice == "required" or form.split(written)[1]):
        raise SaigaError(f"The call has no end after {len(ids)} tokens. Give a larger max_new_tokens, or n_ctx.")
    return read_answer(form, written, schemas, messages)


def read_schemas(given: Tools, rules: Rules) -> tuple[Tools, dict[str, Schema]]:
    """The tools in OpenAI's format, and the schema of the arguments of each function, as `rules` can hold them."""
    problems: list[str] = []
    schemas: dict[str, Schema] = {}
    tools = read_tools({"tools": list(given)}, problems)
    for function in [tool["function"] for tool in tools]:
        name, parameters = function["name"], function.get("parameters", {})
        try:
            schemas[name] = read_schema({"properties": {}, **parameters, "type": "object"})
            rules(schemas[name], "")
        except SaigaError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise DataError("The model cannot call these functions.", problems)
    return tools, schemas


def read_answer(
    form: ToolForm, written: str, schemas: Mapping[str, Schema], messages: Sequence[Message]
) -> dict[str, Any]:
    """The message, with ids that no call in `messages` has. Raises SaigaError for a call that does not fit."""
    text, rest = form.split(written)
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # a limit cuts characters
    answer: dict[str, Any] = {"role": "assistant", "content": text}
    taken = {call.get("id") for message in messages for call in message.get("tool_calls") or ()}
    try:
        for name, arguments, key in form.read_calls(rest) if rest else ():
            problems = [problem.message for problem in validator(schemas[name]).iter_errors(arguments)]
            if problems := problems or value_problems(name, arguments):
                raise SaigaError(f"The arguments of {name!r} do not fit its schema: {problems[0]}.")
            if key is None or key in taken:
                key = next(made for number in count(1) if (made := f"call{number:05}") not in taken)
            taken.add(key)
            function = {"name": name, "arguments": to_json(arguments)}
            answer.setdefault("tool_calls", []).append({"id": key, "type": "function", "function": function})
    except (ValueError, LookupError, RecursionError) as error:
        raise SaigaError(f"The call cannot be read ({error}): {rest[:60]!r}.") from None
    return answer


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
                written = f"{type(error).__name__}: {error}".encode("utf-8", "replace").decode("utf-8")
                content = to_json({"error": masked(written)})
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
        note = re.search(rf"^\s*(?::param )?{key}\s*(?:\(.*?\))?\s*:\s+(.+)$", text, re.MULTILINE)
        schema |= {"description": note[1]} if note else {}
    description = re.split(r"\n\s*\n", text)[0]
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}
