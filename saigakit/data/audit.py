"""Count what a report states about the training and the evaluation set, and turn it into warnings."""

import json
import re
import tomllib
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from importlib import resources
from itertools import groupby
from typing import Any, NamedTuple

from saigakit.core.lazy import np
from saigakit.prompt import thoughts
from saigakit.prompt.encoding import IGNORE_INDEX, trained_answers

_MIN_HELD_BACK = 0.10  # of the answers: fewer without a finding or a call do not teach the model to hold back
_MAX_DUPLICATES = 0.01  # of the conversations
_MIN_TRAINED = 0.02  # of the tokens
_MIN_HELD_OUT = 20  # conversations
_MAX_TOO_LONG = 0.05  # of the records
_NOTHING = frozenset({"нет", "ничего", "ничего нет", "не найдено", "ничего не найдено", "none", "no", "nothing"})
_SAYS_NOTHING = re.compile(
    r"^[\w ]+ нет$|\bне найден[аоы]?\b|\bотсутству[юе]т|\bnot found\b|^no \w+ found$"  # «Терминов нет»
)
_LONGEST_NOTHING = 40  # characters
_JSON = json.JSONEncoder(ensure_ascii=False, sort_keys=True).encode
_DECODE = json.JSONDecoder(parse_float=lambda text: int(n) if (n := float(text)).is_integer() else n).decode  # 1.0 is 1
_RUN = re.compile(b"\x01+")
_COUNTS = (
    "conversations rows turns tokens learned_tokens without_learned_tokens answers_without_end answers structured "
    "nothing_found with_tools no_call"
)
# What UTF-8 read as cp1251 has after a Р or С for a Cyrillic letter. Some of it follows them in sound texts too.
_SECOND = bytes(range(0x80, 0xC0)).decode("cp1251", "replace")
_SIGN = "".join(sorted({*_SECOND} - set("ЁёІіЇїЄєҐґЈј…–—«»„“”‘’‹›№•·\xa0\xad\ufffd")))
_WESTERN = "".join(map(chr, range(0x80, 0xC0))) + bytes(range(0x80, 0xA0)).decode("cp1252", "ignore")
_LOST = "\x80-\x84\x86-\x9f"  # of latin-1; sound texts have none of them, except perhaps U+0085 as a line end
_CONTROL = "\x00-\x08\x0e-\x1f\x7f"
_DAMAGE = re.compile(
    f"(?P<mojibake>[РС](?:[{_SIGN}][РС][{_SECOND}]|[{_SECOND}][РС][{_SIGN}])|вЂ|[{_LOST}]"
    f"|[ÐÑ][{_WESTERN}]?[ÐÑ][{_WESTERN}]|Ã[¤§¨©ª¶¼]|â€)"
    f"|(?P<replaced>\ufffd)|(?P<control>[{_CONTROL}])|(?P<decomposed>[ИиУу]\u0306|[ЕеІі]\u0308)"
)
_SUSPECT = re.compile(f"[{_SIGN}{_LOST}{_CONTROL}ÐÑÃâ\ufffd\u0306\u0308]")  # in few texts: this search is fast


class TokenCounts(NamedTuple):
    """Tokens of one conversation, over all rows that it is trained as."""

    rows: int
    tokens: int
    learned: int
    longest: int  # row
    longest_answer: int
    answers_without_end: int


def count_tokens(rows: Sequence[Mapping[str, Sequence[int]]], end_ids: frozenset[int]) -> TokenCounts:
    """`end_ids`: those of `encoding.end_of_turn_ids`."""
    trained = longest_answer = without_end = 0
    sizes = [len(row["labels"]) for row in rows]
    for row in rows:
        labels = row["labels"]
        is_trained = bytes([label != IGNORE_INDEX for label in labels])
        trained += is_trained.count(1)
        for run in _RUN.finditer(is_trained):  # one answer
            without_end += labels[run.end() - 1] not in end_ids
            longest_answer = max(longest_answer, run.end() - run.start())
    return TokenCounts(len(rows), sum(sizes), trained, max(sizes, default=0), longest_answer, without_end)


