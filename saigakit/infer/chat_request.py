"""Read a request of OpenAI's chat completions: the exact prompt, and the settings of llama.cpp's server."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib import resources
from typing import Any, NamedTuple

from saigakit.core.lazy import jsonschema, llama_cpp
from saigakit.data.records import BadRecord
from saigakit.data.schema import normalise_record
from saigakit.errors import SaigaError
from saigakit.infer import engine
from saigakit.infer.constraint import require_holdable
from saigakit.infer.extraction import validator
from saigakit.infer.schema import Schema, read_schema, subschemas
from saigakit.prompt import encoding
from saigakit.registry import Sampling

_REQUEST: Schema = json.loads(resources.files("saigakit.infer").joinpath("request.json").read_text(encoding="utf-8"))
# xllamacpp's llguidance takes a SentencePiece token without the space that it begins with: so it must not force tokens,
# and a space may stand between values or not. A name or enum with a space in it does not fit then, and is an error.
_GRAMMAR = '%llguidance {{"no_forcing": true}}\nstart: %json {}'
_STYLE = {"x-guidance": {"whitespace_pattern": " ?"}}
_MOST_ITEMS = 10_000  # it allocates each item of an array that may be longer, and aborts


class RefusedError(SaigaError):
    """What a client gets instead of an answer; `param` is the field of its request that is wrong."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.status = status
        self.content = {"error": {"message": str(self), "type": kind, "param": param, "code": code}}


class ChatRequest(NamedTuple):
    """What is asked, by OpenAI's names; `settings` are those of llama.cpp's server."""

    given: Mapping[str, Any]
    settings: dict[str, Any]
    schema: Schema | None

    def require_fit(self, answer: str) -> None:
        """Raises RefusedError if a finished answer does not fit the schema."""
        if self.schema is not None:
            try:
                validator(self.schema).validate(json.loads(answer))
            except (ValueError, RecursionError, jsonschema.ValidationError) as error:
                reason = f"The answer does not fit the schema: {str(error).splitlines()[0][:300]}"
                raise RefusedError(reason, "response_format", 422) from None


def read(body: bytes, llm: "llama_cpp.Llama", n_ctx: int) -> ChatRequest:
    """Raises RefusedError for a request that cannot be answered as it was made."""
    given = _parse(body)
    tools = given.get("tools") if given.get("tool_choice") != "none" else None
    # The answer that is asked for makes it a conversation.
    found = normalise_record({"messages": [*given["messages"], {"role": "assistant", "content": "."}], "tools": tools})
    if isinstance(found, BadRecord):
        raise RefusedError("; ".join(found.problems[:3]), found.problems[0].partition(":")[0])
    messages, tokenizer = found["messages"][:-1], encoding.load_gguf_tokenizer(llm)
    try:
        prompt = encoding.encode(messages, tokenizer, tools=found.get("tools"), add_generation_prompt=True)["input_ids"]
    except SaigaError as error:
        raise RefusedError(str(error), "messages") from None
    if (room := n_ctx - len(prompt)) < 1:
        reason = f"The messages have {len(prompt)} tokens, but the context holds {n_ctx}."
        raise RefusedError(reason, "messages", code="context_length_exceeded")
    settings = asdict(Sampling.from_gguf(llm.metadata)) | {"min_p": 0.0, "prompt": prompt}
    settings |= {"stream": True, "return_progress": True}
    settings |= {name: given[name] for name in ("temperature", "top_p", "top_k") if name in given}
    settings["seed"] = int(given.get("seed", -1)) % 2**32  # llama.cpp's -1: a random one
    settings["n_predict"] = int(min(room, given.get("max_completion_tokens", given.get("max_tokens", room))))
    ends = engine.stop_ids(llm) - tokenizer.end_of_generation_ids  # at which llama.cpp does not stop by itself
    settings["preserved_tokens"] = [text for text, token in tokenizer.special_tokens.items() if token in ends]
    stop = given.get("stop", [])
    settings["stop"] = [*([stop] if isinstance(stop, str) else stop), *settings["preserved_tokens"]]
    form = given.get("response_format", {"type": "text"})
    schema: Schema | None = {"type": "object"} if form["type"] == "json_object" else None
    if form["type"] == "json_schema":
        schema = form["json_schema"]["schema"]
    if schema is not None:
        settings["grammar"] = _make_grammar(schema)
    return ChatRequest(given, settings, schema)


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


def _make_grammar(schema: Schema) -> str:
    checker = jsonschema.Draft202012Validator
    try:
        checker.check_schema(schema, format_checker=checker.FORMAT_CHECKER)  # also the regular expressions
        if any(part.get(name, 0) > _MOST_ITEMS for part in subschemas(schema) for name in ("minItems", "maxItems")):
            raise SaigaError(f"minItems and maxItems can be {_MOST_ITEMS} at most")
        grammar = _GRAMMAR.format(json.dumps(read_schema(schema) | _STYLE))
        require_holdable(grammar)
    except (SaigaError, jsonschema.SchemaError, AttributeError, TypeError, RecursionError) as error:
        raise RefusedError(f"response_format: {str(error).splitlines()[0][:300]}", "response_format") from None
    return grammar
