"""Measure how much importance matrices computed from different texts improve each quant type.

python benchmarks/imatrix.py [--adapter 02_train] [--records 40] [--sentences 12] [--tokens 20000] [--types Q4_K_M …]

On SmolLM2-135M, merged with `--adapter` where one is given. Each file is compared with the same model in float16, on
the answers in the demo's evaluation set (trained tokens) and on Russian sentences (usage examples in the Wiktionary's
WordNet, all tokens). The matrices are computed from the demo's training records, from other such sentences, and from
Python's language reference, which comes with every Python (pydoc_data). The hidden size 576 is not a multiple of 256,
which k-quants require; the last table lists the types that the tensors got.
"""

import argparse
import random
import re
import sqlite3
import tempfile
from collections import Counter
from contextlib import closing
from pathlib import Path
from pydoc_data.topics import topics

from saigakit import data, export
from saigakit.core.display import Table
from saigakit.data.conversations import spread
from saigakit.demo import packages, wordnet_records
from saigakit.export import quality
from saigakit.llamacpp import imatrix, quantization
from saigakit.prompt import encoding

MODEL = "smollm2_135m"
QUANT_TYPES = ("Q4_K_M", "Q4_K_S", "Q4_0", "IQ4_XS", "Q3_K_M", "Q2_K")
LENGTH = 256  # tokens in a row of plain text


def russian_sentences() -> list[str]:
    """Read usage examples from literature and newspapers, in random order."""
    file = packages.package_file(packages.WORDNET)
    with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as database:
        rows = database.execute("SELECT definition FROM synsets ORDER BY synset_id").fetchall()
    plain = (re.sub(r"\{\{выдел\|([^{}|]*)\}\}", r"\1", text) for (text,) in rows)
    found = {each.strip() for text in plain for each in re.findall(r"\{\{пример\|([^{}|\[\]<>]{60,300})", text)}
    return random.Random(5).sample(sorted(found), len(found))


def english_paragraphs() -> list[str]:
    found = [text for topic in topics.values() for text in topic.split("\n\n") if len(text) > 60]
    return random.Random(5).sample(found, len(found))


def fill_rows(texts: list[str], tokenizer: encoding.FastTokenizer, tokens: int) -> list[list[int]]:
    """Fill rows of LENGTH with the first `tokens` tokens of the texts."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer.encode_text(text + "\n")
        if len(ids) >= tokens:
            break
    return [ids[first : first + LENGTH] for first in range(0, tokens, LENGTH)]


def export_gguf(directory: Path, adapter: str | None, quant_type: str, name: str, importance: Path | None) -> Path:
    output = directory / f"{quant_type}.{name}.gguf"
    return export.to_gguf(model=MODEL, adapter=adapter, output=output, quant_type=quant_type, importance=importance)


def count_types(file: Path) -> str:
    """Count the matrices of each tensor type."""
    import gguf

    types = Counter(x.tensor_type.name for x in gguf.GGUFReader(file).tensors if len(x.shape) == 2)
    return ", ".join(f"{count} {name}" for name, count in types.most_common())


def quality_table(measured: dict[tuple[str, str], quality.Quality], title: str) -> Table:
    """Show the quality of each type without a matrix and with each one, with the relative change in divergence."""
    rows = []
    for quant_type in dict.fromkeys(quant_type for quant_type, _ in measured):
        plain, *others = (found for (name, _), found in measured.items() if name == quant_type)
        cells = [f"{plain.perplexity:.3f}", f"{plain.divergence:.4f}", f"{100 * plain.same_top:.1f}"]
        for found in others:
            gain = 1 - found.divergence / plain.divergence
            cells += [f"{found.perplexity:.3f}", f"{found.divergence:.4f} ({-100 * gain:+.0f} %)"]
            cells += [f"{100 * found.same_top:.1f}"]
        rows.append((quant_type, *cells))
    names = [name for _, name in measured][: len(rows[0]) // 3]
    header = ("type", *(f"{what} {name}" for name in names for what in ("PPL", "KL", "top")))
    first = next(iter(measured.values()))
    return Table(
        header, rows, f"{title}: {first.tokens} tokens, perplexity of float16 {first.reference_perplexity:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--adapter", help="adapter to merge into the model first")
    parser.add_argument("--records", type=int, default=40, help="records of the evaluation set to compare on")
    parser.add_argument("--sentences", type=int, default=12, help="rows of Russian sentences to compare on")
    parser.add_argument("--tokens", type=int, default=20_000, help="tokens from which each matrix is computed")
    parser.add_argument("--types", nargs="+", default=QUANT_TYPES, choices=quantization.QUANT_TYPES)
    options = parser.parse_args()
    tokenizer, records, sentences = (
        encoding.load_tokenizer(MODEL),
        wordnet_records.packaged_records(),
        russian_sentences(),
    )
    train, held_out = (
        [row for rows in encoding.encode_rows(data.read_conversations(records / name), tokenizer) for row in rows]
        for name in ("train.jsonl", "held_out.jsonl")
    )
    half = len(sentences) // 2
    texts = fill_rows(sentences[:half], tokenizer, LENGTH * options.sentences)
    held = {
        "answers in the evaluation set": spread(held_out, options.records),
        "Russian sentences": [{"input_ids": ids, "labels": ids} for ids in texts],
    }
    sources = {
        "records": [row["input_ids"] for row in train],
        "Russian": fill_rows(sentences[half:], tokenizer, options.tokens),
        "English": fill_rows(english_paragraphs(), tokenizer, options.tokens),
    }
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        reference = export_gguf(directory, options.adapter, "F16", "reference", None)
        matrices: dict[str, Path | None] = {"none": None}
        for name, rows in sources.items():
            sample = spread(rows, len(rows) * options.tokens // sum(map(len, rows)) + 1)
            made = imatrix.compute_importance(reference, sample, dataset=name)
            matrices[name] = made.write(directory / f"{name}.gguf")
        measured: dict[str, dict[tuple[str, str], quality.Quality]] = {name: {} for name in held}
        types, gigabytes = {}, {}
        for quant_type in options.types:
            for name, matrix in matrices.items():
                file = export_gguf(directory, options.adapter, quant_type, name, matrix)
                for title, rows in held.items():
                    measured[title][quant_type, name] = quality.compare_files(reference, file, rows)
                    print(f"{quant_type:7} {name:8} {title}: {measured[title][quant_type, name]}", flush=True)
                types[quant_type, name], gigabytes[quant_type, name] = count_types(file), file.stat().st_size / 1e6
                file.unlink()
            for title, found in measured.items():  # after each type, so that an interrupted run has shown its tables
                print(f"\n{quality_table(found, title)}", flush=True)
    shown = [(quant_type, f"{gigabytes[quant_type, name]:.1f}", types[quant_type, name]) for quant_type, name in types
             if name in ("none", "records")]  # fmt: skip
    print(f"\n{Table(('type', 'MB', 'tensor types, first without and then with a matrix'), shown)}")


if __name__ == "__main__":
    main()
