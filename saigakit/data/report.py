"""Check records: run the stage 01_format and show its table and its advice."""

import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os.path import commonprefix
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from saigakit import registry
from saigakit.config import TrainConfig, require_name, sequence_budget
from saigakit.core import manifest
from saigakit.core.display import Every, Table, count
from saigakit.core.files import sha256, sha256_of_text, write_text
from saigakit.core.lazy import datasets
from saigakit.data import audit, length_histogram, near_duplicates, sources, store
from saigakit.data.conversations import (
    asking_alike,
    common_system_prompt,
    file_labels,
    read_conversations,
    split_indices,
    spread,
    write_conversations,
)
from saigakit.data.near_duplicates import Signatures
from saigakit.data.rows import FittedConversations
from saigakit.data.schema import Conversation
from saigakit.errors import DataError
from saigakit.prompt import encoding, template, token_view
from saigakit.prompt.encoding import Tokenizer
from saigakit.weights import find

T = TypeVar("T")
_Split = Callable[["datasets.Dataset"], Sequence[Sequence[int]]]  # the indices of training and evaluation
STAGE, TRAIN_FILE = "01_format", "train.jsonl"
_NOTE = "оценка, не измерение · an estimate, not measured"
_T4_FLOPS = 20.4e12  # float16, measured for 4096³ on Kaggle's T4 by unsloth_zoo
_T4S = 2  # in Kaggle's T4 ×2; an hour of both costs one hour of the quota
_QUOTA_HOURS = 30  # of GPU a week on Kaggle
_PASSES = 3  # in units of a forward pass: forward, its recomputation, the gradient of the inputs
_FLOP_PER_PARAMETER = 2  # of a forward pass, per token: one multiplication and one addition
_SLOWEST, _FASTEST = 0.3, 0.7  # the part of _T4_FLOPS that real runs reach
_SHOWN_PAIRS, _SHOWN_CHARACTERS = 5, 200  # of near-duplicates
_SHOWN_TEXT, _SHOWN_BEFORE = 80, 20  # characters of a question or an answer, and before two answers differ


class Estimate(NamedTuple):
    """Steps, and (low, high) hours and shares of the weekly quota, of a training on T4 ×2."""

    steps_per_epoch: int
    steps: int
    hours: tuple[float, float]
    quota: tuple[float, float]

    def __str__(self) -> str:
        hours = _format_range(self.hours, least=0.1, form=".1f")
        quota = _format_range(self.quota, least=0.01, form=".0%")
        return f"{hours} ч · h, T4 ×{_T4S}, {quota} недельной квоты · of the weekly quota"

    def to_json(self) -> dict[str, Any]:
        return {**self._asdict(), "note": _NOTE}


def estimate_training(*, rows: int, tokens: int, parameters_b: float) -> Estimate:
    """Estimate QLoRA with TrainConfig's default epochs and batch size; `tokens`: of all rows together, in one epoch."""
    flop = _PASSES * _FLOP_PER_PARAMETER * parameters_b * 1e9 * (tokens * TrainConfig.epochs)
    low, high = (flop / (_T4S * _T4_FLOPS) / 3600 / reached for reached in (_FASTEST, _SLOWEST))
    return Estimate(
        steps_per_epoch=math.ceil(rows / TrainConfig.batch_size),
        steps=math.ceil(rows * TrainConfig.epochs / TrainConfig.batch_size),
        hours=(low, high),
        quota=(low / _QUOTA_HOURS, high / _QUOTA_HOURS),
    )


def _format_range(values: tuple[float, float], *, least: float, form: str) -> str:
    low, high = (format(value, form) if value >= least else f"<{least:{form}}" for value in values)
    return low if low == high else f"{low}–{high}"


