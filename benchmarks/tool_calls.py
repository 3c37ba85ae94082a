"""Compare function calls of the evaluation set: written freely, and held to the form and the schemas of the tools.

    python benchmarks/tool_calls.py runs/demo_tools [--texts 120] [--threads 2]

RUN_DIR is that of `saigakit demo --task tools`. "exact calls": of the requests that are due calls, those with the same
functions and arguments. "no undue call": of the others, those that are answered with a text.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import llama_cpp

from saigakit import infer
from saigakit.core.display import Table
from saigakit.data.conversations import spread
from saigakit.errors import SaigaError
from saigakit.infer import tool_calls, tool_form
from saigakit.prompt import questions
from saigakit.prompt.questions import Question
from saigakit.registry import Sampling

GREEDY, LONGEST = Sampling(temperature=0.0), 160


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--texts", type=int, default=120)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    asked = spread(questions.read_examples(given.run_dir / "01_format" / "held_out.jsonl"), given.texts)
    file, rows = given.run_dir / "03_merge_gguf" / "model.gguf", []
    with closing(infer.load(file, n_ctx=1024, n_threads=given.threads)) as llm:
        for name, answer in (("free", answer_freely), ("held", answer_held)):
            start = time.perf_counter()
            found = [answer(llm, each) for each in asked]
            rows.append((name, *shares(asked, found), f"{time.perf_counter() - start:.0f}"))
    note = f"{len(asked)} requests of the evaluation set, greedy, one at a time."
    print(Table(("calls", "exact calls", "no undue call", "seconds"), rows, note))


def answer_held(llm: llama_cpp.Llama, asked: Question) -> Sequence[Any] | None:
    """The calls, [] for a text, None for what cannot be read."""
    try:
        return read(infer.answer(llm, asked.messages, json.loads(asked.tools or "[]"), max_new_tokens=LONGEST))
    except SaigaError:  # a call without an end
        return None


def answer_freely(llm: llama_cpp.Llama, asked: Question) -> Sequence[Any] | None:
    pieces = infer.stream(llm, asked.messages, tools=json.loads(asked.tools or "[]"), sampling=GREEDY)
    written, form = "".join(pieces), tool_form.read_form(llm).unmarked({})
    schemas = tool_calls.read_schemas(json.loads(asked.tools or "[]"), tool_form.json_rules)[1]
    try:
        return read(tool_calls.read_answer(form, written, schemas, asked.messages))
    except (SaigaError, TypeError):  # such as a name that is a list
        return None


def read(message: Mapping[str, Any]) -> Sequence[Any]:
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    return [(call["name"], json.loads(call["arguments"])) for call in calls]


def shares(asked: Sequence[Question], found: Sequence[Sequence[Any] | None]) -> tuple[str, str]:
    pairs = [(read(each.answer), calls) for each, calls in zip(asked, found, strict=True)]
    exact = [calls == due for due, calls in pairs if due]
    silent = [calls == [] for due, calls in pairs if not due]
    return tuple(f"{100 * sum(each) / len(each):.1f} %" for each in (exact, silent))  # type: ignore[return-value]


if __name__ == "__main__":
    main()
