"""Files of records into the stage 01_format, and what to look at in it: counts, lengths, a prompt in colour."""

import hashlib
import html
import json
import math
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saigakit import data, manifest, sources, tokenization
from saigakit.config import TrainConfig
from saigakit.errors import SaigaError
from saigakit.tables import Table
from saigakit.template import Message
from saigakit.tokenization import IGNORE_INDEX, Tokenizer

if TYPE_CHECKING:
    from datasets import Dataset
    from matplotlib.figure import Figure

STAGE = "01_format"
EVERY_S = 10  # seconds between two lines of progress
_BLUE, _RED = "#1a73e8", "#d93025"
_NOTHING = frozenset({"нет", "ничего", "ничего нет", "не найдено", "ничего не найдено", "none", "no", "nothing"})
_GREEN, _GREY, _WHITE = "#ceead6", "#dadce0", "#ffffff"
_LEGEND = {_GREEN: "учится · learned", _GREY: "служебный токен · special token", _WHITE: "только читает · only read"}
_BOX = "display:inline-block;margin:1px;padding:0 3px;border-radius:3px;text-align:center;white-space:pre;background:"
_VISIBLE = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"})


def check_records(
    *,
    model: str,
    records: str,
    held_out: str | None = None,
    eval_fraction: float = 0.05,
    max_seq_length: int | None = None,
    run_dir: str | Path,
    base_source: str | None = None,
    seed: int = 42,
) -> Path:
    """The stage 01_format: train.jsonl, held_out.jsonl, report.json and lengths.png in `run_dir`/01_format.

    A `held_out` file is used as it is; without one, `eval_fraction` of the records is held out. What is longer than
    `max_seq_length` tokens is left out of both, before they are split, which is printed.
    """
    checked = TrainConfig(model=model, train_file=records, output_dir=str(run_dir), max_seq_length=max_seq_length)
    limit = checked.sequence_budget
    named = {"records": records, "held_out": held_out}
    files = {part: sources.records_file(name, run_dir) for part, name in named.items() if name is not None}
    identity: dict[str, Any] = {
        "stage": STAGE,
        "parameters": {
            "model": model,
            "base_source": base_source,
            **{part: files[part].name if part in files else None for part in named},
            "eval_fraction": eval_fraction,
            "max_seq_length": limit,
            "seed": seed,
        },
        "inputs": {part: manifest.hashes(file) for part, file in files.items()},
    }
    final = Path(run_dir) / STAGE
    if manifest.is_kept(final, **identity):
        return final
    read = {part: data.read_conversations(file) for part, file in files.items()}
    tokenizer = tokenization.load_tokenizer(model, base_source)
    facts = {"chat_template_sha256": hashlib.sha256(tokenizer.chat_template.encode("utf-8")).hexdigest()}
    with manifest.making(final, **identity, facts=facts) as partial:
        counted = {part: _counted(conversations, tokenizer, files[part]) for part, conversations in read.items()}
        fitting = {part: _fitting(conversations, limit, files[part]) for part, conversations in counted.items()}
        if "held_out" not in fitting:
            train, rest = data.split_conversations(fitting["records"], eval_fraction=eval_fraction, seed=seed)
            fitting = {"records": train, "held_out": rest}
        dropped = {part: sum(tokens > limit for tokens in counted[part]["tokens"]) for part in counted}
        report = {"model": model, "max_seq_length": limit, "dropped": dropped, **_described(fitting, tokenizer)}
        data.write_conversations(fitting["records"], partial / "train.jsonl")
        data.write_conversations(fitting["held_out"], partial / "held_out.jsonl")
        manifest.write_text(partial / "report.json", json.dumps(report, ensure_ascii=False, indent=2))
        lengths = [tokens for part in counted.values() for tokens in part["tokens"]]
        plot(lengths, limit).savefig(partial / "lengths.png", dpi=110)
    return final


def _counted(conversations: "Dataset", tokenizer: Tokenizer, file: Path) -> "Dataset":
    """With the columns tokens and learned: how many each conversation has."""
    tokens: list[int] = []
    learned: list[int] = []
    printed = time.monotonic()
    for row in conversations:
        try:
            example = tokenization.encode(row["messages"], tokenizer)
        except SaigaError as error:
            raise SaigaError(f"{file.name}, conversation {len(tokens) + 1}: {error}") from None
        tokens.append(len(example["input_ids"]))
        learned.append(sum(label != IGNORE_INDEX for label in example["labels"]))
        if time.monotonic() - printed >= EVERY_S:
            printed = time.monotonic()
            print(f"{file.name}: {len(tokens)} of {len(conversations)} conversations tokenised", flush=True)
    return conversations.add_column("tokens", tokens).add_column("learned", learned)