def check_records(
    *,
    model: str,
    records: str | Sequence[str],
    held_out: str | Sequence[str] | None = None,
    eval_fraction: float = 0.15,
    max_seq_length: int | None = None,
    run_dir: str | Path,
    base_source: str | None = None,
    chat_template: str | None = None,
    seed: int = 42,
    may_lack_held_out: bool = False,
) -> Path:
    """Write train.jsonl, held_out.jsonl, report.json and lengths.png to `run_dir`/01_format.

    `records`, `held_out`: see `sources.records_files`. Without `held_out`, `eval_fraction` of the records is held out.
    A conversation over `max_seq_length` tokens loses its last turns, or is dropped if the first answer does not fit.
    `chat_template`: "saiga2", "chatml" or a file, instead of the model's own; later stages read it from the manifest.
    `may_lack_held_out`: records that are too few to split all go to train.jsonl.
    """
    spec = registry.find(model)
    limit = sequence_budget(spec, max_seq_length)
    named = {"records": records} if held_out is None else {"records": records, "held_out": held_out}
    names = {part: _names(part, each) for part, each in named.items()}
    labels = {part: ", ".join(found) for part, found in names.items()}
    alone = held_out is None
    files = {part: sources.records_files(each, run_dir, offers_evaluation=alone) for part, each in named.items()}
    parameters = {
        "model": model,
        "base_source": base_source,
        "held_out": None,
        **{part: found[0] if len(found) == 1 else found for part, found in names.items()},
        "eval_fraction": eval_fraction,
        "max_seq_length": limit,
        "seed": seed,
    }
    hashes: dict[str, Any] = {part: _hash_files(found) for part, found in files.items()}
    require_name("chat_template", chat_template, is_optional=True)
    chosen = None if chat_template is None else template.find_chat_template(chat_template)
    if chosen is not None:
        hashes["chat_template"] = sha256_of_text(chosen)

    def identity() -> dict[str, Any]:
        tokenizer_files = _hash_files(find.tokenizer_files(find.tokenizer_dir(spec, base_source)))
        return {"stage": STAGE, "parameters": parameters, "inputs": hashes | {"tokenizer": tokenizer_files}}

    final = Path(run_dir) / STAGE
    if final.is_dir() and manifest.is_up_to_date(final, **identity()):
        return final
    read = _make_all(files, lambda part: read_conversations(files[part]))  # before the tokenizer is downloaded
    for part, found in read.items():
        print(f"{labels[part]}: {count(len(found), 'conversation')}, each is well-formed.", flush=True)
    tokenizer = encoding.load_tokenizer(model, base_source, chosen)
    facts: dict[str, Any] = {"chat_template_sha256": sha256_of_text(tokenizer.chat_template)}
    facts |= {} if chosen is None else {"chat_template": chosen}
    with manifest.making(final, **identity(), facts=facts) as partial:
        fitted = _make_all(
            read,
            lambda part: FittedConversations(read[part], tokenizer, limit, files[part], name=", ".join(names[part])),
        )
        split = functools.partial(split_indices, eval_fraction=eval_fraction, seed=seed, may_be_empty=may_lack_held_out)
        written, facts["system_prompt"] = _write_split(fitted, tokenizer, partial, split)
        _write_report(partial, {"model": model, "max_seq_length": limit, **written}, fitted)
    return final


def _names(parameter: str, given: str | Sequence[str]) -> list[str]:
    """The last part of each path or name, since directories differ between machines."""
    names: Sequence[Any] = given if isinstance(given, list | tuple) else [given]
    for name in names:
        require_name(parameter, name)
    return [Path(name).absolute().name for name in names]  # absolute: "." has no name


def _write_report(directory: Path, report: dict[str, Any], fitted: Mapping[str, FittedConversations]) -> None:
    """Write report.json, with the warnings about all records and the estimate, and lengths.png."""
    limit = report["max_seq_length"]
    for part, each in fitted.items():
        report["warnings"] += audit.length_warnings(part, each.cut + len(each.dropped), len(each.lengths), limit)
        report["warnings"] += audit.damage_warnings(each.damaged)
    report["estimate"] = _estimate(report).to_json()
    lengths = [tokens for part in fitted.values() for tokens in part.lengths]
    report["lengths"] = length_histogram.count_bars(lengths, limit)
    write_text(directory / "report.json", json.dumps(report, ensure_ascii=False, indent=2))
    length_histogram.plot(lengths, limit).savefig(directory / "lengths.png", dpi=110)


def _make_all(parts: Iterable[str], make: Callable[[str], T]) -> dict[str, T]:
    """Raise one DataError with the problems of all parts."""
    made: dict[str, T] = {}
    errors: list[DataError] = []
    for part in parts:
        try:
            made[part] = make(part)
        except DataError as error:
            errors.append(error)
    if errors:
        problems = [problem for error in errors for problem in error.problems]
        raise DataError(" ".join(error.summary for error in errors), problems, more=sum(e.more for e in errors))
    return made


def _hash_files(files: Sequence[Path]) -> dict[str, str]:
    return {label: sha256(file) for label, file in zip(file_labels(files), files, strict=True)}


