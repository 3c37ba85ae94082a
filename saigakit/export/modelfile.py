"""The texts around a conversation's messages into Ollama's Modelfile, whose template is one of Go's text/template."""

from saigakit.errors import SaigaError
from saigakit.export.chat_format import ChatFormat, ToolFormat
from saigakit.export.fit import Choice
from saigakit.registry import Sampling

_CACHE_RAM = 8192  # MiB of RAM that llama-server takes for earlier conversations, if nothing is said
# JSON as Python's json.dumps spaces it, but for the order of keys: Ollama keeps an object as a map, sorted by key.
_JSON = (
    '{{ define "json" }}{{ $kind := printf "%.3s" (printf "%T" .) }}{{ $comma := "" }}{{ if eq $kind "map" }}{{ "{" }}'
    '{{ range $key, $value := . }}{{ $comma }}"{{ $key }}": {{ template "json" $value }}{{ $comma = ", " }}{{ end }}}'
    '{{ else if eq $kind "[]i" }}[{{ range . }}{{ $comma }}{{ template "json" . }}{{ $comma = ", " }}{{ end }}]'
    "{{ else }}{{ json . }}{{ end }}{{ end }}"
)
_PROPERTY = (
    '{{ define "property" }}{"type": "{{ .Type }}"'
    '{{ if .Description }}, "description": {{ template "json" .Description }}{{ end }}'
    '{{ if .Enum }}, "enum": {{ template "json" .Enum }}{{ end }}'
    '{{ if .Items }}, "items": {{ template "json" .Items }}{{ end }}}{{ end }}'
)
_TOOL = (
    '{{ define "tool" }}{"type": "function", "function": {"name": "{{ .Name }}"'
    '{{ if .Description }}, "description": {{ template "json" .Description }}{{ end }}'
    '{{ if .Parameters.Type }}, "parameters": {"type": "{{ .Parameters.Type }}", "properties": {{ "{" }}'
    '{{ $comma := "" }}{{ range $key, $value := .Parameters.Properties }}{{ $comma }}"{{ $key }}": '
    '{{ template "property" $value }}{{ $comma = ", " }}{{ end }}}{{ if .Parameters.Required }}, "required": ['
    '{{ range $n, $name := .Parameters.Required }}{{ if $n }}, {{ end }}"{{ $name }}"{{ end }}]{{ end }}}{{ end }}}}'
    "{{ end }}"
)
_CALL = (
    '{{ define "call" }}{"name": "{{ .Name }}", "arguments": {{ "{" }}{{ $comma := "" }}'
    '{{ range $key, $value := .Arguments }}{{ $comma }}"{{ $key }}": {{ template "json" $value }}'
    '{{ $comma = ", " }}{{ end }}}}{{ end }}'
)


def go_template(chat: ChatFormat) -> str:
    """Renders what `chat` does: the same prompt, but that JSON has Ollama's order of keys and takes no blanks off."""
    tools = chat.tools
    definitions = _JSON + _PROPERTY + _TOOL + _CALL + '{{ $result := "" }}' if tools else ""
    return (
        f"{definitions}{_beginning(chat)}{{{{ range .Messages }}}}{_result(tools)}{_turn(chat, 'user', '')}"
        f"{_turn(chat, 'assistant', _calls(tools))}{{{{ end }}}}{{{{ end }}}}{_after_results(tools)}"
        f"{_text(chat.answer)}"
    )


def _beginning(chat: ChatFormat) -> str:
    before, after = map(_text, chat.system)
    plain = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{{{{ else }}}}{_text(chat.begin)}{{{{ end }}}}"
    if chat.tools is None:
        return plain
    return (
        f"{{{{ if .Tools }}}}{{{{ if .System }}}}{before}{{{{ .System }}}}{_text(chat.tools.before_with_system)}"
        f"{{{{ else }}}}{_text(chat.tools.before)}{{{{ end }}}}{{{{ range $n, $tool := .Tools }}}}{{{{ if $n }}}}"
        f'{_text(chat.tools.between)}{{{{ end }}}}{{{{ template "tool" $tool.Function }}}}{{{{ end }}}}'
        f"{_text(chat.tools.after)}{{{{ else }}}}{plain}{{{{ end }}}}"
    )


def _result(tools: ToolFormat | None) -> str:
    """The first branch of the messages: a function's result, several in a row as one turn."""
    if tools is None:
        return '{{ if eq .Role "system" }}'  # it stood at the beginning
    return (
        f'{{{{ if and $.Tools (eq .Role "tool") }}}}{{{{ if $result }}}}{_text(tools.between_results)}{{{{ else }}}}'
        f'{_text(tools.result)}{{{{ $result = "follows" }}}}{{{{ end }}}}{{{{ .Content }}}}'
    )


