"""Compare answers to the evaluation set: free, by a JSON schema, and by the schema with quotations of the text only.

    python benchmarks/extraction.py runs/demo [--texts 200] [--threads 2]

RUN_DIR is that of `saigakit demo`. The schema is guessed from the training records. Before training: the base model,
quantised as the trained one. "grounded": all values of the answer are literal words of the text; an answer that does
not fit the schema is not, and counts as wrong.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import llama_cpp

from saigakit import export, infer
from saigakit.core import manifest
from saigakit.core.display import Table
from saigakit.evaluate import metrics
from saigakit.infer.schema import QUOTE, Schema, find_words
from saigakit.prompt import encoding, questions
from saigakit.prompt.questions import Question


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    print(compare(given.run_dir, count=given.texts, threads=given.threads))


def compare(run_dir: Path, *, count: int, threads: int) -> Table:
    train, held_out = (questions.read_examples(run_dir / "01_format" / f"{part}.jsonl") for part in PARTS)
    quoting = infer.guess_schema(train)
    schema = json.loads(json.dumps(quoting), object_hook=lambda part: part | ({QUOTE: False} if QUOTE in part else {}))
    made, rows = manifest.read(run_dir / "03_merge_gguf"), []
    with tempfile.TemporaryDirectory() as scratch:
        model, quant_type = made["parameters"]["model"], made["parameters"]["quant_type"]
        base = export.to_gguf(model=model, adapter=None, output=Path(scratch) / "base.gguf", quant_type=quant_type)
        for name, file in (("before training", base), ("after", run_dir / "03_merge_gguf" / "model.gguf")):
            with closing(infer.load(file, n_ctx=1024, n_threads=threads)) as llm:
                for way, asked in (("free", None), ("schema", schema), ("schema and quotations", quoting)):
                    start = time.perf_counter()
                    answers = ask(llm, held_out[:count], asked)
                    seconds = time.perf_counter() - start
                    rows.append((f"{name}, {way}", *shares(held_out[:count], answers), f"{seconds:.0f}"))
    header = ("answers", "exact", "F1", "JSON", "grounded", "seconds")
    return Table(header, rows, f"{min(count, len(held_out))} texts of the evaluation set, {quant_type}, greedy.")


PARTS = ("train", "held_out")


def ask(llm: llama_cpp.Llama, asked: Sequence[Question], schema: Schema | None) -> list[str]:
    tokenizer = encoding.load_gguf_tokenizer(llm)
    limit = max(len(tokenizer.encode_text(each.reference(tokenizer))) for each in asked) + questions.MARGIN
    if schema is None:
        prompts, ends = [each.prompt(tokenizer) for each in asked], infer.stop_ids(llm)
        made = infer.greedy(llm, prompts, stop_ids=ends, max_new_tokens=limit, on_progress=lambda *_: None)
        return [tokenizer.decode([token for token in ids if token not in ends]) for ids in made.ids]
    system, texts = str(asked[0].messages[0]["content"]), [user_text(each) for each in asked]
    found = dict(infer.extract_all(llm, texts, schema, system=system, max_new_tokens=limit))
    values = [getattr(found[index], "value", None) for index in range(len(asked))]
    return ["" if value is None else json.dumps(value, ensure_ascii=False) for value in values]


def user_text(question: Question) -> str:
    return str(question.messages[-1]["content"])


def shares(asked: Sequence[Question], answers: Sequence[str]) -> Iterator[str]:
    found = metrics.shares(answers, [str(each.answer["content"]) for each in asked])
    pairs = [(metrics.parse_json(answer), user_text(each)) for each, answer in zip(asked, answers, strict=True)]
    grounded = sum(
        isinstance(value, list) and all(find_words(text, string) >= 0 for string in strings(value))
        for value, text in pairs
    )
    for share in (found["exact"], found["f1"], found["json_valid"], grounded / len(asked)):
        yield f"{100 * share:.1f} %"


def strings(value: Any) -> Iterator[str]:
    """Of lists and objects, without the names of properties."""
    if isinstance(value, str):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from strings(part)


if __name__ == "__main__":
    main()