def _write_split(
    fitted: Mapping[str, FittedConversations], tokenizer: Tokenizer, directory: Path, split: _Split
) -> tuple[dict[str, Any], str | None]:
    """Write train.jsonl and held_out.jsonl; return the report on them and the common system prompt of training."""
    records = fitted["records"]
    if "held_out" in fitted:
        train, held_out = (_Part(each, range(len(each.conversations))) for each in (records, fitted["held_out"]))
    else:
        train, held_out = (_Part(records, rows) for rows in split(records.conversations))
    sample = spread(train.conversations, near_duplicates.SAMPLE)
    common = near_duplicates.find_boilerplate(near_duplicates.join_user_texts(each["messages"]) for each in sample)
    of_train, signed = train.write(directory / TRAIN_FILE, tokenizer.special_tokens, common)
    of_held_out, held_out_signed = held_out.write(directory / "held_out.jsonl", tokenizer.special_tokens, common)
    repeated = len(asking_alike(train.conversations, held_out.conversations))
    near = _count_near((train.conversations, held_out.conversations), (signed, held_out_signed))
    report = {
        "cut": {part: each.cut for part, each in fitted.items()},
        "dropped": {part: len(each.dropped) for part, each in fitted.items()},
        "left_out": {part: each.left_out for part, each in fitted.items()},
        "damaged": {part: each.damaged for part, each in fitted.items()},
        "of": {part: len(each.lengths) for part, each in fitted.items()},
        "train": of_train,
        "held_out": of_held_out,
        "held_out_prompts_in_train": repeated,
        "near_duplicates": near,
        "warnings": audit.warnings(of_train, of_held_out, near_in_train=repeated + near["held_out_in_train"]),
    }
    return report, common_system_prompt(train.conversations)


class _Part:
    """The training or the evaluation set: these rows of the conversations of `source`."""

    def __init__(self, source: FittedConversations, rows: Sequence[int]) -> None:
        self.source, self.rows = source, rows
        self.conversations = store.select_rows(source.conversations, rows)

    def write(
        self, file: Path, special_tokens: Iterable[str], common: frozenset[str]
    ) -> tuple[dict[str, Any], Signatures]:
        """Write a file in one pass; return its counts and its signatures."""
        split_audit, signer, is_due = audit.SplitAudit(special_tokens), near_duplicates.Signer(common), Every()

        def checked() -> Iterator[Conversation]:
            counts = map(self.source.counts, self.rows)
            numbered = enumerate(zip(store.iter_conversations(self.conversations), counts, strict=True), start=1)
            for done, (conversation, tokens) in numbered:
                split_audit.add(conversation, tokens)
                signer.add(near_duplicates.join_user_texts(conversation["messages"]))
                if is_due():
                    print(f"{file.name}: {done:,} of {count(len(self.rows), 'conversation')} checked", flush=True)
                yield conversation

        write_conversations(checked(), file)
        return split_audit.facts(self._quote), signer.finish()

    def _quote(self, indices: Sequence[int]) -> str:
        """Show how the question begins, how the answers differ, and where they are."""
        found = [store.clean_row(self.conversations[index])["messages"] for index in indices]
        ends = [encoding.trained_answers(each)[-1] for each in found]
        answers = [each[end] for each, end in zip(found, ends, strict=True)]
        said = [each["content"] or json.dumps(each["tool_calls"], ensure_ascii=False) for each in answers]
        asked = next(each["content"] for each in reversed(found[0][: ends[0]]) if each["role"] == "user")
        begin = max(0, len(commonprefix(said)) - _SHOWN_BEFORE)  # noqa: RUF071  # of characters, as it should be
        texts = [f"{'…' * (begin > 0)}{' '.join(text[begin:].split())[:_SHOWN_TEXT]}" for text in said]
        places = self.source.locate([self.rows[index] for index in indices])
        shown = ", ".join(f"«{text}» ({place})" for text, place in zip(texts, places, strict=True))
        return f"«{' '.join(asked.split())[:_SHOWN_TEXT]}» → {shown}"


def _count_near(parts: Sequence["datasets.Dataset"], signed: Sequence[Signatures]) -> dict[str, Any]:
    """Count near-duplicates, and show the beginnings of a few pairs (evaluation, training)."""
    train, held_out = (int((near_duplicates.find_within(part) >= 0).sum()) for part in signed)
    across = near_duplicates.find_across(signed[1], signed[0])
    found = [(index, int(other)) for index, other in enumerate(across) if other >= 0]
    pairs = [(parts[1][index], parts[0][other]) for index, other in found[:_SHOWN_PAIRS]]
    texts = [[near_duplicates.join_user_texts(each["messages"])[:_SHOWN_CHARACTERS] for each in pair] for pair in pairs]
    return {"train": train, "held_out": held_out, "held_out_in_train": len(found), "pairs": texts}


def _estimate(report: Mapping[str, Any]) -> Estimate:
    train, parameters_b = report["train"], registry.find(report["model"]).parameters_b
    return estimate_training(rows=train["rows"], tokens=train["tokens"], parameters_b=parameters_b)