def _after_results(tools: ToolFormat | None) -> str:
    if tools is None:
        return ""
    return f'{{{{ if $result }}}}{_text(tools.after_results)}{{{{ $result = "" }}}}{{{{ end }}}}'


def _turn(chat: ChatFormat, role: str, calls: str) -> str:
    before, after = map(_text, chat.turns[role])
    return f'{{{{ else if eq .Role "{role}" }}}}{_after_results(chat.tools)}{before}{{{{ .Content }}}}{calls}{after}'


def _calls(tools: ToolFormat | None) -> str:
    """Ollama looks for what begins a call in the first text of the branch that asks for .ToolCalls."""
    if tools is None:
        return ""
    return (
        f"{{{{ if and $.Tools .ToolCalls }}}}{{{{ if .Content }}}}{_text(tools.call_after_text)}{{{{ else }}}}"
        f"{_text(tools.call)}{{{{ end }}}}{{{{ range $n, $call := .ToolCalls }}}}{{{{ if $n }}}}"
        f'{_text(tools.between_calls)}{{{{ end }}}}{{{{ template "call" $call.Function }}}}{{{{ end }}}}'
        f"{_text(tools.after_calls)}{{{{ end }}}}"
    )


def _text(literal: str) -> str:
    """Text that Go takes as it is: a brace before an action would begin another."""
    literal = literal.replace("{{", '{{ "{{" }}')
    return f'{literal[:-1]}{{{{ "{{" }}}}' if literal.endswith("{") else literal


def modelfile(
    gguf_name: str, chat: ChatFormat, *, stops: list[str], sampling: Sampling, choice: Choice, system_prompt: str | None
) -> str:
    """For `ollama create NAME -f Modelfile` beside the GGUF; `stops` end an answer.

    Ollama adds the BOS token where the GGUF says so, and 03_merge_gguf says so only where the template spells none.
    Raises SaigaError for a system prompt that a Modelfile cannot hold.
    """
    notes = [f"ollama create NAME -f Modelfile, beside {gguf_name}; then ollama run NAME"]
    notes += [choice.in_words(), *cache_notes(choice)]
    if chat.is_trimmed:
        notes.append("The model's own template takes blanks off both ends of a text; Ollama's cannot: send none.")
    if chat.tools is None:
        notes.append("Functions (tools) are not in this template: the model's own writes them in another way.")
    lines = [*(f"# {note}" for note in notes), f"FROM ./{gguf_name}", f"TEMPLATE {_quoted(go_template(chat))}"]
    if system_prompt:
        lines.append(f"SYSTEM {_quoted(system_prompt)}")
    values = [("stop", f'"{stop}"') for stop in stops]
    values += [("temperature", f"{sampling.temperature:g}"), ("top_p", f"{sampling.top_p:g}")]
    values += [("top_k", f"{sampling.top_k}"), ("repeat_penalty", f"{sampling.repeat_penalty:g}")]
    lines += [f"PARAMETER {name} {value}" for name, value in [*values, ("num_ctx", f"{choice.n_ctx}")]]
    return "\n".join(lines) + "\n"


def cache_notes(choice: Choice) -> list[str]:
    """What no Modelfile can say: the type of the cache is set for Ollama's server."""
    if choice.cache_type == "f16":
        return []
    return [
        f"Ollama's server must be started with OLLAMA_FLASH_ATTENTION=1 and OLLAMA_KV_CACHE_TYPE={choice.cache_type}: "
        "else keys and values are in f16 and take nearly twice the memory."
    ]


def _quoted(text: str) -> str:
    """Ollama drops what cannot be printed, such as a no-break space, and ends a text at three quotation marks."""
    lost = next((sign for sign in text if not sign.isprintable() and sign != "\n"), '"""' if '"""' in text else None)
    if lost is not None:
        raise SaigaError(
            f"The system prompt or the chat template holds {lost!r}, which a Modelfile of Ollama cannot hold. Take it "
            "out of the system prompt of the records, or use llama-server, whose command is beside the GGUF."
        )
    return f'"""{text}"""'


def llama_server(gguf_name: str, *, sampling: Sampling, choice: Choice) -> str:
    """The command that serves the model with the template inside the GGUF, and with the sampling of saigakit."""
    words = [f"llama-server -m {gguf_name} -c {choice.n_ctx} --jinja"]
    words += [f"--temp {sampling.temperature:g} --top-p {sampling.top_p:g} --top-k {sampling.top_k} --min-p 0"]
    words += [f"--repeat-penalty {sampling.repeat_penalty:g}"]
    if choice.cache_type != "f16":
        words.append(f"--flash-attn on --cache-type-k {choice.cache_type} --cache-type-v {choice.cache_type}")
    if choice.left_mib < _CACHE_RAM:
        words.append(f"--cache-ram {choice.left_mib}")
    return f"# {choice.in_words()}\n{' '.join(words)}\n"