class SplitAudit:
    """Counts about the training or the evaluation set. Keeps 24 bytes of each conversation, and no text."""

    def __init__(self, special_tokens: Iterable[str]) -> None:
        self._special = re.compile(_tree_pattern(set(filter(str.strip, special_tokens))) or "(?!)")
        self._counts: Counter[str] = Counter()
        self._longest = self._longest_answer = 0
        self._hashes, self._questions, self._answers = array("q"), array("q"), array("q")
        self._special_records: Counter[str] = Counter()
        self._special_places: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def add(self, conversation: Mapping[str, Any], counts: TokenCounts) -> None:
        messages = conversation["messages"]
        tools = conversation.get("tools") or ""
        calls = [_JSON(_calls_without_ids(message)) if message.get("tool_calls") else "" for message in messages]
        texts = [(message["role"], message["content"], call) for message, call in zip(messages, calls, strict=True)]
        reasoning = [(thoughts.KEY, text, "") for each in messages if (text := each.get(thoughts.KEY))]
        trained = trained_answers(messages)
        answer = messages[trained[-1]]["content"] if trained else ""  # empty if it is only a call
        value, compared = _parse_json(answer)
        self._hashes.append(hash((tools, tuple(trained), *texts, *reasoning)))
        asked = [(role, _plain(content), call) for role, content, call in texts[: trained[-1] if trained else 0]]
        self._questions.append(hash((tools, *asked)))
        self._answers.append(hash((compared, calls[trained[-1]] if trained else "")))
        self._counts.update(
            conversations=1,
            rows=counts.rows,
            turns=len(trained),
            tokens=counts.tokens,
            learned_tokens=counts.learned,
            without_learned_tokens=counts.learned == 0,
            answers_without_end=counts.answers_without_end,
            answers=bool(answer),
            structured=isinstance(value, list | dict),
            nothing_found=_is_nothing(answer, value),
            with_tools=bool(tools),
            no_call=bool(tools) and not any(calls[index] for index in trained),
        )
        self._longest = max(self._longest, counts.longest)
        self._longest_answer = max(self._longest_answer, counts.longest_answer)
        found = {
            (token, place)
            for role, content, call in [*texts, *reasoning, ("tools", tools, "")]
            for place, text in ((role, content), ("arguments", call))
            if text
            for token in self._special.findall(text)
        }
        self._special_records.update({token for token, _ in found})
        for token, place in found:
            self._special_places[token][place] += 1

    def facts(self, show: Callable[[Sequence[int]], str] = str) -> dict[str, Any]:
        """turns: of the assistant; special tokens: the number of conversations with them as text.

        `show`: a text about conversations, given by their order, that ask the same and are answered differently.
        """
        differing, example = _find_differing(self._questions, self._answers)
        return {
            **{name: int(self._counts[name]) for name in _COUNTS.split()},
            "longest": self._longest,
            "longest_answer": self._longest_answer,
            "duplicates": len(self._hashes) - len(np.unique(np.frombuffer(self._hashes, np.int64))),
            "different_answers": differing,
            "different_answers_example": show(example) if example else "",
            "special_tokens_as_text": dict(self._special_records.most_common()),
            "special_tokens_where": {token: dict(places) for token, places in self._special_places.items()},
        }


def _find_differing(questions: "array[int]", answers: "array[int]") -> tuple[int, Sequence[int]]:
    """The number of questions that have more than one answer, and the first two records of such a question."""
    asked, said = np.frombuffer(questions, np.int64), np.frombuffer(answers, np.int64)
    order = np.lexsort((said, asked))
    is_same, is_other = np.diff(asked[order]) == 0, np.diff(said[order]) != 0
    differing = np.unique(asked[order[1:][is_same & is_other]])
    if not len(differing):
        return 0, ()
    first = np.flatnonzero(np.isin(asked, differing))[0]
    return len(differing), (int(first), int(np.flatnonzero((asked == asked[first]) & (said != said[first]))[0]))


