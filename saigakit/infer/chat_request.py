"""Read a request of OpenAI's chat completions: the exact prompt, and the settings of llama.cpp's server."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib import resources
from typing import Any, NamedTuple

from saigakit.core.lazy import jsonschema, llama_cpp
from saigakit.data.records import BadRecord
from saigakit.data.schema import normalise_record
from saigakit.errors import SaigaError
from saigakit.infer import engine
from saigakit.infer.extraction import validator
from saigakit.infer.schema import QUOTE, Schema, native_grammar, native_rules, read_schema, subschemas
from saigakit.infer.tool_calls import read_answer, read_schemas
from saigakit.infer.tool_form import ToolForm, json_rules, make_grammar, make_native_grammar, one_of, read_form
from saigakit.prompt import encoding
from saigakit.prompt.backends import has_prefix_space
from saigakit.prompt.template import Message
from saigakit.registry import Sampling

_REQUEST: Schema = json.loads(resources.files("saigakit.infer").joinpath("request.json").read_text(encoding="utf-8"))
_MOST_ITEMS = 10_000  # xllamacpp allocates each item of an array that may be longer, and aborts


class RefusedError(SaigaError):
    """What a client gets instead of an answer; `param` is the field of its request that is wrong."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.status = status
        self.content = {"error": {"message": str(self), "type": kind, "param": param, "code": code}}


@contextmanager
def _refusing(param: str) -> Iterator[None]:
    try:
        yield
    except (SaigaError, AttributeError, TypeError, RecursionError) as error:
        raise RefusedError(f"{param}: {' '.join(str(error).split())[:300]}", param) from None


class ChatRequest(NamedTuple):
    """What is asked, by OpenAI's names; `settings` are those of llama.cpp's server."""

    given: Mapping[str, Any]
    messages: Sequence[Message]
    settings: dict[str, Any]
    schema: Schema | None = None  # of the answer
    form: ToolForm | None = None  # of calls, with the schemas of the arguments
    functions: Mapping[str, Schema] = {}  # read only

    def settled(self, written: str) -> str:
        """What the text of the answer that has begun so begins with."""
        return self.form.settled(written) if self.form else written

    def read(self, written: str, end: str) -> tuple[dict[str, Any], str]:
        """The message, and why it ends. Raises RefusedError if a finished answer does not fit."""
        message = {"role": "assistant", "content": self.form.split(written)[0] if self.form else written}
        try:
            if self.form and end == "stop":
                message = read_answer(self.form, written, self.functions, self.messages)
            if self.schema is not None and end == "stop":
                validator(self.schema).validate(json.loads(written))
        except (ValueError, RecursionError, SaigaError, jsonschema.ValidationError) as error:
            reason = f"The answer does not fit the schema: {str(error).splitlines()[0][:300]}"
            raise RefusedError(reason, "tools" if self.form else "response_format", 422) from None
        return message, "tool_calls" if "tool_calls" in message else end


