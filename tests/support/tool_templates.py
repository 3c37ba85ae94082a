"""Vocabularies with templates that write calls of functions in the forms of real models."""

from chatml import WITH_TOOLS
from vocabularies import HERMES_TOOLS, MISTRAL_TOOLS, SAIGA2, THINKING, THINKING_PROMPT

BEFORE_CALLS = "{{- message.content }}\n        {%- if message.tool_calls %}"
# As Mistral's own: calls need ids of nine letters and digits, and have no text before them.
MISTRAL_STRICT = MISTRAL_TOOLS.replace(
    BEFORE_CALLS, "{{- message.content if not message.tool_calls }}\n        {%- if message.tool_calls %}"
).replace(
    "{%- set out =",
    "{%- if call.id is not defined or call.id|length != 9 %}{{- raise_exception('nine') }}{%- endif %}{%- set out =",
)
assert MISTRAL_STRICT.count("raise_exception") == 1 and "if not message.tool_calls" in MISTRAL_STRICT
# As Llama 3.1's: one call, as bare JSON.
LLAMA31 = r"""
{{- bos_token }}
{%- if tools %}
    {{- '<|start_header_id|>user<|end_header_id|>\n\nCall as {"name": …, "parameters": …}.' }}
    {%- for tool in tools %}{{- '\n' }}{{- tool | tojson(indent=4) }}{%- endfor %}
    {{- '<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {%- if message.tool_calls | length != 1 %}{{- raise_exception('only single tool-calls') }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
        {{- '{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}{{- '}<|eot_id|>' }}
    {%- else %}
        {%- set role = 'ipython' if message.role == 'tool' else message.role %}
        {{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""
PAIR = """'<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}{{- '}\\n</tool_call>'"""
ARGUMENTS_FIRST = HERMES_TOOLS.replace(
    PAIR,
    """'<tool_call>{"arguments": ' }}{{- call.function.arguments | tojson }}
            {{- ', "function": "' + call.function.name + '"}</tool_call>'""",
)
NESTED = HERMES_TOOLS.replace(
    PAIR, """'Calls: ' }}{{- {'type': 'function', 'function': call.function} | tojson }}{{- ';'"""
)
# Not JSON with a name and arguments.
XML = HERMES_TOOLS.replace(PAIR, "'<call ' + call.function.name + '>' }}{{- call.function.arguments | tojson }}{{- ''")
assert len({HERMES_TOOLS, ARGUMENTS_FIRST, NESTED, XML}) == 4
FORMS = {
    "saiga2 with the fallback": ("mistral_v1-saiga2", SAIGA2),
    "chatml with the fallback": ("qwen_tokens-hermes_tools", WITH_TOOLS),
    "qwen": ("qwen_tokens-hermes_tools", HERMES_TOOLS),
    "thinking": ("qwen_tokens-hermes_tools", THINKING),
    "thinking prompt": ("qwen_tokens-hermes_tools", THINKING_PROMPT),
    "arguments first": ("qwen_tokens-hermes_tools", ARGUMENTS_FIRST),
    "nested": ("qwen_tokens-hermes_tools", NESTED),
    "smollm2": ("smollm2-its_own", None),
    "mistral in plain text": ("qwen_tokens-hermes_tools", MISTRAL_TOOLS),
    "mistral v3": ("mistral_v3-tools", MISTRAL_TOOLS),
    "mistral v3, strict": ("mistral_v3-tools", MISTRAL_STRICT),
    "nemo": ("nemo-tools", MISTRAL_TOOLS),
    "llama 3.1": ("llama3_tokens-llama3", LLAMA31),
}
QUICK = FORMS.keys() - {"smollm2", "nemo"}
ONE_CALL = {"llama 3.1"}
NO_TEXT_BEFORE = {"llama 3.1", "mistral v3, strict"}


def calling(*calls, content=""):
    """An answer with calls, each a name and arguments."""
    made = [
        {"type": "function", "id": f"abcDEF{number:03}", "function": {"name": name, "arguments": arguments}}
        for number, (name, arguments) in enumerate(calls)
    ]
    return {"role": "assistant", "content": content, "tool_calls": made}
