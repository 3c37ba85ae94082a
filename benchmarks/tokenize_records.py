"""Measure how fast a large file of dialogues is checked, tokenised and packed, and how much memory that takes.

python benchmarks/tokenize_records.py [--dialogues 1000000] [--tokenizer-model tokenizer.model] [--check]

Speed is compared on the first dialogues, in alternating rounds, with the tokenizers library encoding complete texts in
bulk and with one call per row, as in `datasets.map` of the 2023 tutorial. Then the complete file is read, tokenised and
packed in a separate process. With --check, the complete 01_format with its report follows in another process, on
SmolLM2's vocabulary. The texts are definitions from the Russian WordNet in random order.
"""

import argparse
import json
import os
import random
import resource
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "true"
import tokenizers

from saigakit import data
from saigakit.core.display import Table
from saigakit.data import report, rows
from saigakit.demo import wordnet_records
from saigakit.prompt import encoding, template
from saigakit.registry import MODELS
from saigakit.train.steps import assign_packs
from saigakit.weights import find

COMPARED, ROUNDS = 20_000, 5
CONTEXT = 2048
BULK = 1000  # texts in one call of the library


def write_dialogues(file: Path, count: int) -> None:
    """Write random dialogues of about 2 KB each, most of it in the question."""
    sentences = [f"{term} — это {definition}. " for term, definition in wordnet_records.definitions()]
    rng = random.Random(0)
    with file.open("w", encoding="utf-8") as stream:
        for _ in range(count):
            messages = [
                {"role": "system", "content": MODELS["saiga2_7b"].system_prompt},
                {"role": "user", "content": "Найди термины: " + "".join(rng.choices(sentences, k=rng.randint(8, 22)))},
                {"role": "assistant", "content": "".join(rng.choices(sentences, k=rng.randint(1, 6)))},
            ]
            stream.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def load_tokenizers(tokenizer_model: str | None):
    """Return (the library's tokenizer, ours on top of it)."""
    if tokenizer_model:
        raw = encoding.from_sentencepiece(Path(tokenizer_model))
        chat_template = template.read_chat_template(MODELS["saiga2_7b"], Path())
        return raw, encoding.FastTokenizer(raw, chat_template, {"bos_token": "<s>", "eos_token": "</s>"})
    directory = find.tokenizer_dir(MODELS["smollm2_135m"])
    raw = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    return raw, encoding.load_tokenizer("smollm2_135m")


def encode_in_bulk(raw, texts):
    for start in range(0, len(texts), BULK):
        for found in raw.encode_batch_fast(texts[start : start + BULK], add_special_tokens=False):
            yield found.ids


def encode_row_by_row(raw, texts):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    for text in texts:
        row = tokenizer(text, truncation=True, max_length=CONTEXT, padding=False, add_special_tokens=False)
        row["labels"] = row["input_ids"].copy()
        yield row["input_ids"]


def compare(file: Path, tokenizer_model: str | None):
    """Return (seconds of each method in each round, number of tokens, bytes of text)."""
    raw, ours = load_tokenizers(tokenizer_model)
    conversations = data.read_conversations(file)
    texts = [template.render(each["messages"], ours.chat_template) for each in conversations]
    ways = {
        "in bulk": lambda: encode_in_bulk(raw, texts),
        "saigakit": lambda: (
            row["input_ids"] for item in rows.encode_fitting(conversations, ours, 10**6, name="") for row in item.rows
        ),
        "row by row": lambda: encode_row_by_row(raw, texts),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        tokens = {}
        for name, way in ways.items():
            start = time.perf_counter()
            tokens[name] = sum(map(len, way()))
            seconds[name].append(time.perf_counter() - start)
        assert tokens["in bulk"] == tokens["saigakit"], tokens
    return seconds, tokens["saigakit"], sum(len(text.encode()) for text in texts)


def tokenise_and_pack(file: Path, tokenizer_model: str | None):
    """Return (name, seconds, peak resident MB so far) of each step, and a note."""
    done = []

    def step(name, act):
        start = time.perf_counter()
        made = act()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        done.append((name, f"{time.perf_counter() - start:.0f}", f"{peak:.0f}"))
        return made

    ours = step("loading the tokenizer", lambda: load_tokenizers(tokenizer_model)[1])
    conversations = step("reading and checking", lambda: data.read_conversations(file))
    stored = step("tokenising", lambda: rows.tokenise(conversations, ours, CONTEXT, name=file.name))
    lengths = rows.read_column(stored, "length")
    packs = step("packing", lambda: pack_steps(lengths))
    filled = sum(lengths) / len(packs) / CONTEXT
    note = f"{len(stored):,} rows, {sum(lengths):,} tokens, {len(packs):,} packs of {CONTEXT}, {filled:.1%} full."
    return done, note


def check_records(file: Path, directory: Path):
    """Run 01_format, split, audit and near-duplicates included; return (seconds, peak resident MB)."""
    start = time.perf_counter()
    report.check_records(model="smollm2_135m", records=str(file), run_dir=directory, max_seq_length=CONTEXT)
    return time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def pack_steps(lengths, batch_size=16):
    batches = (lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size))
    return [pack for step in batches for pack in assign_packs(step, budget=CONTEXT, processes=1)[0]]


def run_alone(measure, *arguments):
    """Run in a separate process, so that the peak memory is that of the measurement."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dialogues", type=int, default=COMPARED)
    parser.add_argument("--tokenizer-model", help="a tokenizer.model of Llama 2; by default SmolLM2's tokenizer.json")
    parser.add_argument("--check", action="store_true", help="also run the complete 01_format")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "dialogues.jsonl"
        write_dialogues(file, given.dialogues)
        size = file.stat().st_size
        first = Path(directory) / "first.jsonl"
        with file.open("rb") as stream:
            first.write_bytes(b"".join(islice(stream, COMPARED)))
        seconds, tokens, size_compared = run_alone(compare, first, given.tokenizer_model)
        bulk = statistics.median(seconds["in bulk"])
        table = []
        for name, measured in seconds.items():
            ratios = sorted(other / own for own, other in zip(measured, seconds["in bulk"], strict=True))
            middle = statistics.median(measured)
            speed = (f"{size_compared / middle / 1e6:.2f}", f"{tokens / middle / 1e6:.2f}")
            table.append((name, *speed, f"{bulk / middle:.2f}", f"{ratios[0]:.2f} to {ratios[-1]:.2f}"))
        header = ("method", "MB/s", "M tokens/s", "relative to in bulk", "in single rounds")
        print(Table(header, table, f"At most {COMPARED:,} dialogues, {ROUNDS} rounds, {os.cpu_count()} cores."), "\n")
        done, note = run_alone(tokenise_and_pack, file, given.tokenizer_model)
        print(Table((f"{given.dialogues:,} dialogues, {size / 1e9:.2f} GB", "s", "peak MB"), done, note))
        if given.check:
            spent, peak = run_alone(check_records, file, Path(directory) / "run")
            print(f"\nThe complete 01_format: {spent:.0f} s, peak memory {peak:.0f} MB.")


if __name__ == "__main__":
    main()