def warnings(train: Mapping[str, Any], held_out: Mapping[str, Any], *, near_in_train: int) -> list[str]:
    """What to check before training. `near_in_train`: evaluation records that are nearly in the training set."""
    total, answers = held_out["conversations"], train["answers"]
    is_extraction = 2 * train["structured"] >= answers
    return [
        *_split_warnings("обучение", "training", train),
        *_split_warnings("валидация", "evaluation", held_out),
        *_warn(
            {**train, "least": _MIN_HELD_BACK},
            nothing_found=is_extraction and train["nothing_found"] < _MIN_HELD_BACK * answers,
            no_call=train["no_call"] < _MIN_HELD_BACK * train["with_tools"],
        ),
        *_warn(
            {"near_in_train": near_in_train, "total": total, "least": _MIN_HELD_OUT},
            near_in_train=near_in_train > 0,
            no_held_out=total == 0,
            few_held_out=0 < total < _MIN_HELD_OUT,
        ),
    ]


def _split_warnings(ru: str, en: str, facts: Mapping[str, Any]) -> list[str]:
    duplicates = facts["duplicates"] / max(1, facts["conversations"])
    trained = facts["learned_tokens"] / max(1, facts["tokens"])
    return _warn(
        {**facts, "ru": ru, "en": en, "duplicates_share": duplicates, "trained_share": trained},
        without_learned_tokens=facts["without_learned_tokens"] > 0,
        answers_without_end=facts["answers_without_end"] > 0,
        duplicates=duplicates > _MAX_DUPLICATES,
        different_answers=facts["different_answers"] > 0,
        learned_tokens=facts["tokens"] > 0 and trained < _MIN_TRAINED,
    )


def length_warnings(part: str, count: int, total: int, limit: int) -> list[str]:
    """`part`: the parameter that names the records; `count`: those cut or left out."""
    values = {"part": part, "count": count, "total": total, "share": count / total, "limit": limit}
    return _warn(values, too_long=count > _MAX_TOO_LONG * total)


def damage_warnings(damaged: Mapping[str, tuple[int, Sequence[str]]]) -> Iterator[str]:
    """`damaged`: the number of records and the places of the first, by kind."""
    for kind in filter(damaged.__contains__, _DAMAGE.groupindex):
        count, places = damaged[kind]
        yield from _warn({"count": count, "places": ", ".join(places)}, **{kind: True})


def _warn(values: Mapping[str, Any], **is_due: bool) -> list[str]:
    """The warnings that are due, by name, with `values` in their texts."""
    texts = tomllib.loads(resources.files("saigakit.data").joinpath("warnings.toml").read_text(encoding="utf-8"))
    return [" · ".join(texts[name].values()).format_map(values) for name, due in is_due.items() if due]


def _parse_json(answer: str) -> tuple[object, str]:
    """(value, a text by which answers are compared); the value is the answer itself if it is not JSON."""
    try:
        value = _DECODE(answer)
        return value, _JSON(value)
    except (ValueError, RecursionError):
        return answer, _plain(answer)


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _is_nothing(answer: str, value: object) -> bool:
    """Recognise answers such as [], {"terms": []}, null or "нет", which keep a model from always finding something."""
    if value is not answer:
        return _is_hollow(value)
    plain = _plain(answer).strip(" .!")
    return len(plain) <= _LONGEST_NOTHING and (plain in _NOTHING or _SAYS_NOTHING.search(plain) is not None)


def _is_hollow(value: object) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return value in (None, "") if inner is None else all(map(_is_hollow, inner))


def _calls_without_ids(message: Mapping[str, Any]) -> list[Any]:
    return [[call["function"]["name"], _DECODE(call["function"]["arguments"])] for call in message["tool_calls"]]


def _tree_pattern(tokens: Set[str]) -> str:
    """A pattern for the longest token at a place. A tree of letters: a flat list is slow if a model reserves 1,000."""
    grouped = groupby(sorted(filter(None, tokens)), key=lambda token: token[0])
    branches = [re.escape(first) + _tree_pattern({token[1:] for token in group}) for first, group in grouped]
    if not branches:
        return ""
    return f"(?:{'|'.join(branches)}){'?' if '' in tokens else ''}"


def find_damage(messages: Sequence[Mapping[str, Any]]) -> set[str]:
    """The kinds of damage in the contents and thoughts of messages and in the arguments of calls."""
    calls = (call["function"]["arguments"] for each in messages for call in each.get("tool_calls") or ())
    contents = (each.get(key) or "" for each in messages for key in ("content", thoughts.KEY))
    text = "\n".join([*contents, *calls])
    return {str(match.lastgroup) for match in _DAMAGE.finditer(text)} if _SUSPECT.search(text) else set()
