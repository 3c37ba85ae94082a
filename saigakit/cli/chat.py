"""Chat with a GGUF file in the terminal, or answer questions from a pipe."""

import json
import os.path
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from saigakit import infer
from saigakit.core import files
from saigakit.core.display import count, printable
from saigakit.core.lazy import llama_cpp
from saigakit.data.records import BadRecord
from saigakit.data.schema import normalise_record
from saigakit.errors import SaigaError
from saigakit.prompt import encoding, template
from saigakit.prompt.template import Message
from saigakit.registry import Sampling
from saigakit.weights import lineage

_Watching = Callable[[], AbstractContextManager[None]]  # during an answer, for Ctrl-C
_HELP = """\
/system TEXT  set the system prompt; without TEXT show it, with "" remove it
/reset        forget the conversation, but not the system prompt
/save FILE    write the conversation as JSON, which is also a record for 01_format
/load FILE    continue a saved conversation
/bye          leave, as Ctrl-D on an empty line does
//TEXT        ask a question that begins with one "/"
Enter sends, Alt-Enter (or Esc, then Enter) adds a line, and a paste is one question. Ctrl-C clears the line or stops
an answer. What you type during an answer is discarded. Your questions are kept in """


def talk(
    gguf_file: str | Path,
    *,
    system: str | None = None,
    temperature: float | None = None,
    chat_template: str | None = None,
    lines: bool = False,
    **loading: Any,  # noqa: ANN401
) -> None:
    """Chat in a terminal; elsewhere stdin is one question, or with `lines` one a line.

    `system`: None is the system prompt stored in the file, "" is none. `loading`: options of `infer.load`.
    """
    given = {"tokenizer.chat_template": template.find_chat_template(chat_template)} if chat_template is not None else {}
    with ExitStack() as stack:
        if is_typed := sys.stdin.isatty():
            from saigakit.cli.line_editor import Editor  # needs prompt_toolkit

            stack.callback((editor := Editor()).drain)  # also if the file cannot be loaded
        llm = stack.enter_context(closing(infer.load(gguf_file, **loading)))
        llm.metadata |= given
        if system is None and (system := llm.metadata.get(lineage.SYSTEM_PROMPT_KEY)):
            _tell(f"system: {system}")
        sampling = Sampling.from_gguf(llm.metadata)
        if temperature is not None:
            sampling = replace(sampling, temperature=temperature)
        chat = _Chat(llm, sampling, system or "", editor.watching if is_typed else None)
        if is_typed:
            stack.enter_context(editor.quiet())
        for text in iter(lambda: editor.read(chat.status), "/bye") if is_typed else _read_piped(lines):
            try:
                _obey(chat, editor.history_file, text) if is_typed else chat.ask(text)
            except (SaigaError, OSError) as error:
                if not is_typed and not lines:
                    raise
                _tell(f"error: {error}")


def _read_piped(lines: bool) -> Iterator[str]:
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    texts = (text.rstrip() for text in (sys.stdin if lines else [sys.stdin.read()]) if text.strip())
    if (first := next(texts, None)) is None:
        raise SaigaError("Standard input is empty: there is no question.")
    return chain([first], texts)


def _tell(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)


