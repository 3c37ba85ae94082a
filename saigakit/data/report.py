"""Check records: the stage 01_format, its table and its advice."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from saigakit import registry
from saigakit.config import TrainConfig, require_name, sequence_budget
from saigakit.core import manifest
from saigakit.core.display import Every, Table
from saigakit.core.files import sha256, write_text
from saigakit.data import audit, length_histogram, near_duplicates, sources, store
from saigakit.data.conversations import (
    CommonSystemPrompt,
    asking_alike,
    labels,
    read_conversations,
    split_indices,
    spread,
    write_conversations,
)
from saigakit.data.near_duplicates import Signatures
from saigakit.data.rows import Fitted
from saigakit.data.schema import Conversation
from saigakit.errors import DataError
from saigakit.prompt import encoding, token_view
from saigakit.prompt.encoding import Tokenizer
from saigakit.weights import find

if TYPE_CHECKING:
    from datasets import Dataset

NOTE = "оценка, не измерение · an estimate, not measured"
T4_FLOPS = 20.4e12  # float16, measured for 4096³ on Kaggle's T4 by unsloth_zoo
T4S = 2  # what Kaggle's T4 ×2 has; an hour of both costs one hour of the quota
QUOTA_HOURS = 30  # of GPU a week on Kaggle
_PASSES = 3  # in units of a forward pass: forward, its recomputation, the gradient of the inputs
_FLOP_PER_PARAMETER = 2  # of a forward pass, per token: one multiplication and one addition
_SLOWEST, _FASTEST = 0.3, 0.7  # the part of T4_FLOPS that real runs reach


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A training run before it begins; hours and shares of the weekly quota are (low, high) on T4 ×2."""

    steps_per_epoch: int
    steps: int
    hours: tuple[float, float]
    quota: tuple[float, float]

    def __str__(self) -> str:
        spent = _range(self.hours, least=0.1, form=".1f")
        return (
            f"{spent} ч · h, T4 ×{T4S}, {_range(self.quota, least=0.01, form='.0%')} квоты недели · of a week's quota"
        )

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "note": NOTE}


def estimate(*, rows: int, tokens: int, parameters_b: float) -> Estimate:
    """Of a run over `rows` (conversations, as a rule) that have `tokens` together, each shown once an epoch.

    Epochs and batch size are those of a TrainConfig that does not name them.
    """
    low, high = hours(tokens=tokens * TrainConfig.epochs, parameters_b=parameters_b)
    return Estimate(
        steps_per_epoch=math.ceil(rows / TrainConfig.batch_size),
        steps=math.ceil(rows * TrainConfig.epochs / TrainConfig.batch_size),
        hours=(low, high),
        quota=(low / QUOTA_HOURS, high / QUOTA_HOURS),
    )


def hours(*, tokens: float, parameters_b: float) -> tuple[float, float]:
    """(low, high) to train on `tokens`, those of all epochs together, with QLoRA on Kaggle's T4s.

    QLoRA with activation checkpointing costs 3 forward passes of 2 · parameters FLOP per token: forward,
    recomputation, gradient of the inputs; the frozen weights get none. A T4 reaches 20.4 TFLOP/s in float16
    (measured for 4096³ on Kaggle's T4 by unsloth_zoo), and real runs reach 30 to 70 % of that. GPUs share the tokens.
    """
    at_peak = _PASSES * _FLOP_PER_PARAMETER * parameters_b * 1e9 * tokens / (T4S * T4_FLOPS) / 3600
    return at_peak / _FASTEST, at_peak / _SLOWEST


def _range(values: tuple[float, float], *, least: float, form: str) -> str:
    low, high = (format(value, form) if value >= least else f"<{least:{form}}" for value in values)
    return low if low == high else f"{low}–{high}"


T = TypeVar("T")
STAGE, TRAIN_FILE = "01_format", "train.jsonl"
_SHOWN_PAIRS, _SHOWN_CHARACTERS = 5, 200  # of near-duplicates


