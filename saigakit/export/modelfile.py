"""Write the Modelfile for Ollama and the command for llama-server."""

from saigakit.export.fit import Choice
from saigakit.registry import Sampling

# The first version that renders a model without TEMPLATE by the chat template inside its GGUF on every endpoint.
# `ollama create` adds a Go template of its own for a chat template that it recognises, but prefers the one in the GGUF
# if only that one has tools (shouldPreferChatTemplate in server/images.go, August 2026). Those that we write have them.
OLLAMA_VERSION = "0.30.11"
_CACHE_RAM = 8192  # MiB of RAM that llama-server takes for earlier conversations, if nothing is said


def modelfile(
    gguf_name: str, *, stops: list[str], sampling: Sampling, choice: Choice, system_prompt: str | None
) -> str:
    """Write the Modelfile that lies next to the GGUF; `stops` end an answer.

    Ollama only records REQUIRES and does not check it, so a comment names the version too.
    """
    notes = [
        f"Needs Ollama {OLLAMA_VERSION} or later.",
        f"Next to {gguf_name}: ollama create NAME -f Modelfile; then ollama run NAME",
        choice.in_words(),
        *ollama_notes(choice, system_prompt),
    ]
    lines = [*(f"# {note}" for note in notes), f"FROM ./{gguf_name}", f"REQUIRES {OLLAMA_VERSION}"]
    if system_prompt and _unsupported(system_prompt) is None:
        lines.append(f'SYSTEM """{system_prompt}"""')
    values = [("stop", f'"{stop}"') for stop in stops]
    values += [("temperature", f"{sampling.temperature:g}"), ("top_p", f"{sampling.top_p:g}")]
    values += [("top_k", f"{sampling.top_k}"), ("repeat_penalty", f"{sampling.repeat_penalty:g}")]
    lines += [f"PARAMETER {name} {value}" for name, value in [*values, ("num_ctx", f"{choice.n_ctx}")]]
    return "\n".join(lines) + "\n"


def ollama_notes(choice: Choice, system_prompt: str | None) -> list[str]:
    """List what the user must set, because the Modelfile cannot."""
    notes = []
    if choice.cache_type != "f16":
        notes.append(
            f"Start Ollama's server with OLLAMA_FLASH_ATTENTION=1 and OLLAMA_KV_CACHE_TYPE={choice.cache_type}: "
            "otherwise keys and values are in f16 and take nearly twice the memory."
        )
    if lost := _unsupported(system_prompt or ""):
        notes.append(
            f"The Modelfile has no SYSTEM, because it cannot hold {lost!r} of the system prompt: send the system "
            "prompt as the first message."
        )
    return notes


def _unsupported(text: str) -> str | None:
    """Find the first thing that a Modelfile cannot hold.

    Ollama drops characters that cannot be printed, such as a no-break space, and may end a text at three quotes.
    """
    lost = (sign for sign in text if not sign.isprintable() and sign not in "\n\t")
    return next(lost, '"""' if '"""' in text else None)


def llama_server(gguf_name: str, *, sampling: Sampling, choice: Choice) -> str:
    """Write the command that serves the model with the template inside the GGUF and the sampling of saigakit."""
    words = [f"llama-server -m {gguf_name} -c {choice.n_ctx} --jinja"]
    words += [f"--temp {sampling.temperature:g} --top-p {sampling.top_p:g} --top-k {sampling.top_k} --min-p 0"]
    words += [f"--repeat-penalty {sampling.repeat_penalty:g}"]
    if choice.cache_type != "f16":
        words.append(f"--flash-attn on --cache-type-k {choice.cache_type} --cache-type-v {choice.cache_type}")
    if choice.left_mib < _CACHE_RAM:
        words.append(f"--cache-ram {choice.left_mib}")
    return f"# {choice.in_words()}\n{' '.join(words)}\n"
