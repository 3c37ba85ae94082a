"""Ask the base model, the adapter and the GGUF the questions of the evaluation set, and score their answers."""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from saigakit import infer, registry
from saigakit.config import require_count
from saigakit.core import manifest, workspace
from saigakit.core.display import Progress, Table
from saigakit.core.files import scratch, write_text
from saigakit.data import report
from saigakit.data.conversations import spread
from saigakit.errors import SaigaError
from saigakit.evaluate import metrics, results
from saigakit.prompt import encoding, template, token_view
from saigakit.prompt.backends import gguf_vocabulary
from saigakit.prompt.questions import MARGIN, Question, read_examples
from saigakit.weights import base_files, find, generate, lineage, load, memory
from saigakit.weights.generate import Generated
from saigakit.weights.model_shape import ModelShape

STAGE = "04_infer"
_EXPORTED = "03_merge_gguf"  # export.STAGE, but the packages of that room are not needed here
DISK = 100 * 10**6  # bytes; 240 answers and the plot are under 1 MB
OVERHEAD = 10**9  # bytes; torch, transformers and peft in the child process
Answers = tuple[list[str], Generated]


def compare(
    *,
    model: str,
    run_dir: str | Path,
    adapter: str | None = "02_train",
    base_source: str | None = None,
    max_examples: int = 240,
) -> Path:
    """Run the stage 04_infer: results.json, answers.jsonl and comparison.png, with last answers as references.

    Raises SaigaError before a model is loaded if the GGUF was made from other files or the memory is too small.
    """
    require_count("max_examples", max_examples)
    spec = registry.find(model)
    number_format = load.number_format(spec, gpus := workspace.gpus()[:1])
    load.require_accelerator(spec, base_source, gpus)
    models = Models.of(model, run_dir, adapter, base_source)
    final = Path(run_dir) / STAGE
    identity: dict[str, Any] = {
        "stage": STAGE,
        "parameters": {"model": model, "base_source": base_source, "adapter": adapter, "max_examples": max_examples},
        "inputs": models.inputs,
    }
    if manifest.is_up_to_date(final, **identity):
        return final
    examples = spread(read_examples(models.held_out_file), max_examples)
    chosen = template.formatted_template(models.held_out_file.parent)
    with gguf_vocabulary(models.gguf_file) as vocabulary:
        ends = infer.stop_ids(vocabulary)
    questions = Questions.of(examples, encoding.load_tokenizer(model, base_source, chosen), ends)
    _require_memory(models.base_dir, spec.quantization, questions)
    workspace.require_disk(final, DISK, STAGE)
    with manifest.making(final, facts={"compared": models.files}, **identity) as partial:
        answers = _ask_transformers(questions, models, spec.quantization, number_format)
        answers[models.quant_type] = _ask_gguf(questions, models.gguf_file)
        _write(partial, questions, answers, models.sizes)
    return final


@dataclass(frozen=True)
class Models:
    """The files of the models to compare, which belong together."""

    held_out_file: Path
    base_dir: Path
    adapter_dir: Path | None
    gguf_file: Path
    quant_type: str
    inputs: dict[str, Any]  # hashes of all of them

    @classmethod
    def of(cls, model: str, run_dir: str | Path, adapter: str | None, base_source: str | None) -> Self:
        """Raises SaigaError if the GGUF was made from another base or adapter."""
        spec = registry.find(model)
        format_dir = workspace.find_input(report.STAGE, run_dir=run_dir)
        gguf_dir = workspace.find_input(_EXPORTED, run_dir=run_dir)
        manifest.require_stage(format_dir, report.STAGE, model=model)
        made = manifest.require_stage(gguf_dir, _EXPORTED, model=model)
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
                    f"{gguf_dir} was made from another {name} than {directory or 'none'}, which it would be compared "
                    f"with. Give the {name} of {_EXPORTED}, or run {_EXPORTED} again."
                )
        quant_type = made["parameters"]["quant_type"]
        return cls(format_dir / "held_out.jsonl", base_dir, adapter_dir, gguf_dir / "model.gguf", quant_type, inputs)

    @property
    def files(self) -> dict[str, list[str]]:
        """Names in results.json to the paths that the model was loaded from."""
        before = [str(self.base_dir)]
        after = {} if self.adapter_dir is None else {"after": [*before, str(self.adapter_dir)]}
        return {"before": before, **after, self.quant_type: [str(self.gguf_file)]}

    @property
    def sizes(self) -> list[int]:
        """Bytes of weights, in the order of `files`."""
        base, gguf = base_files.weight_bytes(self.base_dir), self.gguf_file.stat().st_size
        if self.adapter_dir is None:
            return [base, gguf]
        return [base, base + sum(file.stat().st_size for file in self.adapter_dir.glob("adapter_model.*")), gguf]


def _weights(hashes: Mapping[str, str] | None) -> set[str] | None:
    """The hashes of those files in a directory that the logits depend on."""
    if hashes is None:
        return None
    kept = re.compile(r"adapter_model\.(?:safetensors|bin)|(?:adapter_)?config\.json")
    return lineage.weight_hashes(hashes) | {digest for name, digest in hashes.items() if kept.fullmatch(name)}


