"""Extract from the texts of a file into a file, and go on where an earlier call was stopped."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saigakit.core.display import Progress
from saigakit.core.files import explaining, lock_file
from saigakit.core.lazy import llama_cpp
from saigakit.errors import SaigaError
from saigakit.infer.extraction import Extraction, extract_all, validator
from saigakit.infer.schema import AnySchema, Schema, find_quotes, read_schema

_TEXTS_AT_ONCE = 64  # answers of which are lost at most when the process is killed


def extract_file(
    llm: "llama_cpp.Llama",
    schema: AnySchema,
    texts_file: Path,
    output: Path,
    *,
    quotes: Sequence[str] = (),
    system: str | None = None,
    max_new_tokens: int | None = None,
) -> dict[str, int]:
    """Append a line for each text that has none in `output`: {"index", "value", "quotes"} or {"index", "error"}.

    `texts_file`: JSON lines, each a string or an object with the string "text". Returns how many lines are of which
    kind. Raises SaigaError if `output` holds answers to other texts or by another schema.
    """
    try:
        lines = texts_file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise SaigaError(f"{texts_file} is not UTF-8 at byte {error.start}: save it as UTF-8.") from None
    texts = [_read_text(line) for line in lines if line.strip()]
    with explaining(output), lock_file(output.with_name(f".{output.name}.lock"), output, 5.0):
        kinds = _read_done(output, schema, quotes, texts)
        left = [index for index in range(len(texts)) if index not in kinds]
        on_progress = Progress(output.name)
        with output.open("a", encoding="utf-8") as target:
            for first in range(0, len(left), _TEXTS_AT_ONCE):
                some = left[first : first + _TEXTS_AT_ONCE]
                asked = [texts[index] or "" for index in some]
                found = extract_all(llm, asked, schema, quotes=quotes, system=system, max_new_tokens=max_new_tokens)
                for position, answer in found:
                    index = some[position]
                    line = _line(index, answer if texts[index] is not None else SaigaError(_NO_TEXT))
                    kinds[index] = "value" if "value" in line else "error"
                    target.write(json.dumps(line, ensure_ascii=False) + "\n")
                    target.flush()
                    on_progress(len(kinds), len(texts))
    return {kind: list(kinds.values()).count(kind) for kind in ("value", "error")}


_NO_TEXT = 'The line is neither a JSON string nor an object with the string "text".'


def _read_text(line: str) -> str | None:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None
    text = content.get("text") if isinstance(content, dict) else content
    return text if isinstance(text, str) else None


def _line(index: int, answer: Extraction | SaigaError) -> dict[str, Any]:
    if isinstance(answer, SaigaError):
        return {"index": index, "error": str(answer)}
    return {"index": index, "value": answer.value, "quotes": answer.quotes}


def _read_done(output: Path, schema: AnySchema, quotes: Sequence[str], texts: Sequence[str | None]) -> dict[int, str]:
    """The kind of each line; half a line at the end, of a process that was killed, is removed."""
    if not output.is_file():
        return {}
    content = output.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    marked = read_schema(schema, quotes)
    try:
        lines = [json.loads(line) for line in whole.decode("utf-8").split("\n")[:-1]]
        is_ours = all(_is_answer(line, texts[line["index"]], marked) for line in lines)
    except (ValueError, LookupError, TypeError):
        is_ours = False
    if not is_ours:
        raise SaigaError(
            f"{output} holds something else than answers to these texts by this schema. Give another --output, or "
            "move it away."
        )
    if len(whole) < len(content):
        print(f"{output}: half a line at the end is removed; its text is asked again.", flush=True)
        with output.open("r+b") as target:
            target.truncate(len(whole))
    return {line["index"]: "value" if "value" in line else "error" for line in lines}


def _is_answer(line: dict[str, Any], text: str | None, schema: Schema) -> bool:
    if "value" not in line:
        return isinstance(line["error"], str)
    fits = text is not None and validator(schema).is_valid(line["value"])
    return fits and find_quotes(schema, line["value"], str(text)) == line["quotes"]