def read(body: bytes, llm: "llama_cpp.Llama", n_ctx: int) -> ChatRequest:
    """Raises RefusedError for a request that cannot be answered as it was made."""
    given = _parse(body)
    # The answer that is asked for makes it a conversation.
    turns = [*given["messages"], {"role": "assistant", "content": "."}]
    found = normalise_record({"messages": turns, "tools": given.get("tools")})
    if isinstance(found, BadRecord):
        raise RefusedError("; ".join(found.problems[:3]), found.problems[0].partition(":")[0])
    messages, tokenizer, tools = found["messages"][:-1], encoding.load_gguf_tokenizer(llm), found.get("tools")
    has_calls = any("tool_calls" in message for message in messages)
    may_call = given.get("tool_choice") != "none"
    with _refusing("messages"):
        shown = tools if may_call or has_calls else None  # without any a model is less inclined to call
        prompt = encoding.encode(messages, tokenizer, tools=shown, add_generation_prompt=True)["input_ids"]
    if (room := n_ctx - len(prompt)) < 1:
        reason = f"The messages have {len(prompt)} tokens, but the context holds {n_ctx}."
        raise RefusedError(reason, "messages", code="context_length_exceeded")
    settings = asdict(Sampling.from_gguf(llm.metadata)) | {"min_p": 0.0, "prompt": prompt}
    settings |= {"stream": True, "return_progress": True}
    settings |= {name: given[name] for name in ("temperature", "top_p", "top_k") if name in given}
    settings["seed"] = int(given.get("seed", -1)) % 2**32  # llama.cpp's -1: a random one
    settings["n_predict"] = int(min(room, given.get("max_completion_tokens", given.get("max_tokens", room))))
    names = {token: text for text, token in tokenizer.special_tokens.items()}
    ends = [names[token] for token in engine.stop_ids(llm) - tokenizer.end_of_generation_ids]
    stop = given.get("stop", [])
    settings["stop"] = [*([stop] if isinstance(stop, str) else stop), *ends]  # llama.cpp does not stop by itself there
    settings["preserved_tokens"] = ends  # else the text does not have them
    asked = ChatRequest(given, messages, settings)
    kind = given.get("response_format", {"type": "text"})
    if kind["type"] != "text":
        if tools and may_call:
            raise RefusedError('response_format and tools exclude each other without "tool_choice": "none".', "tools")
        return _hold_to_schema(asked, kind.get("json_schema", {}).get("schema", {"type": "object"}), llm)
    return _hold_to_tools(asked, json.loads(tools), llm, names) if tools and may_call else asked


def _parse(body: bytes) -> dict[str, Any]:
    try:
        content = json.loads(body, parse_constant=_REQUEST.__getitem__)  # NaN and Infinity are no JSON
        json.dumps(content, ensure_ascii=False).encode("utf-8")  # halves of characters are no text
    except (ValueError, LookupError, RecursionError) as error:
        raise RefusedError(f"The body is not JSON: {error}.") from None
    given = {name: value for name, value in content.items() if value is not None} if type(content) is dict else content
    for problem in validator(_REQUEST).iter_errors(given):
        raise RefusedError(f"{problem.json_path}: {problem.message[:300]}", str([*problem.path, ""][0]) or None)
    return dict(given)


def _hold_to_schema(asked: ChatRequest, given: Schema, llm: "llama_cpp.Llama") -> ChatRequest:
    with _refusing("response_format"):
        read = read_schema(given)
        _require_supported(read)
        if _is_native(llm):
            grammar = native_grammar(native_rules(read, "root"))
        else:
            end = one_of(engine.stop_ids(llm))  # its llguidance lets llama.cpp's end of turn through, but no other end
            grammar = "\n".join(["%llguidance {}", f"start: value {end}?", *json_rules(read, "value")])
    return asked._replace(settings={**asked.settings, "grammar": grammar}, schema=read)


def _hold_to_tools(
    asked: ChatRequest, tools: list[Any], llm: "llama_cpp.Llama", names: Mapping[int, str]
) -> ChatRequest:
    with _refusing("tools"):
        is_native, form = _is_native(llm), read_form(llm)
        functions = read_schemas(tools, native_rules if is_native else json_rules)[1]
        _require_supported(list(functions.values()))
        if is_native:
            grammar = make_native_grammar(form, functions)
        else:
            grammar = f"%llguidance {{}}\n{make_grammar(form, functions, ends=engine.stop_ids(llm))}"
    preserved = [*asked.settings["preserved_tokens"], *[names[token] for token in form.token_ids()]]
    settings = {**asked.settings, "grammar": grammar, "preserved_tokens": preserved}
    return asked._replace(settings=settings, form=form.unmarked(names), functions=functions)


def _is_native(llm: "llama_cpp.Llama") -> bool:
    """Whether tokens lose the space that they begin with in xllamacpp's llguidance, but not in llama.cpp's grammars."""
    return has_prefix_space(llm)


def _require_supported(given: object) -> None:
    for part in subschemas(given):
        if part.get(QUOTE):
            raise SaigaError(f"{QUOTE} is only for `saigakit extract`. Leave it out")
        if max(part.get("minItems", 0), part.get("maxItems", 0)) > _MOST_ITEMS:
            raise SaigaError(f"minItems and maxItems can be {_MOST_ITEMS} at most")
