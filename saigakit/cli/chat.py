"""Chat with a GGUF file in the terminal."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

from saigakit import infer
from saigakit.core.display import printable
from saigakit.core.lazy import llama_cpp
from saigakit.errors import SaigaError
from saigakit.prompt.template import Message
from saigakit.registry import Sampling
from saigakit.weights import lineage
from saigakit.weights.memory import CacheType


def talk(
    gguf_file: str | Path,
    *,
    system: str | None = None,
    temperature: float | None = None,
    n_ctx: int,
    cache_type: CacheType = "f16",
) -> None:
    """Answer questions from stdin until an empty line or its end. Ctrl-C stops an answer, and at the prompt raises.

    `system`: None is the system prompt stored in the file, "" is none.
    """
    with closing(infer.load(gguf_file, n_ctx=n_ctx, cache_type=cache_type)) as llm:
        if system is None and (system := llm.metadata.get(lineage.SYSTEM_PROMPT_KEY)):
            print(f"system: {printable(system)}", file=sys.stderr, flush=True)
        beginning: list[Message] = [{"role": "system", "content": system}] if system else []
        sampling = Sampling.from_gguf(llm.metadata)
        if temperature is not None:
            sampling = replace(sampling, temperature=temperature)
        history: list[Message] = []
        for question in _read_questions():
            history = _ask(llm, beginning, history, question, sampling)


def _ask(
    llm: "llama_cpp.Llama", beginning: list[Message], history: list[Message], question: str, sampling: Sampling
) -> list[Message]:
    """Return the new history; if the context is full, forget the earlier one and ask again."""
    asked: Message = {"role": "user", "content": question}
    try:
        answer = _stream_answer(llm, [*beginning, *history, asked], sampling)
    except SaigaError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)
        if not history:
            return []
        print("Starting a new conversation with this question.", file=sys.stderr, flush=True)
        return _ask(llm, beginning, [], question, sampling)
    return [*history, asked, {"role": "assistant", "content": answer}]


def _stream_answer(llm: "llama_cpp.Llama", messages: Sequence[Message], sampling: Sampling) -> str:
    """Print and return the answer, or its beginning if Ctrl-C stops it."""
    pieces: list[str] = []
    try:
        for piece in infer.stream(llm, messages, sampling=sampling):
            pieces.append(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" …", end="")
    print(flush=True)
    return "".join(pieces)


def _read_questions() -> Iterator[str]:
    """Yield lines until an empty one, with a prompt if stdin is a terminal."""
    if sys.stdin.isatty():
        with suppress(ModuleNotFoundError):  # Windows terminals have line editing of their own
            import readline  # noqa: F401  # enables line editing in input()
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    with suppress(EOFError):
        while (line := input("> " if sys.stdin.isatty() else "")).strip():
            yield line
