"""Answer with a value that fits a JSON schema, whose quotations are literal words of the text."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from saigakit.core.lazy import jsonschema, llama_cpp
from saigakit.data.tool_calls import value_problems
from saigakit.errors import SaigaError
from saigakit.infer import engine, sequences
from saigakit.infer.constraint import Constraint
from saigakit.infer.schema import AnySchema, Schema, find_quotes, make_grammar, read_schema
from saigakit.prompt import encoding
from saigakit.prompt.backends import token_bytes
from saigakit.prompt.template import Message, Tools
from saigakit.weights import lineage


class Extraction(NamedTuple):
    """A value that fits the schema, and where its quotations stand in the text."""

    value: Any
    quotes: list[dict[str, Any]]


def extract(
    llm: "llama_cpp.Llama",
    text: str,
    schema: AnySchema,
    *,
    quotes: Sequence[str] = (),
    system: str | None = None,
    max_new_tokens: int | None = None,
) -> Any:  # noqa: ANN401  # any JSON value
    """The most likely answer to `text` that fits a JSON schema, or that of a pydantic model or other type.

    `quotes`: properties that can only be literal words of the text, beside those with "x-quote": true in the schema.
    `system`: None is the system prompt stored in the file, "" is none. `max_new_tokens`: twice the text, at least 256.
    Raises SaigaError for a schema that cannot be held, and for an answer without an end.
    """
    asked = _Request(llm, schema, quotes, system)
    prompt, constraint = asked.prompt(text), asked.constraint(text)
    limit = asked.limit(prompt, max_new_tokens)
    answer = sequences.answer(llm, prompt, constraint, max_new_tokens=limit)
    return asked.read(text, answer, constraint).value


def extract_all(
    llm: "llama_cpp.Llama",
    texts: Sequence[str],
    schema: AnySchema,
    *,
    quotes: Sequence[str] = (),
    system: str | None = None,
    max_new_tokens: int | None = None,
) -> Iterator[tuple[int, Extraction | SaigaError]]:
    """As `extract` for many texts at once: yields the index of each text, as it is answered, or why it is not."""
    asked = _Request(llm, schema, quotes, system)
    prompts: dict[int, list[int]] = {}
    constraints: dict[int, Constraint] = {}
    for index, text in enumerate(texts):
        try:
            prompts[index], constraints[index] = asked.prompt(text), asked.constraint(text)
        except SaigaError as error:
            prompts.pop(index, None)
            yield index, error
    if not prompts:
        return
    order = list(prompts)
    limits = [asked.limit(prompt, max_new_tokens) for prompt in prompts.values()]
    choosers = [constraints[index] for index in order]
    for position, answer in sequences.answers(llm, list(prompts.values()), choosers, limits):
        index = order[position]
        try:
            yield index, asked.read(texts[index], answer, constraints[index])
        except SaigaError as error:
            yield index, error


class _Request:
    """What is asked of every text."""

    def __init__(self, llm: "llama_cpp.Llama", schema: AnySchema, quotes: Sequence[str], system: str | None) -> None:
        self._llm, self._schema = llm, read_schema(schema, quotes)
        self._tokenizer = encoding.load_gguf_tokenizer(llm)
        self._beginning = system_message(llm, system)
        self._prefix = render(llm, [{"role": "assistant", "content": "["}]).partition("[")[0]
        self.constraint("?")  # refuses the schema before any text is read

    def prompt(self, text: str) -> list[int]:
        if not text.strip():
            raise SaigaError("The text is empty.")
        if half := [hex(ord(letter)) for letter in text if "\ud800" <= letter <= "\udfff"]:
            raise SaigaError(f"The text contains half of a character ({half[0]}): it was cut or decoded wrongly.")
        messages: list[Message] = [*self._beginning, {"role": "user", "content": text}]
        ids = encoding.encode(messages, self._tokenizer, add_generation_prompt=True)["input_ids"]
        engine.require_room(self._llm, ids)
        return ids

    def constraint(self, text: str) -> Constraint:
        return Constraint(self._llm, make_grammar(self._schema, text, self._prefix))

    def limit(self, prompt: Sequence[int], given: int | None) -> int:
        return min(self._llm.n_ctx() - len(prompt), given or max(256, 2 * len(prompt)))

    def read(self, text: str, answer: list[int], constraint: Constraint) -> Extraction:
        """Raises SaigaError unless the answer is complete and fits the schema."""
        constraint.require_no_error()
        ends = engine.stop_ids(self._llm)
        written = write(self._llm, [token for token in answer if token not in ends]).removeprefix(self._prefix)
        shown = written[:300].encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        if not constraint.is_complete:
            what = f"The answer has no end after {len(answer)} tokens"
            raise SaigaError(f"{what}. Give a larger max_new_tokens, or n_ctx. It begins: {shown}")
        try:
            value = json.loads(written)
            problems = [problem.message for problem in validator(self._schema).iter_errors(value)]
            problems = problems or value_problems("the answer", value)
        except (ValueError, RecursionError) as error:  # a number of 4,300 digits, or a value as deep as a schema allows
            problems = [str(error)]
        if problems:
            raise SaigaError(f"The answer does not fit the schema ({problems[0][:300]}): {shown}")
        return Extraction(value, find_quotes(self._schema, value, text))


def system_message(llm: "llama_cpp.Llama", system: str | None) -> list[Message]:
    """The system message; None is the prompt stored in the file, "" is none."""
    system = llm.metadata.get(lineage.SYSTEM_PROMPT_KEY) if system is None else system
    return [{"role": "system", "content": system}] if system else []


def validator(schema: Schema) -> "jsonschema.Draft202012Validator":
    return jsonschema.Draft202012Validator(schema)


def render(llm: "llama_cpp.Llama", answer: Sequence[Message], tools: Tools | None = None) -> str:
    """What is trained of an answer, but for its end; the template may begin it, as Mistral's does with a space."""
    turn = [{"role": "user", "content": "?"}, *answer]
    labels = encoding.encode(turn, encoding.load_gguf_tokenizer(llm), tools=tools)["labels"]
    return write(llm, [label for label in labels if label != encoding.IGNORE_INDEX][:-1])


def write(llm: "llama_cpp.Llama", ids: Sequence[int]) -> str:
    """The text of tokens, with a MARK for each special one."""
    special = set(encoding.load_gguf_tokenizer(llm).special_tokens.values())
    written = b"".join(b"\xff[%d]" % token if token in special else token_bytes(llm, token) for token in ids)
    return written.decode("utf-8", "surrogateescape")