def check_records(
    *,
    model: str,
    records: str,
    held_out: str | None = None,
    eval_fraction: float = 0.15,
    max_seq_length: int | None = None,
    run_dir: str | Path,
    base_source: str | None = None,
    seed: int = 42,
) -> Path:
    """The stage 01_format: train.jsonl, held_out.jsonl, report.json and lengths.png in `run_dir`/01_format.

    `records` and `held_out`: what `sources.records_files` finds. The held-out records are used as they are; without
    any, `eval_fraction` of the records is held out. A conversation of more than `max_seq_length` tokens loses its
    last turns, or is left out where not even the first answer fits; both are printed.
    """
    spec = registry.find(model)
    limit = sequence_budget(spec, max_seq_length)
    require_name("records", records)
    require_name("held_out", held_out, is_optional=True)
    named = {"records": records, "held_out": held_out}
    names = {part: name and Path(name).absolute().name for part, name in named.items()}  # "." has a name, too
    files = {part: sources.records_files(name, run_dir) for part, name in named.items() if name is not None}
    parameters = {
        "model": model,
        "base_source": base_source,
        **names,
        "eval_fraction": eval_fraction,
        "max_seq_length": limit,
        "seed": seed,
    }
    hashes = {part: _hashes(found) for part, found in files.items()}

    def identity() -> dict[str, Any]:
        tokenizer_files = _hashes(find.tokenizer_files(spec, base_source))
        return {"stage": STAGE, "parameters": parameters, "inputs": hashes | {"tokenizer": tokenizer_files}}

    final = Path(run_dir) / STAGE
    if final.is_dir() and manifest.is_up_to_date(final, **identity()):
        return final
    read = _of_all(files, lambda part: read_conversations(files[part]))  # before a tokenizer is fetched
    for part, found in read.items():
        print(f"{names[part]}: {len(found):,} conversations, each is well-formed.", flush=True)
    tokenizer = encoding.load_tokenizer(model, base_source)
    facts: dict[str, Any] = {
        "chat_template_sha256": hashlib.sha256(tokenizer.chat_template.encode("utf-8")).hexdigest()
    }
    with manifest.making(final, **identity(), facts=facts) as partial:
        fitted = _of_all(read, lambda part: Fitted(read[part], tokenizer, limit, files[part], name=str(names[part])))
        written, facts["system_prompt"] = _written(fitted, tokenizer, partial, eval_fraction, seed)
        report = {"model": model, "max_seq_length": limit, **written}
        report["estimate"] = _estimate(report["train"], model).to_json()
        counted = [tokens for part in fitted.values() for tokens in part.lengths]
        report["lengths"] = length_histogram.histogram(counted, limit)
        write_text(partial / "report.json", json.dumps(report, ensure_ascii=False, indent=2))
        length_histogram.plot(counted, limit).savefig(partial / "lengths.png", dpi=110)
    return final


def _of_all(parts: Iterable[str], make: Callable[[str], T]) -> dict[str, T]:
    """Raises DataError with the problems of all of them."""
    made: dict[str, T] = {}
    refused: list[DataError] = []
    for part in parts:
        try:
            made[part] = make(part)
        except DataError as error:
            refused.append(error)
    if refused:
        problems = [problem for error in refused for problem in error.problems]
        raise DataError(" ".join(error.summary for error in refused), problems, more=sum(e.more for e in refused))
    return made


def _hashes(files: Sequence[Path]) -> dict[str, str]:
    return {label: sha256(file) for label, file in zip(labels(files), files, strict=True)}


