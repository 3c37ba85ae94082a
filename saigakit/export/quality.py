"""Two GGUF files and held-out ids into what quantising cost: perplexity, divergence, equal top tokens."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saigakit.core import workspace
from saigakit.core.display import Table
from saigakit.core.progress import Every
from saigakit.errors import SaigaError
from saigakit.llamacpp import forward
from saigakit.prompt.encoding import IGNORE_INDEX, Example

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
            for found in _compared(expects, answers, row):
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


def _compared(reference: forward.Forward, model: forward.Forward, row: Example) -> Iterator[tuple["Row", ...]]:
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


def table(sizes: Mapping[str, int], measured: Mapping[str, Quality], reference: str) -> Table:
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
