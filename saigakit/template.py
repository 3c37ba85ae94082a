"""Messages into the text of a prompt, by the model's own Jinja chat template."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from saigakit.errors import SaigaError
from saigakit.models import ModelSpec

Message = Mapping[str, Any]


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for other trainers; here it renders what is inside."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 reads a plain set

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> NoReturn:
    raise SaigaError(f"The chat template refuses this conversation: {message}")


@cache
def _compiled(chat_template: str) -> jinja2.Template:
    # The settings with which transformers renders chat templates, so that other tools render the same text.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    return environment.from_string(chat_template)


def render(
    messages: Sequence[Message], chat_template: str, *, add_generation_prompt: bool = False, **variables: str
) -> str:
    """The whole text, special tokens spelled out. `variables`: bos_token, eos_token and the like.

    Raises SaigaError where the template refuses the messages or is broken.
    """
    try:
        return _compiled(chat_template).render(
            messages=messages, add_generation_prompt=add_generation_prompt, **variables
        )
    except (jinja2.TemplateError, TypeError) as error:  # TypeError: text + None inside a template
        raise SaigaError(f"The chat template cannot render this conversation: {error}") from None


def of_model(spec: ModelSpec, tokenizer_dir: Path) -> str:
    """The registry's template, else the tokenizer's own (chat_template.jinja or tokenizer_config.json)."""
    if spec.template is not None:
        return resources.files("saigakit").joinpath(f"templates/{spec.template}.jinja").read_text(encoding="utf-8")
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