def _written(
    fitted: Mapping[str, Fitted], tokenizer: Tokenizer, directory: Path, eval_fraction: float, seed: int
) -> tuple[dict[str, Any], str | None]:
    """Write train.jsonl and held_out.jsonl; return the report on them and the common system prompt of training."""
    training, held_out = fitted["records"], fitted.get("held_out", fitted["records"])
    parts: tuple[Sequence[int], Sequence[int]] = (
        range(len(training.conversations)),
        range(len(held_out.conversations)),
    )
    if training is held_out:
        parts = split_indices(training.conversations, eval_fraction=eval_fraction, seed=seed)
    sides = store.select(training.conversations, parts[0]), store.select(held_out.conversations, parts[1])
    counts = map(training.counts, parts[0]), map(held_out.counts, parts[1])
    sample = spread(sides[0], near_duplicates.SAMPLE)
    common = near_duplicates.boilerplate(near_duplicates.said_by_user(each["messages"]) for each in sample)
    special, train_file = tokenizer.special_tokens, directory / TRAIN_FILE
    of_training, signed, system_prompt = _write_side(train_file, sides[0], counts[0], special, common)
    of_held_out, held_out_signed, _ = _write_side(directory / "held_out.jsonl", sides[1], counts[1], special, common)
    repeated, near = len(asking_alike(*sides)), _near(sides, (signed, held_out_signed))
    report = {
        "cut": {part: each.cut for part, each in fitted.items()},
        "dropped": {part: each.dropped for part, each in fitted.items()},
        "of": {part: len(each.lengths) for part, each in fitted.items()},
        "train": of_training,
        "held_out": of_held_out,
        "held_out_prompts_in_train": repeated,
        "near_duplicates": near,
        "warnings": audit.warnings(of_training, of_held_out, near_in_train=repeated + near["held_out_in_train"]),
    }
    return report, system_prompt


def _write_side(
    file: Path, side: "Dataset", counts: Iterable[audit.Counts], special_tokens: Iterable[str], common: frozenset[str]
) -> tuple[dict[str, Any], Signatures, str | None]:
    facts, signer, prompt = audit.Side(special_tokens), near_duplicates.Signer(common), CommonSystemPrompt()
    is_due = Every()

    def looked_at() -> Iterator[Conversation]:
        for done, (conversation, counted) in enumerate(zip(store.conversations(side), counts, strict=True), start=1):
            facts.add(conversation, counted)
            signer.add(near_duplicates.said_by_user(conversation["messages"]))
            prompt.add(conversation)
            if is_due():
                print(f"{file.name}: {done:,} of {len(side):,} conversations checked", flush=True)
            yield conversation

    write_conversations(looked_at(), file)
    return facts.facts(), signer.finish(), prompt.value


def _near(sides: Sequence["Dataset"], signed: Sequence[Signatures]) -> dict[str, Any]:
    """Counts, and the beginnings of a few pairs (held-out, training)."""
    within = [near_duplicates.within(side) for side in signed]
    across = near_duplicates.across(signed[1], signed[0])
    found = [(index, int(other)) for index, other in enumerate(across) if other >= 0]
    shown = [(sides[1][index], sides[0][other]) for index, other in found[:_SHOWN_PAIRS]]
    return {
        "train": int((within[0] >= 0).sum()),
        "held_out": int((within[1] >= 0).sum()),
        "held_out_in_train": len(found),
        "pairs": [
            [near_duplicates.said_by_user(each["messages"])[:_SHOWN_CHARACTERS] for each in pair] for pair in shown
        ],
    }


def _with_share(count: int, total: int) -> str:
    return f"{count:,} ({count / total:.1%})" if count else "0"


def _estimate(train: Mapping[str, Any], model: str) -> Estimate:
    return estimate(rows=train["rows"], tokens=train["tokens"], parameters_b=registry.find(model).parameters_b)


def read(directory: str | Path) -> dict[str, Any]:
    """report.json of a finished 01_format."""
    manifest.require_stage(Path(directory), STAGE)
    found: dict[str, Any] = json.loads((Path(directory) / "report.json").read_text(encoding="utf-8"))
    for side in (found["train"], found["held_out"]):  # one row each, as long as they were not counted
        side.setdefault("rows", side["conversations"])
    return found