def _fitting(counted: "Dataset", limit: int, file: Path) -> "Dataset":
    lengths = list(counted["tokens"])
    fitting = [index for index, tokens in enumerate(lengths) if tokens <= limit]
    if not fitting:
        raise SaigaError(
            f"{file.name}: all {len(lengths)} conversations are longer than max_seq_length={limit} tokens, the "
            f"shortest has {min(lengths)}. Raise max_seq_length or shorten the texts."
        )
    if len(fitting) < len(lengths):
        count = f"{len(lengths) - len(fitting)} of {len(lengths)}"
        print(f"{file.name}: {count} conversations are longer than {limit} tokens and are left out.", flush=True)
    return counted.select(fitting)


def _described(parts: Mapping[str, "Dataset"], tokenizer: Tokenizer) -> dict[str, Any]:
    seen = {text for row in parts["records"] for text in data.prompt_texts(row["messages"])}
    shared = sum(not seen.isdisjoint(data.prompt_texts(row["messages"])) for row in parts["held_out"])
    if shared:
        print(f"Asked in train too: {shared} of {len(parts['held_out'])} held-out conversations.", flush=True)
    train, held_out = (_counts(parts[part], tokenizer) for part in ("records", "held_out"))
    return {"train": train, "held_out": held_out, "held_out_prompts_in_train": shared}


def _counts(conversations: "Dataset", tokenizer: Tokenizer) -> dict[str, Any]:
    tokens = list(conversations["tokens"])
    longest_first = sorted(filter(str.strip, tokenizer.special_tokens), key=len, reverse=True)
    special = re.compile("|".join(map(re.escape, longest_first)))
    distinct: set[tuple[str, ...]] = set()
    nothing = 0
    as_text: Counter[str] = Counter()
    for row in conversations:
        contents = [message["content"] for message in row["messages"]]
        distinct.add(tuple(message[key] for message in row["messages"] for key in ("role", "content")))
        nothing += says_nothing_found(contents[-1])
        as_text.update({token for content in contents for token in special.findall(content)})
    return {
        "conversations": len(tokens),
        "tokens": sum(tokens),
        "learned_tokens": sum(conversations["learned"]),
        "longest": max(tokens),
        "duplicates": len(tokens) - len(distinct),
        "nothing_found": nothing,
        "special_tokens_as_text": dict(as_text.most_common()),
    }


def says_nothing_found(answer: str) -> bool:
    """An answer like [], {"terms": []}, null or "нет": without some, a model learns to find something in any text."""
    try:
        return _is_hollow(json.loads(answer))
    except (ValueError, RecursionError):
        return " ".join(answer.split()).casefold().strip(" .!") in _NOTHING


def _is_hollow(value: object) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return value in (None, "") if inner is None else all(map(_is_hollow, inner))


def summary(directory: str | Path) -> Table:
    """The counts of a finished 01_format."""
    manifest.require_stage(Path(directory), STAGE)
    report = json.loads((Path(directory) / "report.json").read_text(encoding="utf-8"))
    sides = [report["train"], report["held_out"]]
    dropped = [report["dropped"]["records"], report["dropped"].get("held_out", "–")]
    counts = [side["special_tokens_as_text"].items() for side in sides]
    as_text = [", ".join(f"{token}: {count}" for token, count in side) or "0" for side in counts]
    rows: list[tuple[str, Sequence[object]]] = [
        ("диалогов · conversations", [f"{side['conversations']:,}" for side in sides]),
        ("токенов · tokens", [f"{side['tokens']:,}" for side in sides]),
        ("из них учится · learned", [f"{side['learned_tokens'] / side['tokens']:.1%}" for side in sides]),
        ("самый длинный · longest", [f"{side['longest']:,}" for side in sides]),
        (f"длиннее {report['max_seq_length']:,}, убрано · too long, left out", dropped),
        ("повторов · duplicates", [side["duplicates"] for side in sides]),
        ("вопрос есть и в обучении · asked in train too", ["–", report["held_out_prompts_in_train"]]),
        ("ответов «ничего нет» · answers that say nothing found", [side["nothing_found"] for side in sides]),
        ("служебные токены как текст · special tokens as text", as_text),
    ]
    note = "Служебный токен в вашем тексте остаётся текстом. A special token inside a text stays text."
    header = ("записи · records", "обучение · train", "отложено · held out")
    return Table(header, [(name, *map(str, cells)) for name, cells in rows], note)