class _Chat:
    """A conversation that forgets its oldest turns when the context is full."""

    def __init__(self, llm: "llama_cpp.Llama", sampling: Sampling, system: str, watching: _Watching | None) -> None:
        self._llm, self._sampling, self._watching = llm, sampling, watching
        self.change(system, [])

    def change(self, system: str, turns: Sequence[Message]) -> None:
        """`turns`: questions and answers. Raises SaigaError if the chat template refuses them, and changes nothing."""
        beginning: list[Message] = [{"role": "system", "content": system}] if system else []
        size, tokens = self._llm.n_ctx(), self._count([*beginning, *turns, {"role": "user", "content": "?"}])
        self.status = f"{min(tokens, size):,} of {size:,} tokens; /help lists commands, /bye leaves"
        self.system, self.beginning, self.turns = system, beginning, turns

    def _count(self, messages: Sequence[Message]) -> int:
        tokenizer = encoding.load_gguf_tokenizer(self._llm)
        return len(encoding.encode(messages, tokenizer, add_generation_prompt=True)["input_ids"])

    def ask(self, question: str) -> None:
        """Print the answer and keep both. Raises SaigaError if the question alone leaves no room for an answer."""
        turns = [*self.turns, {"role": "user", "content": question}]
        room = min(512, (size := self._llm.n_ctx()) // 4)
        while (tokens := self._count([*self.beginning, *turns])) > size - room:
            if not (turns := turns[2:]):
                raise SaigaError(
                    f"The question and the system prompt have {tokens:,} tokens, but the context holds {size:,}, "
                    f"{room} of them for the answer. Shorten the question, or start again with a larger --n-ctx."
                )
        if forgotten := (len(self.turns) + 1 - len(turns)) // 2:
            _tell(f"Forgot the {count(forgotten, 'oldest turn')}: the context is full.")
        answer = self._answer([*self.beginning, *turns])
        if self._llm.n_tokens >= size - 1:
            _tell("The answer ends here: the context is full.")
        self.change(self.system, [*turns, {"role": "assistant", "content": answer}])

    def _answer(self, messages: Sequence[Message]) -> str:
        """Print and return the answer, or its beginning if Ctrl-C stops it in a terminal."""
        pieces: list[str] = []
        try:
            with self._watching() if self._watching else nullcontext():
                for piece in infer.stream(self._llm, messages, sampling=self._sampling):
                    pieces.append(piece)
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:
            if not self._watching:
                raise
            pieces.append(" …")
            print(" …", end="")
        print(flush=True)
        return "".join(pieces)


def _obey(chat: _Chat, history_file: Path, text: str) -> None:
    """Run a command, or ask what is none."""
    name, argument = (*text.split(maxsplit=1), "")[:2]
    if not text.startswith("/") or text.startswith("//"):
        chat.ask(text[1:] if text.startswith("//") and text[2:3].strip() else text)
    elif name in ("/help", "/?"):
        _tell(f"{_HELP}{history_file}.")
    elif name == "/system":
        chat.change({"": chat.system, '""': ""}.get(argument, argument), chat.turns)
        _tell(f"system: {chat.system}" if chat.system else "There is no system prompt.")
    elif name == "/reset":
        chat.change(chat.system, [])
    elif name not in ("/save", "/load"):
        raise SaigaError(f"{name!r} is not a command; /help lists them. To ask it as a question, write {'/' + name!r}.")
    elif not argument or (name == "/save" and not chat.turns):
        raise SaigaError("There is nothing to save yet." if argument else f"{name} needs the name of a file.")
    else:
        file = Path(os.path.expanduser(printable(argument)))  # noqa: PTH111  # that of Path raises RuntimeError
        if name == "/load":
            chat.change(*_read_conversation(file))
        else:
            files.require_absent(file)
            record = {"messages": [*chat.beginning, *chat.turns]}
            files.write_text(file, json.dumps(record, ensure_ascii=False) + "\n")  # one line, as in JSONL
        _tell(f"{name[1:]}: {file}, {count(len(chat.turns) // 2, 'turn')}")


def _read_conversation(file: Path) -> tuple[str, list[Message]]:
    """The system prompt, and questions and answers."""
    try:
        found = normalise_record(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise SaigaError(f"{file} is not the JSON of one conversation: {error}.") from None
    problems = found.problems[:3] if isinstance(found, BadRecord) else ("tools: this chat has none",)
    if isinstance(found, BadRecord) or "tools" in found:
        raise SaigaError(f"{file}: {'; '.join(problems)}.")
    turns = found["messages"]
    return turns.pop(0)["content"] if turns[0]["role"] == "system" else "", turns