def summary(directory: str | Path) -> Table:
    """The counts of a finished 01_format."""
    report = read(directory)
    sides = [report["train"], report["held_out"]]
    near = report["near_duplicates"]

    def counts(key: str) -> list[str]:
        return [f"{side[key]:,}" for side in sides]

    def of_files(key: str) -> list[str]:
        found = [(report[key].get(part), report["of"].get(part)) for part in ("records", "held_out")]
        return ["–" if count is None else _with_share(count, total) for count, total in found]

    found = [side["special_tokens_as_text"].items() for side in sides]
    as_text = [", ".join(f"{token}: {count}" for token, count in tokens) or "0" for tokens in found]
    with_tools = [f"{side['no_call']:,} / {side['with_tools']:,}" for side in sides]
    nothing = [_with_share(side["nothing_found"], side["conversations"]) for side in sides]
    limit = f"{report['max_seq_length']:,}"
    is_split = any(side["rows"] > side["conversations"] for side in sides)  # see rows.WHY_MORE_ROWS
    table: list[tuple[str, Sequence[object]]] = [
        ("диалогов · conversations", counts("conversations")),
        *([("строк, по одной на ответ · rows, one for each answer", counts("rows"))] if is_split else []),
        ("токенов · tokens", counts("tokens")),
        ("из них учится · learned", [f"{side['learned_tokens'] / side['tokens']:.1%}" for side in sides]),
        ("самый длинный · longest", counts("longest")),
        (f"длиннее {limit}, без последних реплик · too long, last turns cut off", of_files("cut")),
        (f"длиннее {limit}, убрано · too long, left out", of_files("dropped")),
        ("нечему учиться · nothing to learn", counts("without_learned_tokens")),
        ("ответов без конца · answers without an end", counts("answers_without_end")),
        ("повторов · duplicates", counts("duplicates")),
        ("почти повторов · near-duplicates", [near["train"], near["held_out"]]),
        ("вопрос есть и в обучении · asked in train too", ["–", report["held_out_prompts_in_train"]]),
        ("почти такой вопрос есть в обучении · nearly asked in train", ["–", near["held_out_in_train"]]),
        ("ответов «ничего нет» · answers that say nothing found", nothing),
        *([("с функциями, но без вызова · tools and no call", with_tools)] if sides[0]["with_tools"] else []),
        ("служебные токены как текст · special tokens as text", as_text),
    ]
    note = "Служебный токен в вашем тексте остаётся текстом. A special token inside a text stays text."
    header = ("записи · records", "обучение · train", "отложено · held out")
    return Table(header, [(name, *map(str, cells)) for name, cells in table], note)


def advice(directory: str | Path) -> Table:
    """What to mend before a GPU session is spent, and how long that would be."""
    report = read(directory)
    estimate = _estimate(report["train"], report["model"])
    said = report["warnings"] or ["Замечаний нет · nothing to mend"]
    steps = f"{estimate.steps_per_epoch:,} шагов за эпоху · steps per epoch"
    cost = f"{steps}; {TrainConfig.epochs:g} эпохи · epochs: {estimate}"
    guess = (
        []
        if report["model"] in registry.MODELS
        else ["размер модели неизвестен, считается 7 B · size unknown: as for 7 B"]
    )
    return Table(("на что посмотреть · what to look at",), [(each,) for each in (*said, cost, *guess)], NOTE)


def near_pairs(directory: str | Path) -> str:
    """A few held-out texts that are nearly in training, each beside the other; empty where there are none."""
    pairs = read(directory)["near_duplicates"]["pairs"]
    return "\n".join(f"отложено · held out: {one}\nобучение · train:    {other}" for one, other in pairs)


def examples(directory: str | Path, tokenizer: Tokenizer, count: int = 3) -> token_view.Marked:
    """Conversations of training from the whole file, with what is learned of them marked."""
    manifest.require_stage(Path(directory), STAGE)
    train = read_conversations(Path(directory) / TRAIN_FILE)
    return token_view.mark(spread(train, count), tokenizer)