def plot(lengths: Sequence[int], limit: int) -> "Figure":
    """How many conversations have how many tokens, those beyond the limit in red; logarithmic, so that both show."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, NullLocator

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    shortest, longest, border = min(*lengths, limit), max(*lengths, limit) + 1, limit + 0.5
    steps = range(math.floor(8 * math.log2(shortest / border)), math.ceil(8 * math.log2(longest / border)) + 1)
    edges = [border * 2 ** (step / 8) for step in steps]  # the limit is an edge: no bar is of both kinds
    fits = [tokens for tokens in lengths if tokens <= limit]
    axes.hist(fits, edges, color=_BLUE, rwidth=0.92, label=f"{len(fits):,} помещаются (fit)")
    if too_long := [tokens for tokens in lengths if tokens > limit]:
        label = f"{len(too_long):,} длиннее, убраны (too long, left out)"
        axes.hist(too_long, edges, color=_RED, rwidth=0.92, label=label)
    axes.axvline(border, color=_RED, linestyle="--", label=f"предел {limit:,} (max_seq_length)")
    axes.set_xscale("log", base=2)
    ticks = [2**power for power in range(math.floor(math.log2(shortest)), math.ceil(math.log2(longest)) + 1)]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(shortest / 1.1, longest * 1.1)
    axes.set_xlabel("токенов в диалоге\ntokens of a conversation")
    axes.set_ylabel("диалогов\nconversations")
    axes.set_title("Длина диалогов / how long the conversations are", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


@dataclass(frozen=True)
class Piece:
    """One token, or the tokens of one character, as a reader sees them."""

    text: str
    ids: tuple[int, ...]
    is_special: bool
    is_learned: bool

    @property
    def visible(self) -> str:
        return self.text if self.is_special else self.text.translate(_VISIBLE)

    @property
    def numbers(self) -> str:
        return " ".join(map(str, self.ids))

    @property
    def ends_line(self) -> bool:
        return self.text.endswith("\n")


@dataclass(frozen=True)
class Prompt:
    """A conversation as the model reads it: in a terminal with `*` at learned tokens, in a notebook in colour."""

    pieces: Sequence[Piece]

    def __str__(self) -> str:
        words = [f"{piece.visible}[{piece.numbers}]{'*' * piece.is_learned}" for piece in self.pieces]
        ends = ["\n" if piece.ends_line else " " for piece in self.pieces]
        return f"{''.join(map(''.join, zip(words, ends, strict=True))).rstrip()}\n* учится · learned: {self._counts()}"

    def _repr_html_(self) -> str:
        legend = " ".join(f'<span style="{_BOX}{colour}">{name}</span>' for colour, name in _LEGEND.items())
        # Colours of its own: a notebook's theme may be dark.
        return (
            '<div style="background:#f8f9fa;color:#202124;padding:8px;font:13px/1.3 monospace">'
            f"<p>{legend} {self._counts()}</p>{''.join(map(_box, self.pieces))}</div>"
        )

    def _counts(self) -> str:
        learned = sum(len(piece.ids) for piece in self.pieces if piece.is_learned)
        return f"{learned} из · of {sum(len(piece.ids) for piece in self.pieces)} токенов · tokens"


def show(conversation: Mapping[str, Any] | Sequence[Message], tokenizer: Tokenizer) -> Prompt:
    """The exact ids of a conversation or of its messages, as training gets them."""
    messages = conversation["messages"] if isinstance(conversation, Mapping) else conversation
    return Prompt(list(_pieces(tokenization.encode(messages, tokenizer), tokenizer)))


def _pieces(example: Mapping[str, list[int]], tokenizer: Tokenizer) -> Iterator[Piece]:
    names = {token_id: token for token, token_id in tokenizer.special_tokens.items()}
    before = tokenizer.encode_text("a")  # decoders drop the space that a text begins with, so none begins here
    start = tokenizer.decode(before)
    group: list[int] = []
    pairs = list(zip(example["input_ids"], example["labels"], strict=True))
    for index, (token_id, label) in enumerate(pairs):
        is_learned = label != IGNORE_INDEX
        if token_id in names:
            yield Piece(names[token_id], (token_id,), True, is_learned)
            continue
        group.append(token_id)
        text = tokenizer.decode([*before, *group]).removeprefix(start)
        following = pairs[index + 1] if index + 1 < len(pairs) else None
        goes_on = following and following[0] not in names and (following[1] != IGNORE_INDEX) == is_learned
        if "\ufffd" in text and goes_on and len(group) < 4:  # a part of a character: UTF-8 has at most 4 bytes
            continue
        yield Piece(text, tuple(group), False, is_learned)
        group = []


def _box(piece: Piece) -> str:
    colour = _GREEN if piece.is_learned else _GREY if piece.is_special else _WHITE
    weight = ";font-weight:bold;outline:1px solid #5f6368" if piece.is_special else ""
    ids = f'<small style="color:#5f6368;font-size:9px">{piece.numbers}</small>'
    return (
        f'<span style="{_BOX}{colour}{weight}">{html.escape(piece.visible)}<br>{ids}</span>{"<br>" * piece.ends_line}'
    )
