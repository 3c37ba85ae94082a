"""Try a model in a notebook: what it cannot do is shown as a reason, and never stops the notebook."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from saigakit.core.lazy import llama_cpp
from saigakit.errors import SaigaError
from saigakit.infer import engine, tool_calls
from saigakit.infer.extraction import Extraction, extract_all, system_message
from saigakit.infer.guess import guess_schema
from saigakit.prompt import token_view
from saigakit.prompt.questions import Question
from saigakit.prompt.template import Tools

_LONGEST = 400  # tokens of an answer


def show_stream(pieces: Iterable[str]) -> None:
    """Show an answer as it grows, in one output: of `print` an executed notebook keeps a line for each piece."""
    from IPython.display import display

    text = ""
    shown = display({"text/plain": text}, raw=True, display_id=True)
    try:
        for piece in pieces:
            shown.update({"text/plain": (text := text + piece)}, raw=True)
    except SaigaError as error:  # such as a question over the context
        shown.update({"text/plain": f"{text} ({error})"}, raw=True)


def show_extraction(llm: "llama_cpp.Llama", text: str, examples: Sequence[Question]) -> token_view.Marked:
    """The answer to `text` by the schema of the examples' answers, with its quotations marked in the text.

    If they are not JSON, or the answer fails, a free answer and the reason.
    """
    try:
        [(_, found)] = extract_all(llm, [text], guess_schema(examples), max_new_tokens=_LONGEST)
    except SaigaError as error:
        found = error
    if isinstance(found, SaigaError):
        parts = [(f"{text}\n→ {_answer_freely(llm, text)}\n({found})", False)]
    else:
        parts = [*_mark_quotes(text, found), (f"\n→ {json.dumps(found.value, ensure_ascii=False, indent=1)}", False)]
    return token_view.Marked([token_view.mark_parts(parts)])


def _answer_freely(llm: "llama_cpp.Llama", text: str) -> str:
    messages = [*system_message(llm, None), {"role": "user", "content": text}]
    try:
        return "".join(engine.stream(llm, messages, max_new_tokens=_LONGEST))
    except SaigaError:
        return "…"


def _mark_quotes(text: str, found: Extraction) -> Iterator[tuple[str, bool]]:
    position = 0
    for quote in sorted(found.quotes, key=lambda quote: quote["start"]):
        if quote["start"] >= position:  # the next one may stand inside this one
            yield text[position : quote["start"]], False
            yield text[quote["start"] : quote["end"]], True
            position = quote["end"]
    yield text[position:], False


def show_call(llm: "llama_cpp.Llama", question: str, tools: Tools) -> Mapping[str, Any] | str:
    """A call of one of the tools, which the model must make; the reason if it does not end."""
    messages = [{"role": "user", "content": question}]
    try:
        return tool_calls.answer(llm, messages, tools, tool_choice="required", max_calls=1, max_new_tokens=_LONGEST)
    except SaigaError as error:
        return str(error)
