"""Held-out questions to the base model, its adapter and the GGUF: numbers, and what each answered."""

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saigakit import infer, registry
from saigakit.core import manifest, workspace
from saigakit.core.display import Progress
from saigakit.core.files import write_text
from saigakit.data.conversations import spread
from saigakit.data.questions import MARGIN, Example, read_examples
from saigakit.errors import SaigaError
from saigakit.evaluate import metrics, results
from saigakit.prompt import encoding
from saigakit.weights import base_files, find, generate, lineage, memory
from saigakit.weights.generate import Generated

STAGE = "04_infer"
DISK = 100 * 10**6  # bytes; 240 answers and the plot are under 1 MB
OVERHEAD = 10**9  # bytes; torch, transformers and peft in the child
__all__ = ["Asked", "Compared", "Example", "compare", "read_examples"]
Answers = tuple[list[str], Generated]


def compare(
    *,
    model: str,
    run_dir: str | Path,
    adapter: str | None = "02_train",
    base_source: str | None = None,
    max_examples: int = 240,
) -> Path:
    """The stage 04_infer: results.json, answers.jsonl and comparison.png in `run_dir`/04_infer.

    Every held-out conversation is asked up to its last answer, which is the reference; the three models get the
    same ids and the same limit on the answer's length. Raises SaigaError before a model is loaded where the GGUF
    was made of other files, or the memory is too small.
    """
    if isinstance(max_examples, bool) or not isinstance(max_examples, int) or max_examples < 1:
        raise SaigaError(f"max_examples={max_examples!r} must be a whole number of at least 1.")
    compared = Compared.of(model, run_dir, adapter, base_source)
    final = Path(run_dir) / STAGE
    identity: dict[str, Any] = {
        "stage": STAGE,
        "parameters": {"model": model, "base_source": base_source, "adapter": adapter, "max_examples": max_examples},
        "inputs": compared.inputs,
    }
    if manifest.is_up_to_date(final, **identity):
        return final
    examples = spread(read_examples(compared.held_out_file), max_examples)
    asked = Asked.of(examples, encoding.load_tokenizer(model, base_source))
    quantization = registry.find(model).quantization
    _require_memory(compared.base_dir, quantization, asked)
    workspace.require_disk(final, DISK, STAGE)
    with manifest.making(final, facts={"compared": compared.files}, **identity) as partial:
        answers = _ask_transformers(asked, compared, quantization)
        answers[compared.quant_type] = _ask_gguf(asked, compared.gguf_file)
        _write(partial, asked.pairs, answers, compared.sizes)
    return final


@dataclass(frozen=True)
class Compared:
    """The files of the models that answer, known to belong together."""

    held_out_file: Path
    base_dir: Path
    adapter_dir: Path | None
    gguf_file: Path
    quant_type: str
    inputs: dict[str, Any]  # hashes of all of them

    @classmethod
    def of(cls, model: str, run_dir: str | Path, adapter: str | None, base_source: str | None) -> "Compared":
        spec = registry.find(model)
        format_dir = workspace.find_input("01_format", run_dir=run_dir)
        gguf_dir = workspace.find_input("03_merge_gguf", run_dir=run_dir)
        manifest.require_stage(format_dir, "01_format", model=model)
        made = manifest.require_stage(gguf_dir, "03_merge_gguf", model=model)
        base_dir = find.base_dir(spec, base_source)
        adapter_dir = None if adapter is None else find.adapter_dir(spec, adapter, run_dir)
        inputs = {
            "held_out": manifest.hashes(format_dir / "held_out.jsonl"),
            "base": base_files.hashes(base_dir),
            "adapter": None if adapter_dir is None else manifest.hashes(adapter_dir),
            "gguf": made["outputs"],
        }
        for name, directory in (("base", base_dir), ("adapter", adapter_dir)):
            if _weights(made["inputs"][name]) != _weights(inputs[name]):
                raise SaigaError(
                    f"{gguf_dir} was made of another {name} than the one to compare it with, "
                    f"{directory or 'none'}: give {name} as in 03_merge_gguf, or run 03_merge_gguf again."
                )
        quant_type = made["parameters"]["quant_type"]
        return cls(format_dir / "held_out.jsonl", base_dir, adapter_dir, gguf_dir / "model.gguf", quant_type, inputs)

    @property
    def files(self) -> dict[str, list[str]]:
        """What each row of results.json was answered by."""
        before = [str(self.base_dir)]
        after = {} if self.adapter_dir is None else {"after": [*before, str(self.adapter_dir)]}
        return {"before": before, **after, self.quant_type: [str(self.gguf_file)]}

    @property
    def sizes(self) -> list[int]:
        """Bytes that each model loads, in the order of the answers."""
        base = base_files.weight_bytes(self.base_dir)
        adapted = [] if self.adapter_dir is None else [base + _total(self.adapter_dir, "adapter_model.*")]
        return [base, *adapted, self.gguf_file.stat().st_size]


