"""Messages into the text of a prompt, by the model's own Jinja chat template."""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from saigakit.errors import SaigaError
from saigakit.prompt import placeholders
from saigakit.registry import ModelSpec

Message = Mapping[str, Any]
MARKS = ("\U000f0002", "\U000f0003")
_GENERATION = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")
_REFUSAL = re.compile(r"(\{\{[-+]?)\s*raise_exception\((?:(?!\}\}).)*?\)\s*([-+]?\}\})", re.DOTALL)
_TURNED = re.compile(r"(\{%[-+]?\s*for\s+[^%]+?\s+in\s+)([\w.]+)\[::-1\](?!\[)")


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for other trainers; here it renders what is inside."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 reads a plain set

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Marked(_Generation):
    """The same between two marks, to compare them with what is learned."""

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = parser.stream.current.lineno
        begin, end = (nodes.Output([nodes.TemplateData(mark)]).set_lineno(line) for mark in MARKS)
        return [begin, *super().parse(parser), end]


def _raise(message: str) -> NoReturn:
    raise SaigaError(f"The chat template refuses this conversation: {message}")


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _masked_tojson(value: object, **form: Any) -> str:  # noqa: ANN401
    return placeholders.quoted(_tojson(value, **form))


@cache
def _now() -> datetime:
    """One moment for the whole run: a conversation has the same ids at its end as at its beginning."""
    return datetime.now().astimezone()


@cache
def _compiled(chat_template: str, masked: bool) -> jinja2.Template:
    # The settings with which transformers renders chat templates, so that other tools render the same text.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Marked if masked else _Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _masked_tojson if masked else _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: _now().strftime(form)
    return environment.from_string(chat_template)


def render(
    messages: Sequence[Message],
    chat_template: str,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    variables: Mapping[str, str] | None = None,
    masked: bool = False,
) -> str:
    """The whole text, special tokens spelled out. `variables`: bos_token, eos_token and the like.

    `masked`: the messages hold placeholders, and what `{% generation %}` encloses stands between MARKS.
    Raises SaigaError where the template refuses the messages or is broken.
    """
    try:
        return _compiled(chat_template, masked).render(
            messages=messages,
            tools=tools or None,  # templates tell None from undefined
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **(variables or {}),
        )
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:  # of its own words
        raise SaigaError(f"The chat template cannot render this conversation: {error}") from None


def decoded(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | str | None
) -> tuple[Sequence[Message], Sequence[Mapping[str, Any]] | None]:
    """What a template gets of a row of a Dataset: no key that is null, and JSON text of tools and arguments as objects.

    Raises SaigaError for a text that is no JSON.
    """
    tools = _from_json("tools", tools) if isinstance(tools, str) else tools
    if not any(None in message.values() or message.get("tool_calls") for message in messages):
        return messages, tools
    kept = [{key: value for key, value in message.items() if value is not None} for message in messages]
    return [
        {**each, "tool_calls": [*map(_call, each["tool_calls"])]} if each.get("tool_calls") else each for each in kept
    ], tools


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    if isinstance(function.get("arguments"), str):
        function["arguments"] = _from_json("arguments", function["arguments"])
    return {key: value for key, value in call.items() if value is not None} | {"function": function}


def _from_json(name: str, text: str) -> Any:  # noqa: ANN401  # JSON of any kind
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SaigaError(f"{name} is text that is not JSON ({error}): {text[:80]!r}.") from None


def for_inference(chat_template: str) -> str:
    """The same template in the words that programs which only run models know.

    Without `{% generation %}`, without `raise_exception`, in whose place nothing is rendered, and with the filter
    `reverse` where a loop goes over `[::-1]`.
    """
    found = _GENERATION.sub(lambda tag: f"{tag[1]}{'endif' if tag[2] else 'if true'}{tag[3]}", chat_template)
    return _TURNED.sub(r"\1\2 | reverse", _REFUSAL.sub(r"\1 '' \2", found))


def with_tools(chat_template: str) -> str:
    """The template itself where it reads `tools`; else after one that turns functions and calls into text."""
    if "tools" in meta.find_undeclared_variables(_parsed(chat_template)):
        return chat_template
    return _packaged("hermes") + chat_template


def _parsed(chat_template: str) -> nodes.Template:
    environment = ImmutableSandboxedEnvironment(extensions=[_Generation, "jinja2.ext.loopcontrols"])
    try:
        return environment.parse(chat_template)
    except jinja2.TemplateError as error:
        raise SaigaError(f"The chat template is broken: {error}") from None


def _packaged(name: str) -> str:
    return resources.files("saigakit.prompt").joinpath(f"templates/{name}.jinja").read_text(encoding="utf-8")


def of_model(spec: ModelSpec, tokenizer_dir: Path) -> str:
    """The registry's template, else the tokenizer's own (chat_template.jinja or tokenizer_config.json); with tools."""
    return with_tools(_packaged(spec.template) if spec.template else _own(spec, tokenizer_dir))


def _own(spec: ModelSpec, tokenizer_dir: Path) -> str:
    file = tokenizer_dir / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    config = tokenizer_dir / "tokenizer_config.json"
    template = json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.is_file() else None
    if isinstance(template, list):  # several named templates
        template = next((item["template"] for item in template if item["name"] == "default"), None)
    if not isinstance(template, str):
        raise SaigaError(
            f"{tokenizer_dir} has no chat template (chat_template.jinja or tokenizer_config.json), "
            f"and {spec.name} has none in the registry. Use an instruction-tuned model."
        )
    return template
