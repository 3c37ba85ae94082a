"""Held-out questions to the base model, its adapter and the GGUF: numbers, and what each answered."""

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saigakit import generation, infer, manifest, metrics, models, results, sources, tokenization, workspace
from saigakit.errors import SaigaError
from saigakit.generation import Generated, Progress

STAGE = "04_infer"
MARGIN = 16  # tokens that an answer may be longer than the longest reference
Conversation = list[dict[str, str]]
Example = tuple[Conversation, str]  # what is asked, and the reference answer
Answers = tuple[list[str], Generated]


def compare(
    *,
    model: str,
    run_dir: str | Path,
    adapter: str | None = "02_train",
    base_source: str | None = None,
    max_examples: int = 240,
    output_dir: str | Path | None = None,
) -> Path:
    """The stage 04_infer: results.json, answers.jsonl and comparison.png in `run_dir`/04_infer.

    Every held-out conversation is asked up to its last answer, which is the reference; the three models get the
    same ids and the same limit on the answer's length.
    """
    spec = models.find(model)
    held_out_file = workspace.find_input("01_format/held_out.jsonl", run_dir=run_dir)
    gguf_dir = workspace.find_input("03_merge_gguf", run_dir=run_dir)
    made_gguf = manifest.require_stage(gguf_dir, "03_merge_gguf")
    adapter_dir = None if adapter is None else sources.adapter_dir(spec, adapter, run_dir)
    final = Path(run_dir) / STAGE if output_dir is None else Path(output_dir)
    identity: dict[str, Any] = {
        "stage": STAGE,
        "parameters": {"model": model, "base_source": base_source, "adapter": adapter, "max_examples": max_examples},
        "inputs": {
            "held_out": manifest.hashes(held_out_file),
            "gguf": made_gguf["outputs"],
            "adapter": None if adapter_dir is None else manifest.hashes(adapter_dir),
        },
    }
    if manifest.is_kept(final, **identity):
        return final
    base_dir = sources.base_dir(spec, base_source)
    examples = spread(read_examples(held_out_file), max_examples)
    with manifest.making(final, **identity) as partial:
        asked = Asked.of(examples, tokenization.load_tokenizer(model, base_source))
        answers = _ask_transformers(asked, base_dir, adapter_dir, spec.quantization, partial)
        answers[made_gguf["parameters"]["quant_type"]] = _ask_gguf(asked, gguf_dir / "model.gguf")
        _write(partial, examples, answers, _sizes(base_dir, adapter_dir, gguf_dir / "model.gguf"))
    return final


def read_examples(file: Path) -> list[Example]:
    """Each conversation up to its last answer, and that answer."""
    found: list[Example] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        messages = json.loads(line)["messages"]
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=0)
        if last:
            found.append((messages[:last], messages[last]["content"]))
    if not found:
        raise SaigaError(f"{file} holds no conversation with an answer: nothing can be compared.")
    return found


def spread(examples: list[Example], count: int) -> list[Example]:
    """At most `count`, evenly over the file, which may be sorted by kind."""
    taken = min(count, len(examples))
    return [examples[index * len(examples) // taken] for index in range(taken)]


@dataclass(frozen=True)
class Asked:
    """The questions as ids: one prompt for all models."""

    examples: list[Example]
    tokenizer: tokenization.Tokenizer
    prompts: list[list[int]]
    stop_ids: frozenset[int]
    max_new_tokens: int

    @classmethod
    def of(cls, examples: list[Example], tokenizer: tokenization.Tokenizer) -> "Asked":
        longest = max(len(tokenizer.encode_text(reference)) for _, reference in examples)
        return cls(
            examples,
            tokenizer,
            _prompts(examples, tokenizer),
            tokenization.end_of_turn_ids(tokenizer),
            longest + MARGIN,
        )


def _prompts(examples: Sequence[Example], tokenizer: tokenization.Tokenizer) -> list[list[int]]:
    return [
        tokenization.encode(messages, tokenizer, add_generation_prompt=True)["input_ids"] for messages, _ in examples
    ]


def _ask_transformers(
    asked: Asked, base_dir: Path, adapter_dir: Path | None, quantization: models.Quantization, scratch: Path
) -> dict[str, Answers]:
    request = generation.Request(
        prompts=asked.prompts,
        stop_ids=sorted(asked.stop_ids),
        max_new_tokens=asked.max_new_tokens,
        base_dir=str(base_dir),
        adapter_dir=None if adapter_dir is None else str(adapter_dir),
        quantization=quantization,
    )
    made = generation.in_child(request, scratch)
    return {name: ([asked.tokenizer.decode(ids) for ids in found.ids], found) for name, found in made.items()}


def _ask_gguf(asked: Asked, gguf_file: Path) -> Answers:
    with closing(infer.load(gguf_file, n_ctx=256)) as llm:  # `greedy` makes its own context
        tokenizer = tokenization.load_gguf_tokenizer(llm)
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


def _write(directory: Path, examples: Sequence[Example], answers: Mapping[str, Answers], sizes: Sequence[int]) -> None:
    references = [reference for _, reference in examples]
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
    for index, (messages, reference) in enumerate(examples):
        said = {name: texts[index] for name, (texts, _) in answers.items()}
        exact = {name: metrics.is_exact(text, reference) for name, text in said.items()}
        line = {"prompt": messages[-1]["content"], "reference": reference, "answers": said, "exact": exact}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    manifest.write_text(directory / "answers.jsonl", "".join(lines))
    manifest.write_text(directory / "results.json", json.dumps(rows, indent=2))
    results.plot(rows).savefig(directory / "comparison.png", dpi=110)


def _sizes(base_dir: Path, adapter_dir: Path | None, gguf_file: Path) -> list[int]:
    """Bytes that each model loads, in the order of the answers."""
    base = _total(base_dir, "*.safetensors") or _total(base_dir, "*.bin")
    adapted = [] if adapter_dir is None else [base + _total(adapter_dir, "adapter_model.*")]
    return [base, *adapted, gguf_file.stat().st_size]


def _total(directory: Path, pattern: str) -> int:
    return sum(file.stat().st_size for file in directory.glob(pattern))
