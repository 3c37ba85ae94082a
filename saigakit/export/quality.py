"""Measure what quantising cost on the evaluation set, by quant type."""

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from saigakit import registry
from saigakit.core import manifest, workspace
from saigakit.core.display import Every, Table
from saigakit.core.files import sha256, write_text
from saigakit.data import sources
from saigakit.data.conversations import spread
from saigakit.errors import SaigaError
from saigakit.export import calibration, markdown, model_card
from saigakit.export.gguf_export import Export, paths
from saigakit.export.stage import STAGE as EXPORT_STAGE
from saigakit.export.stage import to_gguf
from saigakit.llamacpp import forward
from saigakit.prompt.encoding import IGNORE_INDEX, Example
from saigakit.weights import find

if TYPE_CHECKING:
    import numpy as np

    Row = np.ndarray[tuple[int, ...], np.dtype[Any]]

_AT_ONCE = 32  # places whose probabilities are in memory: 16 MB for a vocabulary of 128,000, a few times


@dataclass(frozen=True)
class Quality:
    """Of a file, against the file that it was to resemble, over the learned tokens of the rows."""

    tokens: int
    perplexity: float
    reference_perplexity: float
    divergence: float  # mean Kullback-Leibler divergence from the reference, in nats a token
    same_top: float  # share of places where both find the same token likeliest


def against(
    reference: str | Path,
    gguf_file: str | Path,
    rows: Sequence[Example],
    *,
    max_tokens: int = 20_000,
    n_threads: int | None = None,
    n_gpu_layers: int = 0,
) -> Quality:
    """Both models read `rows` side by side, until `max_tokens` labels that are not IGNORE_INDEX are compared.

    Logits are used as they come and never kept, so memory holds the two models and some hundred MB. Labels equal to the
    ids compare every token but the first. Raises SaigaError where the files' vocabularies differ.
    """
    length = max((len(row["input_ids"]) for row in rows), default=0)
    totals, tokens, is_due = [0.0] * 4, 0, Every()
    with ExitStack() as stack:
        expects, answers = (
            stack.enter_context(
                forward.opened(Path(file), n_ctx=length, n_threads=n_threads, n_gpu_layers=n_gpu_layers)
            )
            for file in (reference, gguf_file)
        )
        _require_same_vocabulary(expects, answers)
        for row in rows:
            for found in _compare_logits(expects, answers, row):
                totals = [before + float(values.sum()) for before, values in zip(totals, found, strict=True)]
                tokens += len(found[0])
            if tokens >= max_tokens:
                break
            if is_due():
                print(f"{Path(gguf_file).name}: {tokens} tokens compared", flush=True)
    if not tokens:
        raise SaigaError("The rows have no learned token, so there is nothing to compare on.")
    expected, got, divergence, same = (total / tokens for total in totals)
    return Quality(tokens, math.exp(got), math.exp(expected), divergence, same)


def _require_same_vocabulary(reference: forward.Forward, model: forward.Forward) -> None:
    if reference.vocabulary != model.vocabulary:
        raise SaigaError(
            f"{model.file} has a vocabulary of {model.vocabulary} tokens and {reference.file} one of "
            f"{reference.vocabulary}: they are not the same model."
        )


def _compare_logits(reference: forward.Forward, model: forward.Forward, row: Example) -> Iterator[tuple["Row", ...]]:
    """For some places at a time: both losses, the divergence, whether the likeliest token is the same."""
    import numpy as np

    ids, labels = row["input_ids"], row["labels"]
    following = [*labels[1:], IGNORE_INDEX]  # what each place is to predict
    wanted = [label != IGNORE_INDEX for label in following]
    targets = np.array([label for label in following if label != IGNORE_INDEX])
    done = 0
    for blocks in zip(reference.logits(ids, wanted), model.logits(ids, wanted), strict=True):
        for first in range(0, len(blocks[0]), _AT_ONCE):
            logs = [_log_probabilities(block[first : first + _AT_ONCE]) for block in blocks]
            places = np.arange(len(logs[0]))
            losses = [-log[places, targets[done : done + len(places)]] for log in logs]
            tops = [log.argmax(axis=1) for log in logs]
            divergence = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=1, dtype=np.float64)
            done += len(places)
            yield *losses, divergence, tops[0] == tops[1]