def read_report(directory: str | Path) -> dict[str, Any]:
    """Read report.json of a finished 01_format."""
    manifest.require_stage(Path(directory), STAGE)
    report: dict[str, Any] = json.loads((Path(directory) / "report.json").read_text(encoding="utf-8"))
    for part in (report["train"], report["held_out"]):  # older reports do not count rows, of which each had one
        part.setdefault("rows", part["conversations"])
        part.setdefault("different_answers", 0)
    return report


def summary(directory: str | Path) -> Table:
    """Show the counts of a finished 01_format."""
    report = read_report(directory)
    parts = [report["train"], report["held_out"]]
    near = report["near_duplicates"]

    def counts(key: str) -> list[str]:
        return [f"{part[key]:,}" for part in parts]

    def with_share(count: int, total: int) -> str:
        return f"{count:,} ({count / total:.1%})" if count else "0"

    def of_files(key: str) -> list[str]:
        of, found = report["of"], report[key]
        return [with_share(found[part], of[part]) if part in of else "–" for part in ("records", "held_out")]

    as_text = [", ".join(f"{token}: {n}" for token, n in part["special_tokens_as_text"].items()) for part in parts]
    with_tools = [f"{part['no_call']:,} / {part['with_tools']:,}" for part in parts]
    limit = f"{report['max_seq_length']:,}"
    has_more_rows = any(part["rows"] > part["conversations"] for part in parts)
    table: list[tuple[str, Sequence[object]]] = [
        ("диалогов · conversations", counts("conversations")),
        *([("строк, по одной на ответ · rows, one for each answer", counts("rows"))] if has_more_rows else []),
        ("токенов · tokens", counts("tokens")),
        (
            "обучаемых токенов · trained tokens",
            [f"{part['learned_tokens'] / (part['tokens'] or 1):.1%}" for part in parts],
        ),
        ("самый длинный · longest", counts("longest")),
        (f"длиннее {limit}, обрезано · too long, last turns cut off", of_files("cut")),
        (f"длиннее {limit}, удалено · too long, left out", of_files("dropped")),
        ("без обучаемых токенов · without trained tokens", counts("without_learned_tokens")),
        ("ответов без токена конца · answers without an end token", counts("answers_without_end")),
        ("дубликатов · duplicates", counts("duplicates")),
        ("один вопрос, разные ответы · one question, different answers", counts("different_answers")),
        ("почти дубликатов · near-duplicates", [near["train"], near["held_out"]]),
        ("вопрос есть в обучении · question is in training", ["–", report["held_out_prompts_in_train"]]),
        ("похожий вопрос есть в обучении · similar question is in training", ["–", near["held_out_in_train"]]),
        (
            "ответов «ничего нет» · answers that nothing was found",
            [with_share(part["nothing_found"], part["conversations"]) for part in parts],
        ),
        *([("с функциями без вызова · tools but no call", with_tools)] if parts[0]["with_tools"] else []),
        ("спецтокенов в текстах · special tokens as text", [text or "0" for text in as_text]),
    ]
    note = "Спецтокен в вашем тексте остаётся текстом. · A special token in a text stays text."
    header = ("записи · records", "обучение · training", "валидация · evaluation")
    return Table(header, [(name, *map(str, cells)) for name, cells in table], note)


def advice(directory: str | Path) -> Table:
    """Show what to fix before training, and how long the training would take."""
    report = read_report(directory)
    estimate = _estimate(report)
    lines = report["warnings"] or ["проблем не найдено · no issues found"]
    steps = f"шагов за эпоху · steps per epoch: {estimate.steps_per_epoch:,}"
    lines = [*lines, f"{steps}; эпох · epochs: {TrainConfig.epochs:g}; {estimate}"]
    if report["model"] not in registry.MODELS:
        lines.append("размер модели неизвестен, взято 7B · unknown model size, assumed 7B")
    return Table(("на что обратить внимание · what to check",), [(line,) for line in lines], _NOTE)


def near_pairs(directory: str | Path) -> str:
    """Show a few evaluation texts next to their near-duplicates in training; empty if there are none."""
    pairs = read_report(directory)["near_duplicates"]["pairs"]
    return "\n".join(f"валидация · evaluation: {one}\nобучение · training:    {other}" for one, other in pairs)


def examples(directory: str | Path, tokenizer: Tokenizer, count: int = 3) -> token_view.Marked:
    """Pick conversations from all over the training file and mark their trained text."""
    chosen = spread(range(read_report(directory)["train"]["conversations"]), count)
    with (Path(directory) / TRAIN_FILE).open("rb") as lines:
        return token_view.mark([json.loads(line) for i, line in enumerate(lines) if i in chosen], tokenizer)
