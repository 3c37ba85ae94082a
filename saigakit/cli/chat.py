"""A GGUF file and lines of stdin into a conversation on the terminal."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from saigakit import infer
from saigakit.errors import SaigaError
from saigakit.registry import Sampling
from saigakit.weights import lineage
from saigakit.weights.memory import CacheType

if TYPE_CHECKING:
    import llama_cpp

    from saigakit.prompt.template import Message


def talk(
    gguf_file: str | Path,
    *,
    system: str | None = None,
    temperature: float | None = None,
    n_ctx: int,
    cache_type: CacheType = "f16",
) -> None:
    """Until an empty line or the end of stdin. Ctrl-C stops an answer; at the prompt it is a KeyboardInterrupt.

    `system` None: the system prompt that the file was trained with, where it holds one; "": none.
    """
    with closing(infer.load(gguf_file, n_ctx=n_ctx, cache_type=cache_type)) as llm:
        if system is None and (system := llm.metadata.get(lineage.SYSTEM_PROMPT_KEY)):
            print(f"system: {system}", file=sys.stderr, flush=True)
        beginning: list[Message] = [{"role": "system", "content": system}] if system else []
        sampling = Sampling.from_gguf(llm.metadata)
        if temperature is not None:
            sampling = replace(sampling, temperature=temperature)
        history: list[Message] = []
        for question in _questions():
            history = _ask(llm, beginning, history, question, sampling)


def _ask(
    llm: "llama_cpp.Llama", beginning: "list[Message]", history: "list[Message]", question: str, sampling: Sampling
) -> "list[Message]":
    """The history with this question and its answer; where the context has no room for it, without what was before."""
    asked: Message = {"role": "user", "content": question}
    try:
        answer = _answer(llm, [*beginning, *history, asked], sampling)
    except SaigaError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if not history:
            return []
        print("The conversation begins anew with this question.", file=sys.stderr, flush=True)
        return _ask(llm, beginning, [], question, sampling)
    return [*history, asked, {"role": "assistant", "content": answer}]


def _answer(llm: "llama_cpp.Llama", messages: "Sequence[Message]", sampling: Sampling) -> str:
    """Printed as it comes; after a Ctrl-C, what was said before it."""
    said: list[str] = []
    try:
        for piece in infer.stream(llm, messages, sampling=sampling):
            said.append(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" …", end="")
    print(flush=True)
    return "".join(said)


def _questions() -> Iterator[str]:
    """Lines of stdin until an empty one; the prompt is for people only."""
    if sys.stdin.isatty():
        with suppress(ModuleNotFoundError):  # on Windows the terminal does it
            import readline  # noqa: F401  # input() then edits the line
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not line.strip():
            return
        yield line