@dataclass(frozen=True)
class Questions:
    """The questions as ids, the same for all models."""

    examples: list[Question]
    references: list[str]
    tokenizer: encoding.Tokenizer
    prompts: list[list[int]]
    stop_ids: frozenset[int]
    max_new_tokens: int

    @classmethod
    def of(cls, examples: list[Question], tokenizer: encoding.Tokenizer, stop_ids: frozenset[int]) -> Self:
        references = [example.reference(tokenizer) for example in examples]
        prompts = [example.prompt(tokenizer) for example in examples]
        longest = max(len(tokenizer.encode_text(reference)) for reference in references)
        return cls(examples, references, tokenizer, prompts, stop_ids, longest + MARGIN)

    def read(self, answers: Sequence[list[int]]) -> list[str]:
        """The texts of answers, without the stop ids that end them."""
        return [self.tokenizer.decode(ids[:-1] if self.stop_ids & {*ids[-1:]} else ids) for ids in answers]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The last message of each prompt, and the reference."""
        return [(each.messages[-1]["content"], text) for each, text in zip(self.examples, self.references, strict=True)]


def table_about(stage_dir: Path, name: str, hashes: Mapping[str, str]) -> Table | None:
    """The table of the 04_infer next to `stage_dir` if its `name` ("adapter" or "gguf") has these hashes, else None."""
    directory = stage_dir.parent / STAGE
    if not (directory / manifest.NAME).is_file():
        return None
    if manifest.read(directory)["inputs"].get(name) != hashes:
        print(f"{directory} compared another {name}: its results are not in the model card.", flush=True)
        return None
    return results.show_table(results.read(directory))


def _require_memory(base_dir: Path, quantization: registry.Quantization, questions: Questions) -> None:
    """Raises SaigaError if the base and one question do not fit; with more memory, more are answered at once."""
    gpus = workspace.gpus()
    itemsize = 2 if gpus or workspace.cpu_has_bf16() else 4  # at least: the child measures which is faster
    tokens = max(map(len, questions.prompts)) + questions.max_new_tokens
    model = memory.inference_memory(ModelShape.from_config(base_dir), quantization, itemsize, tokens)
    parts = model | {"libraries": OVERHEAD}
    what = f"Answering with {base_dir.name} ({memory.format_parts(parts)})"
    remedy = "Stop other programs that use it, or run 04_infer on a larger machine."
    workspace.require_memory(sum(parts.values()), what, remedy, gpus[0] if gpus else None)


def _ask_transformers(
    questions: Questions, models: Models, quantization: registry.Quantization, number_format: load.NumberFormat
) -> dict[str, Answers]:
    request = generate.Request(
        prompts=questions.prompts,
        stop_ids=sorted(questions.stop_ids),
        max_new_tokens=questions.max_new_tokens,
        base_dir=str(models.base_dir),
        adapter_dir=None if models.adapter_dir is None else str(models.adapter_dir),
        quantization=quantization,
        number_format=number_format,
    )
    with scratch() as directory:
        generated = generate.in_child(request, directory)
    return {name: (questions.read(each.ids), each) for name, each in generated.items()}


def _ask_gguf(questions: Questions, gguf_file: Path) -> Answers:
    with closing(infer.load(gguf_file, n_ctx=256)) as llm:  # `greedy` makes its own context
        tokenizer = encoding.load_gguf_tokenizer(llm)
        if [example.prompt(tokenizer) for example in questions.examples] != questions.prompts:
            raise SaigaError(
                f"{gguf_file} and the base model give different ids for the same prompt: the file was made from "
                "another model or with another chat template. Run 03_merge_gguf again with this model."
            )
        generated = infer.greedy(
            llm,
            questions.prompts,
            stop_ids=questions.stop_ids,
            max_new_tokens=questions.max_new_tokens,
            on_progress=Progress(gguf_file.name),
        )
        return questions.read(generated.ids), generated


def _write(directory: Path, questions: Questions, answers: Mapping[str, Answers], sizes: Sequence[int]) -> None:
    is_call = ["tool_calls" in example.answer for example in questions.examples]
    rows = [
        {
            "name": name,
            "n": len(texts),
            **metrics.shares(texts, questions.references, is_call),
            "tokens_per_s": generated.tokens_per_s,
            "bytes": size,
        }
        for (name, (texts, generated)), size in zip(answers.items(), sizes, strict=True)
    ]
    lines = []
    for index, (question, reference) in enumerate(questions.pairs):
        by_model = {name: texts[index] for name, (texts, _) in answers.items()}
        exact = {name: metrics.is_exact(text, reference) for name, text in by_model.items()}
        line = {"prompt": question, "reference": reference, "answers": by_model, "exact": exact}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_text(directory / "answers.jsonl", "".join(lines))
    raw = {"": questions.prompts[0]} | {name: generated.ids[0] for name, (_, generated) in answers.items()}
    shown = {name: token_view.write(ids, questions.tokenizer) for name, ids in raw.items()}
    write_text(directory / results.RAW_FILE, json.dumps(shown, ensure_ascii=False))
    write_text(directory / results.FILE, json.dumps(rows, indent=2))
    results.plot(rows).savefig(directory / "comparison.png", dpi=110)
