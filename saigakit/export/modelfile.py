"""Write what other programs need to run a GGUF: Ollama's Modelfile, the llama-server command, Python code."""

import json
import shlex
from dataclasses import asdict
from typing import NamedTuple

from saigakit.errors import SaigaError
from saigakit.export.fit import Choice
from saigakit.registry import Sampling

# The first version that renders a model without TEMPLATE by the chat template inside its GGUF on every endpoint.
# `ollama create` adds a Go template of its own for a chat template that it recognises, but prefers the one in the GGUF
# if only that one has tools (shouldPreferChatTemplate in server/images.go, August 2026), as all of ours do.
OLLAMA_VERSION = "0.30.11"
_CACHE_RAM = 8192  # MiB of RAM that llama-server takes for earlier conversations by default
_PYTHON = """from llama_cpp import {imported}

llm = Llama({name}, n_ctx={n_ctx}, flash_attn=True{cache})
messages = {messages}
answer = llm.create_chat_completion(
    messages, temperature={temperature:g}, top_p={top_p:g}, top_k={top_k}, min_p=0.0, repeat_penalty={repeat_penalty:g}
)
print(answer["choices"][0]["message"]["content"])"""


class RunSettings(NamedTuple):
    """How to load a GGUF and answer with it."""

    name: str  # of the file
    stops: list[str]  # what ends an answer: the token that training taught and the file's EOS
    system_prompt: str | None
    sampling: Sampling
    choice: Choice

    def modelfile(self) -> str:
        """Ollama records REQUIRES without checking it, so a comment names the version too."""
        require_name(self.name)
        notes = [
            f"Needs Ollama {OLLAMA_VERSION} or later.",
            f"Next to {self.name}: ollama create NAME -f Modelfile; then ollama run NAME",
            self.choice.describe(),
            *self.ollama_notes(),
        ]
        lines = [*(f"# {note}" for note in notes), f"FROM ./{self.name}", f"REQUIRES {OLLAMA_VERSION}"]
        if self.system_prompt and _unsupported(self.system_prompt) is None:
            lines.append(f'SYSTEM """{self.system_prompt}"""')
        values = [("stop", f'"{stop}"') for stop in self.stops]
        sampling = asdict(self.sampling).items()
        values += [(name, f"{value:g}" if isinstance(value, float) else f"{value}") for name, value in sampling]
        lines += [f"PARAMETER {name} {value}" for name, value in [*values, ("num_ctx", f"{self.choice.n_ctx}")]]
        return "\n".join(lines) + "\n"

    def ollama_notes(self) -> list[str]:
        """What the user must do, because the Modelfile cannot."""
        notes = []
        if self.choice.cache_type != "f16":
            notes.append(
                f"Start Ollama's server with OLLAMA_FLASH_ATTENTION=1 and OLLAMA_KV_CACHE_TYPE={self.choice.cache_type}"
                ": otherwise the KV cache is in f16 and takes nearly twice the memory."
            )
        if lost := _unsupported(self.system_prompt or ""):
            notes.append(
                f"The Modelfile has no SYSTEM, because it cannot hold {lost!r} of the system prompt: send the system "
                "prompt as the first message."
            )
        return notes

    def llama_server(self) -> str:
        """The command that serves the model with the template in the GGUF and the sampling of saigakit."""
        choice, sampling = self.choice, self.sampling
        words = [f"llama-server -m {shlex.quote(self.name)} -c {choice.n_ctx} --jinja"]
        words += [f"--temp {sampling.temperature:g} --top-p {sampling.top_p:g} --top-k {sampling.top_k} --min-p 0"]
        words += [f"--repeat-penalty {sampling.repeat_penalty:g}"]
        if choice.cache_type != "f16":
            words.append(f"--flash-attn on --cache-type-k {choice.cache_type} --cache-type-v {choice.cache_type}")
        if choice.free_mib < _CACHE_RAM:
            words.append(f"--cache-ram {choice.free_mib}")
        return f"# {choice.describe()}\n{' '.join(words)}\n"

    def python(self) -> str:
        """Code that answers one question with llama-cpp-python."""
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        is_f16 = self.choice.cache_type == "f16"
        return _PYTHON.format(
            name=json.dumps(self.name, ensure_ascii=False),
            imported="Llama" if is_f16 else "GGML_TYPE_Q8_0, Llama",
            cache="" if is_f16 else ", type_k=GGML_TYPE_Q8_0, type_v=GGML_TYPE_Q8_0",
            n_ctx=self.choice.n_ctx,
            messages=json.dumps([*system, {"role": "user", "content": "Привет!"}], ensure_ascii=False),
            **asdict(self.sampling),
        )


def require_name(name: str) -> None:
    """Raises SaigaError for a name that a Modelfile, where nothing escapes a character, or a command cannot hold."""
    if not name.isprintable() or name.startswith("-"):
        raise SaigaError(f"{name!r} cannot be the name of a GGUF file. Leave out special spaces and a first '-'.")


def _unsupported(text: str) -> str | None:
    """The first text that a Modelfile cannot hold: Ollama drops unprintable characters and may stop at three quotes."""
    lost = (character for character in text if not character.isprintable() and character not in "\n\t")
    return next(lost, '"""' if '"""' in text else None)
