"""Measure what quantising costs on the evaluation set, by quant type."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeAlias

from saigakit.core import manifest, workspace
from saigakit.core.display import Every, Table
from saigakit.core.files import scratch, sha256, write_text
from saigakit.core.lazy import np
from saigakit.data import sources
from saigakit.data.conversations import spread
from saigakit.data.rows import read_column
from saigakit.errors import SaigaError
from saigakit.export import calibration, markdown, model_card
from saigakit.export.gguf_export import Export, output_files
from saigakit.export.merge_plan import MergePlan
from saigakit.export.stage import STAGE as EXPORT_STAGE
from saigakit.export.stage import write_gguf
from saigakit.llamacpp import forward
from saigakit.prompt.encoding import IGNORE_INDEX, Example

Row: TypeAlias = "np.ndarray[tuple[int, ...], np.dtype[Any]]"
STAGE, _MEASURED = "03_quality", "quality.json"
_REFERENCES = ("F16", "Q8_0")  # the best one that there is room for
_AT_ONCE = 32  # positions whose probabilities are in memory: a few times 16 MB for a vocabulary of 128,000


class Quality(NamedTuple):
    """How far a file is from its reference, over the trained tokens of the rows."""

    tokens: int
    perplexity: float
    reference_perplexity: float
    divergence: float  # mean Kullback-Leibler divergence from the reference, in nats per token
    same_top: float  # share of positions where both give the same token the highest probability


def compare_files(
    reference: Path,
    gguf_file: Path,
    rows: Sequence[Example],
    *,
    max_tokens: int = 20_000,
    n_gpu_layers: int = 0,
) -> Quality:
    """Run both models over `rows` until `max_tokens` labels other than IGNORE_INDEX are compared; keeps no logits."""
    length = max((len(row["input_ids"]) for row in rows), default=0)
    totals, tokens, is_due = [0.0] * 4, 0, Every()
    with ExitStack() as stack:
        expected, actual = (
            stack.enter_context(forward.open_model(file, n_ctx=length, n_gpu_layers=n_gpu_layers))
            for file in (reference, gguf_file)
        )
        if expected.vocabulary != actual.vocabulary:
            raise SaigaError(
                f"{actual.file} has a vocabulary of {actual.vocabulary} tokens and {expected.file} one of "
                f"{expected.vocabulary}: they are not the same model."
            )
        for row in rows:
            for found in _compare_logits(expected, actual, row):
                totals = [before + float(values.sum()) for before, values in zip(totals, found, strict=True)]
                tokens += len(found[0])
            if tokens >= max_tokens:
                break
            if is_due():
                print(f"{gguf_file.name}: {tokens} tokens compared", flush=True)
    if not tokens:
        raise SaigaError("The rows have no trained tokens, so there is nothing to compare.")
    reference_loss, loss, divergence, same_top = (total / tokens for total in totals)
    return Quality(tokens, math.exp(loss), math.exp(reference_loss), divergence, same_top)


def _compare_logits(reference: forward.Forward, model: forward.Forward, row: Example) -> Iterator[tuple[Row, ...]]:
    """For _AT_ONCE positions at a time: both losses, the divergence, and whether the top token is the same."""
    ids, labels = row["input_ids"], row["labels"]
    following = [*labels[1:], IGNORE_INDEX]  # what each position predicts
    wanted = [label != IGNORE_INDEX for label in following]
    targets = np.array([label for label in following if label != IGNORE_INDEX])
    done = 0
    for blocks in zip(reference.logits(ids, wanted), model.logits(ids, wanted), strict=True):
        for first in range(0, len(blocks[0]), _AT_ONCE):
            logs = [_log_probabilities(block[first : first + _AT_ONCE]) for block in blocks]
            positions = np.arange(len(logs[0]))
            losses = [-log[positions, targets[done : done + len(positions)]] for log in logs]
            tops = [log.argmax(axis=1) for log in logs]
            divergence = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=1, dtype=np.float64)
            done += len(positions)
            yield *losses, divergence, tops[0] == tops[1]


def _log_probabilities(logits: Row) -> Row:
    shifted: Row = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return shifted


def measure_quality(
    stage_dir: str | Path,
    *,
    quant_types: Sequence[str] = (),
    importance: Path | None = None,
    max_tokens: int = 500,
    n_gpu_layers: int = 0,
) -> Table | None:
    """Measure what quantising cost a finished 03_merge_gguf, on the answers in the evaluation set of 01_format.

    Further `quant_types` and a reference are made in the scratch directory. Makes 03_quality, with a model card; or
    prints why not and returns None.
    """
    stage = Path(stage_dir)
    content, records = manifest.require_stage(stage, EXPORT_STAGE), sources.formatted_records("held_out", stage.parent)
    if not max_tokens:
        return _skip("quality_tokens is 0.")
    if records is None:
        return _skip(f"there is no 01_format/held_out.jsonl in {stage.parent} or attached.")
    final = stage.parent / STAGE
    identity: dict[str, Any] = {
        "stage": STAGE,
        "parameters": {"max_tokens": max_tokens, "quant_types": list(quant_types)},
        "inputs": {
            "gguf": content["outputs"],
            "held_out": sha256(records),
            "importance": None if importance is None else sha256(importance),
        },
    }
    if not manifest.is_up_to_date(final, **identity, may_replace=True):
        comparison = _Comparison.of(stage, content, quant_types, importance)
        lacks = {each: comparison.lack(each) for each in _REFERENCES}
        reference = next((each for each, lack in lacks.items() if lack is None), _REFERENCES[-1])
        if lack := lacks[reference]:
            return _skip(lack)
        if not comparison.compared_with(reference):
            return _skip(f"there is no file other than {reference} to compare with it.")
        with manifest.making(final, **identity, may_replace=True) as partial:
            result = comparison.measure(reference, records, max_tokens, n_gpu_layers)
            write_text(partial / _MEASURED, json.dumps(result, indent=1))
            spec, measured = comparison.export.plan.spec, markdown.of_table(quality_table(result))
            texts = model_card.companion_texts(comparison.files, spec=spec, inputs=content["inputs"], measured=measured)
            write_text(partial / model_card.CARD, texts[model_card.CARD])
    return read_table(stage, content)


def _skip(reason: str) -> Table | None:
    print(f"The cost of quantising is not measured: {reason}", flush=True)
    return None


class _Comparison(NamedTuple):
    """The files of a stage, and the export that makes further ones to compare."""

    files: Mapping[str, Path]  # by quant type
    export: Export  # of the first of _REFERENCES and the quant types that the stage does not have

    @classmethod
    def of(cls, stage: Path, content: manifest.Manifest, quant_types: Sequence[str], importance: Path | None) -> Self:
        asked = content["parameters"]
        settings = {"base_source": asked["base_source"], "merge_into": asked["merge_into"]}
        plan = MergePlan.of(asked["model"], asked["adapter"], run_dir=stage.parent, **settings)
        files = {facts["quant_type"]: stage / name for name, facts in content["files"].items()}
        further = [each for each in quant_types if each not in files]
        return cls(files, Export.of(plan, [_REFERENCES[0], *further], importance))

    @property
    def further(self) -> Sequence[str]:
        return self.export.quant_types[1:]

    def compared_with(self, reference: str) -> set[str]:
        return {*self.files, *self.further} - {reference}

    def lack(self, reference: str) -> str | None:
        """What is missing to make the reference with the further files and to run it next to the largest one."""
        what, size = f"A comparison with {reference}", self.export.bytes
        disk = sum(map(size, {reference, *self.further}))
        memory = size(reference) + max(map(size, self.compared_with(reference)), default=0)
        try:
            workspace.require_disk(workspace.scratch_dir(), disk, what)
            workspace.require_memory(memory, what, "Close other programs.")
        except SaigaError as error:
            return str(error)
        return None

    def measure(self, reference: str, records: Path, max_tokens: int, n_gpu_layers: int) -> dict[str, Any]:
        """The content of quality.json; the largest file comes first."""
        with scratch() as directory:
            export = replace(self.export, quant_types=list(dict.fromkeys([reference, *self.further])))
            file = write_gguf(export, directory / "reference.gguf")
            files = output_files(file, export.quant_types) | dict(self.files)
            sizes = {each: files[each].stat().st_size for each in self.compared_with(reference)}
            sizes = dict(sorted(sizes.items(), key=lambda item: -item[1]))
            held_out = calibration.token_rows(records, export.plan)
            rows = spread(held_out, len(held_out) * max_tokens // max(1, sum(read_column(held_out, "learned"))) + 1)
            options = {"max_tokens": max_tokens, "n_gpu_layers": n_gpu_layers}
            types = {each: compare_files(file, files[each], rows, **options)._asdict() for each in sizes}
        return {"reference": reference, "bytes": sizes, "types": types}


def read_table(stage_dir: Path, content: manifest.Manifest) -> Table | None:
    """What `measure_quality` has measured; None if it has not, or for other files."""
    directory = stage_dir.parent / STAGE
    if not (directory / manifest.NAME).is_file() or manifest.read(directory)["inputs"]["gguf"] != content["outputs"]:
        return None
    return quality_table(json.loads((directory / _MEASURED).read_text(encoding="utf-8")))


def quality_table(content: Mapping[str, Any]) -> Table:
    """Show quality.json."""
    measured = {name: Quality(**values) for name, values in content["types"].items()}
    rows = [
        (
            name,
            f"{content['bytes'][name] / workspace.GB:.2f}",
            f"{found.perplexity:.3f}",
            f"{100 * (found.perplexity / found.reference_perplexity - 1):+.1f}",
            f"{found.divergence:.4f}",
            f"{100 * found.same_top:.1f}",
        )
        for name, found in measured.items()
    ]
    one = next(iter(measured.values()))
    return Table(
        ("тип / type", "ГБ / GB", "perplexity", "%", "KL", "тот же токен, % / same top, %"),
        rows,
        f"{one.tokens:,} токенов ответов, эталон {content['reference']}, perplexity {one.reference_perplexity:.3f} / "
        "tokens of answers, the reference and its perplexity; KL: дивергенция в натах на токен / nats per token",
    )
