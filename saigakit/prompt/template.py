"""Render messages with the model's Jinja chat template."""

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

from saigakit.core import manifest, workspace
from saigakit.errors import SaigaError
from saigakit.prompt import placeholders, sandbox
from saigakit.prompt.sandbox import BROKEN, Sandbox
from saigakit.registry import ModelSpec
from saigakit.weights.base_files import read_json

Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]]
PACKAGED = ("saiga2", "chatml")
FILE = "chat_template.jinja"
MARKS = ("\U000f0002", "\U000f0003")
_GENERATION = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")
_REFUSAL = re.compile(r"(\{\{[-+]?)\s*raise_exception\((?:(?!\}\}).)*?\)\s*([-+]?\}\})", re.DOTALL)
_REVERSED = re.compile(r"(\{%[-+]?\s*for\s+[^%]+?\s+in\s+)([\w.]+)\[::-1\](?!\[)")


class _Generation(Extension):
    """Render what is inside `{% generation %}`, which marks the assistant's words for other trainers."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 reads a plain set

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Marked(_Generation):
    """Put it between MARKS too, to compare it with what is trained."""

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


def _masked_tojson(value: object, **options: Any) -> str:  # noqa: ANN401
    return placeholders.mark_as_json(_tojson(value, **options))


@cache
def _now() -> datetime:
    """The same during a run, so that a conversation gets the same ids every time."""
    return datetime.now().astimezone()


@cache
def _compiled(chat_template: str, masked: bool) -> jinja2.Template:
    # The settings of transformers, so that other tools render the same text.
    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Marked if masked else _Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = sandbox.bounded("tojson", _masked_tojson if masked else _tojson)
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda format: _now().strftime(format)
    return environment.from_string(chat_template)


def render(
    messages: Sequence[Message],
    chat_template: str,
    *,
    tools: Tools | None = None,
    add_generation_prompt: bool = False,
    variables: Mapping[str, str] | None = None,
    masked: bool = False,
) -> str:
    """`variables`: bos_token, eos_token and the like. `masked`: the messages contain placeholders, and the text inside
    `{% generation %}` is put between MARKS.

    Raises SaigaError if the template is broken or refuses the messages.
    """
    sandbox.begin()
    try:
        return _compiled(chat_template, masked).render(
            messages=messages,
            tools=tools or None,  # templates distinguish None from undefined
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **(variables or {}),
        )
    except (*BROKEN, AttributeError, TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise SaigaError(f"The chat template cannot render this conversation: {_reason(error)}") from None


def broken(error: Exception, place: object = "") -> SaigaError:
    """`place`: the file that the template is in."""
    return SaigaError(f"The chat template{place and f' in {place}'} is broken: {_reason(error)}")


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__  # Jinja adds the line of a file that has no name


def decode_row(messages: Sequence[Message], tools: Tools | str | None) -> tuple[Sequence[Message], Tools | None]:
    """Turn a row of a Dataset into what templates expect: no nulls, tools and arguments as objects, not JSON text."""
    tools = _parse_json("tools", tools) if isinstance(tools, str) else tools
    if not any(None in message.values() or message.get("tool_calls") for message in messages):
        return messages, tools
    decoded = [drop_nulls(message) for message in messages]
    for message in decoded:
        if message.get("tool_calls"):
            message["tool_calls"] = [_decode_call(call) for call in message["tool_calls"]]
    return decoded, tools


def _decode_call(call: object) -> object:
    if not isinstance(call, Mapping) or not isinstance(function := call.get("function"), Mapping):
        return call  # the template renders or refuses it
    if isinstance(arguments := function.get("arguments"), str):
        function = {**function, "arguments": _parse_json("arguments", arguments)}
    return {**drop_nulls(call), "function": function}


def drop_nulls(item: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in item.items() if value is not None}


def _parse_json(name: str, text: str) -> Any:  # noqa: ANN401  # JSON of any kind
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SaigaError(f"{name} is not valid JSON ({error}): {text[:80]!r}.") from None


def for_inference(chat_template: str) -> str:
    """Rewrite what inference engines do not support: `{% generation %}`, `raise_exception` and loops over `[::-1]`."""
    without_tags = _GENERATION.sub(lambda tag: f"{tag[1]}{'endif' if tag[2] else 'if true'}{tag[3]}", chat_template)
    return _REVERSED.sub(r"\1\2 | reverse", _REFUSAL.sub(r"\1 '' \2", without_tags))


def with_tools(chat_template: str, place: object = "") -> str:
    """Prepend a template that turns tools and calls into text, unless it (from `place`) handles `tools` itself."""
    environment = Sandbox(extensions=[_Generation, "jinja2.ext.loopcontrols"])
    try:
        names = meta.find_undeclared_variables(environment.parse(chat_template))
    except BROKEN as error:
        raise broken(error, place) from None
    return chat_template if "tools" in names else _packaged("hermes") + chat_template


def _packaged(name: str) -> str:
    return resources.files("saigakit.prompt").joinpath(f"templates/{name}.jinja").read_text(encoding="utf-8")


def read_chat_template(spec: ModelSpec, tokenizer_dir: Path, chat_template: str | None = None) -> str:
    """`chat_template` as `find_chat_template` takes it, the registry's template or the tokenizer's own, with tools."""
    name = spec.template if chat_template is None else chat_template
    return with_tools(_require_own(spec, tokenizer_dir), tokenizer_dir) if name is None else find_chat_template(name)


def find_chat_template(name: str) -> str:
    """`name`: one of PACKAGED, a file, also in an attached input, or a template's text. With tools."""
    if name in PACKAGED:
        return with_tools(_packaged(name))
    if "{%" in name or "{{" in name:
        return with_tools(name)
    file = workspace.find_optional_input(name) if name else None
    if file is None or not file.is_file():
        raise SaigaError(f"chat_template={name!r} is unknown. Give {' or '.join(PACKAGED)}, or an existing file.")
    return with_tools(_read_text(file), file)


def formatted_template(format_dir: Path | None) -> str | None:
    """The text of the template that was chosen in this 01_format; None if it took the model's."""
    if format_dir is None or not (format_dir / manifest.NAME).is_file():
        return None
    chosen: str | None = manifest.read(format_dir).get("chat_template")
    return chosen


def _require_own(spec: ModelSpec, tokenizer_dir: Path) -> str:
    if (template := read_own(tokenizer_dir)) is None:
        raise SaigaError(
            f"{tokenizer_dir} has no chat template ({FILE} or tokenizer_config.json), "
            f"and {spec.name} has none in the registry. Use an instruction-tuned model, or give a chat_template: "
            f"{', '.join(PACKAGED)} or a file."
        )
    return template


def read_own(tokenizer_dir: Path) -> str | None:
    """The template in the files of a tokenizer, None if they have none."""
    if (file := tokenizer_dir / FILE).is_file():
        return _read_text(file)
    template = read_json(tokenizer_dir / "tokenizer_config.json", {}).get("chat_template")
    if isinstance(template, list):  # several named templates
        template = next((item.get("template") for item in template if item.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SaigaError(f"{file} is damaged ({error}); download it again.") from None