def _weights(hashes: Mapping[str, str] | None) -> set[str] | None:
    """Of what a directory holds, the hashes that the numbers depend on."""
    if hashes is None:
        return None
    kept = re.compile(r"adapter_model\.(?:safetensors|bin)|(?:adapter_)?config\.json")
    return lineage.weights_of(hashes) | {digest for name, digest in hashes.items() if kept.fullmatch(name)}


def _total(directory: Path, pattern: str) -> int:
    return sum(file.stat().st_size for file in directory.glob(pattern))


@dataclass(frozen=True)
class Asked:
    """The questions as ids: one prompt for all models."""

    examples: list[Example]
    references: list[str]
    tokenizer: encoding.Tokenizer
    prompts: list[list[int]]
    stop_ids: frozenset[int]
    max_new_tokens: int

    @classmethod
    def of(cls, examples: list[Example], tokenizer: encoding.Tokenizer) -> "Asked":
        references = [example.reference(tokenizer) for example in examples]
        longest = max(len(tokenizer.encode_text(reference)) for reference in references)
        return cls(
            examples,
            references,
            tokenizer,
            _prompts(examples, tokenizer),
            encoding.end_of_turn_ids(tokenizer),
            longest + MARGIN,
        )

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Of each example what was asked last, and the reference."""
        return [(each.messages[-1]["content"], text) for each, text in zip(self.examples, self.references, strict=True)]


def _prompts(examples: Sequence[Example], tokenizer: encoding.Tokenizer) -> list[list[int]]:
    return [each.prompt(tokenizer) for each in examples]


def _require_memory(base_dir: Path, quantization: registry.Quantization, asked: Asked) -> None:
    """For the base and one text at a time; more memory answers more texts at once."""
    gpus = workspace.gpus()
    itemsize = 2 if gpus or workspace.cpu_has_bf16() else 4  # at least: the child measures which is faster
    tokens = max(map(len, asked.prompts)) + asked.max_new_tokens
    parts = memory.inference(memory.Shape.of(base_dir), quantization, itemsize, tokens)
    what = f"Answering with {base_dir.name} ({memory.in_words(parts)}, {OVERHEAD / workspace.GB:.1f} GB of libraries)"
    needed = sum(parts.values()) + OVERHEAD
    if not gpus:
        workspace.require_memory(needed, what, "Close other programs or run 04_infer on a GPU.")
    elif gpus[0].free < needed:
        raise SaigaError(
            f"{what} needs about {needed / workspace.GB:.1f} GB of GPU memory, and "
            f"{gpus[0].free / workspace.GB:.1f} GB of {gpus[0].name} are free. End what else runs on it."
        )


def _ask_transformers(asked: Asked, compared: Compared, quantization: registry.Quantization) -> dict[str, Answers]:
    request = generate.Request(
        prompts=asked.prompts,
        stop_ids=sorted(asked.stop_ids),
        max_new_tokens=asked.max_new_tokens,
        base_dir=str(compared.base_dir),
        adapter_dir=None if compared.adapter_dir is None else str(compared.adapter_dir),
        quantization=quantization,
    )
    with tempfile.TemporaryDirectory() as scratch:
        made = generate.in_child(request, Path(scratch))
    return {name: ([asked.tokenizer.decode(ids) for ids in found.ids], found) for name, found in made.items()}


def _ask_gguf(asked: Asked, gguf_file: Path) -> Answers:
    with closing(infer.load(gguf_file, n_ctx=256)) as llm:  # `greedy` makes its own context
        tokenizer = encoding.load_gguf_tokenizer(llm)
        if _prompts(asked.examples, tokenizer) != asked.prompts:
            raise SaigaError(
                f"{gguf_file} and the base model give different ids for the same prompt: the file was made of "
                "another model or with another chat template. Run 03_merge_gguf again with this model."
            )
        made = infer.greedy(
            llm,
            asked.prompts,
            stop_ids=asked.stop_ids,
            max_new_tokens=asked.max_new_tokens,
            on_progress=Progress(gguf_file.name),
        )
        return [tokenizer.decode(ids) for ids in made.ids], made


def _write(
    directory: Path, pairs: Sequence[tuple[str, str]], answers: Mapping[str, Answers], sizes: Sequence[int]
) -> None:
    """`pairs`: what was asked last, and the reference."""
    references = [reference for _, reference in pairs]
    rows = [
        {
            "name": name,
            "n": len(texts),
            **metrics.shares(texts, references),
            "tokens_per_s": made.tokens / made.seconds,
            "bytes": size,
        }
        for (name, (texts, made)), size in zip(answers.items(), sizes, strict=True)
    ]
    lines = []
    for index, (question, reference) in enumerate(pairs):
        said = {name: texts[index] for name, (texts, _) in answers.items()}
        exact = {name: metrics.is_exact(text, reference) for name, text in said.items()}
        line = {"prompt": question, "reference": reference, "answers": said, "exact": exact}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_text(directory / "answers.jsonl", "".join(lines))
    write_text(directory / results.FILE, json.dumps(rows, indent=2))
    results.plot(rows).savefig(directory / "comparison.png", dpi=110)