def _log_probabilities(logits: "Row") -> "Row":
    import numpy as np

    shifted: Row = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return shifted


def quality_table(sizes: Mapping[str, int], measured: Mapping[str, Quality], reference: str) -> Table:
    """A row for each name in `measured`: the bytes of its file, and what quantising cost against `reference`."""
    rows = [
        (
            name,
            f"{sizes[name] / workspace.GB:.2f}",
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
        f"{one.tokens:,} токенов ответов, эталон {reference}, perplexity {one.reference_perplexity:.3f} / "
        "tokens of the answers, the reference and its perplexity; KL: дивергенция в натах на токен / nats a token",
    )


STAGE, _MEASURED = "03_quality", "quality.json"
_REFERENCES = ("F16", "Q8_0")


def measure_quality(
    stage_dir: str | Path,
    *,
    quant_types: Sequence[str] = (),
    importance: Path | None = None,
    max_tokens: int = 500,
    n_gpu_layers: int = 0,
) -> Table | None:
    """What quantising cost the files of a finished 03_merge_gguf, on answers of the held-out records of 01_format.

    Also what it would cost in `quant_types`. Their files and the reference, float16 or Q8_0, are made in the scratch
    directory and deleted; what was measured is kept beside the stage, in 03_quality, with a model card that has it.
    None, with a sentence that says why, where there are no held-out records, no room, or `max_tokens` is 0.
    """
    stage = Path(stage_dir)
    content, records = manifest.require_stage(stage, EXPORT_STAGE), sources.formatted_records("held_out", stage.parent)
    final = stage.parent / STAGE
    identity: dict[str, Any] = {
        "stage": STAGE,
        "parameters": {"max_tokens": max_tokens, "quant_types": list(quant_types)},
        "inputs": {
            "gguf": content["outputs"],
            "held_out": None if records is None else sha256(records),
            "importance": None if importance is None else sha256(importance),
        },
    }
    if not max_tokens or records is None:
        missing = f"there is no 01_format/held_out.jsonl in {stage.parent} or attached"
        _unmeasured(missing if max_tokens else "no tokens are asked for")
        return None
    if not manifest.is_up_to_date(final, **identity, may_replace=True):
        compared = _Compared.of(stage, content, quant_types, importance)
        if (reference := compared.reference()) is None:
            _unmeasured(compared.lacks)
            return None
        if not compared.others(reference):
            _unmeasured(f"there is no file but {reference}, with which others are compared")
            return None
        with manifest.making(final, **identity, may_replace=True) as partial:
            found = compared.measured(reference, records, max_tokens, n_gpu_layers)
            write_text(partial / _MEASURED, json.dumps(found, indent=1))
            write_text(partial / model_card.CARD, compared.card(content["inputs"], _table(found)))
    return kept(stage, content)


def _unmeasured(why: str) -> None:
    print(f"What quantising cost is not measured: {why}.", flush=True)


@dataclass(frozen=True)
class _Compared:
    """The files of a stage, and the further ones that are made for the comparison."""

    files: Mapping[str, Path]  # by quant type
    options: Mapping[str, Any]  # of to_gguf
    export: Export

    @classmethod
    def of(cls, stage: Path, content: manifest.Manifest, quant_types: Sequence[str], importance: Path | None) -> Self:
        asked = content["parameters"]
        spec, base_source, adapter = registry.find(asked["model"]), asked["base_source"], asked["adapter"]
        options = {
            "adapter": None if adapter is None else find.adapter_dir(spec, adapter, stage.parent),
            "base_source": base_source,
            "merge_into": asked["merge_into"],
            "importance": importance,
        }
        files = {facts["quant_type"]: stage / name for name, facts in content["files"].items()}
        further = [each for each in quant_types if each not in files]
        adapters, into = options["adapter"], options["merge_into"]
        made = Export.of(spec, adapters, base_source, _REFERENCES[0], into, importance, further)
        return cls(files, options, made)

    @property
    def further(self) -> Sequence[str]:
        return self.export.quant_types[1:]

    def reference(self) -> str | None:
        """The best quant type that the scratch disk and the memory have room for, beside what it is compared with."""
        free, memory = workspace.free_disk(workspace.scratch_dir()), workspace.available_memory()
        return next((each for each in _REFERENCES if self._needed(each) < free and self._opened(each) < memory), None)

    @property
    def lacks(self) -> str:
        directory, least = workspace.scratch_dir(), _REFERENCES[-1]
        return (
            f"it takes {self._needed(least) / workspace.GB:.1f} GB of disk at {directory}, where "
            f"{workspace.free_disk(directory) / workspace.GB:.1f} GB are free, and "
            f"{self._opened(least) / workspace.GB:.1f} GB of memory, of which "
            f"{workspace.available_memory() / workspace.GB:.1f} GB are free"
        )

    def _needed(self, reference: str) -> int:
        return sum(map(self.export.bytes, {reference, *self.further}))

    def _opened(self, reference: str) -> int:
        """Bytes of the reference and of the largest file beside it; what is not there is read anew each time."""
        return self.export.bytes(reference) + max(map(self.export.bytes, self.others(reference)), default=0)

    def others(self, reference: str) -> set[str]:
        """Quant types of the files that are compared with it."""
        return {*self.files, *self.further} - {reference}

    def measured(self, reference: str, records: Path, max_tokens: int, n_gpu_layers: int) -> dict[str, Any]:
        """Perplexity, divergence and equal top tokens of each file on the answers, as JSON."""
        model, found = self.export.spec.name, {}
        with tempfile.TemporaryDirectory(dir=workspace.scratch_dir()) as scratch:
            whole = Path(scratch) / "reference.gguf"
            to_gguf(model=model, output=whole, quant_type=reference, quant_types=self.further, **self.options)
            made = paths(whole, [reference, *self.further])  # the reference may be one of the further types itself
            files = {each: made[each] for each in self.further} | dict(self.files)
            by_size = sorted(self.others(reference), key=lambda each: -files[each].stat().st_size)
            files = {each: files[each] for each in by_size}
            held_out = calibration.token_rows(records, model, self.options["base_source"])
            chosen = spread(held_out, len(held_out) * max_tokens // max(1, sum(held_out.learned)) + 1)
            for each, file in files.items():
                found[each] = asdict(against(whole, file, chosen, max_tokens=max_tokens, n_gpu_layers=n_gpu_layers))
            sizes = {each: file.stat().st_size for each, file in files.items()}
        return {"reference": reference, "bytes": sizes, "types": found}

    def card(self, inputs: Mapping[str, Any], measured: Table) -> str:
        """The model card of the stage's files, with what was measured."""
        spec, origin = self.export.spec, model_card.origin(inputs)
        compared = markdown.of_table(measured)
        return model_card.made_of(self.files, spec=spec, origin=origin, compared=compared)[model_card.CARD]


def kept(stage_dir: Path, content: manifest.Manifest) -> Table | None:
    """What `measure_quality` has kept; None where it has not run, or for other files."""
    directory = stage_dir.parent / STAGE
    if not (directory / manifest.NAME).is_file() or manifest.read(directory)["inputs"]["gguf"] != content["outputs"]:
        return None
    found = json.loads((directory / _MEASURED).read_text(encoding="utf-8"))
    return _table(found)


def _table(found: Mapping[str, Any]) -> Table:
    measured = {name: Quality(**values) for name, values in found["types"].items()}
    return quality_table(found["bytes"], measured, found["reference"])
