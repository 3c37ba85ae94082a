"""One conversation after another into counts that a report states, and those into warnings in two languages."""

import json
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from saigakit.prompt.encoding import IGNORE_INDEX

FEW_NOTHING = FEW_NO_CALL = 0.10  # of the answers: fewer do not teach to hold back
MANY_DUPLICATES = 0.01  # of the conversations
LITTLE_LEARNED = 0.02  # of the tokens
FEW_HELD_OUT = 20  # conversations
_NOTHING = frozenset({"нет", "ничего", "ничего нет", "не найдено", "ничего не найдено", "none", "no", "nothing"})
_SAYS_NOTHING = re.compile(
    r"^[\w ]+ нет$|\bне найден[аоы]?\b|\bотсутству[юе]т|\bnot found\b|^no \w+ found$"  # «Терминов нет»
)
_LONGEST_NOTHING = 40  # characters, blanks within included
_JSON = json.JSONEncoder(ensure_ascii=False).encode
_RUN = re.compile(b"\x01+")
_COUNTS = (
    "conversations",
    "rows",
    "turns",
    "tokens",
    "learned_tokens",
    "without_learned_tokens",
    "answers_without_end",
    "answers",
    "structured",
    "nothing_found",
    "with_tools",
    "no_call",
)
_Tree = dict[str, Any]


class Counts(NamedTuple):
    """Of the tokens of one conversation, over all rows that it is trained as."""

    rows: int
    tokens: int
    learned: int
    longest: int  # row
    longest_answer: int
    answers_without_end: int


def count_tokens(rows: Sequence[Mapping[str, Sequence[int]]], end_ids: frozenset[int]) -> Counts:
    """`end_ids`: those of `encoding.end_of_turn_ids`."""
    tokens = learned = longest_answer = without_end = 0
    for row in rows:
        labels = row["labels"]
        is_learned = bytes([label != IGNORE_INDEX for label in labels])
        tokens += len(labels)
        learned += is_learned.count(1)
        for run in _RUN.finditer(is_learned):  # one turn of the assistant
            without_end += labels[run.end() - 1] not in end_ids
            longest_answer = max(longest_answer, run.end() - run.start())
    longest = max((len(row["labels"]) for row in rows), default=0)
    return Counts(len(rows), tokens, learned, longest, longest_answer, without_end)


class Side:
    """What is stated about training or about held-out; 8 bytes of a conversation are held, and no text."""

    def __init__(self, special_tokens: Iterable[str]) -> None:
        self._special = _any_of(filter(str.strip, special_tokens))
        self._counts: Counter[str] = Counter()
        self._longest = self._longest_answer = 0
        self._hashes = array("q")
        self._special_records: Counter[str] = Counter()
        self._special_where: Counter[tuple[str, str]] = Counter()

    def add(self, conversation: Mapping[str, Any], counts: Counts) -> None:
        messages = conversation["messages"]
        tools = conversation.get("tools") or ""
        calls = [_JSON(_called(message)) if message.get("tool_calls") else "" for message in messages]
        said = [(message["role"], message["content"], made) for message, made in zip(messages, calls, strict=True)]
        is_learned = [each["role"] == "assistant" and each.get("weight") != 0 for each in messages]
        learned = [index for index, is_one in enumerate(is_learned) if is_one]
        self._hashes.append(hash((tools, tuple(learned), *said)))
        self._counts["conversations"] += 1
        self._counts["turns"] += len(learned)
        self._counts["rows"] += counts.rows
        self._counts["tokens"] += counts.tokens
        self._counts["learned_tokens"] += counts.learned
        self._counts["without_learned_tokens"] += counts.learned == 0
        self._counts["answers_without_end"] += counts.answers_without_end
        self._longest = max(self._longest, counts.longest)
        self._longest_answer = max(self._longest_answer, counts.longest_answer)
        self._add_answer(messages[learned[-1]]["content"] if learned else "")
        if tools:
            self._counts["with_tools"] += 1
            self._counts["no_call"] += not any(calls[index] for index in learned)
        self._add_special([*((role, content) for role, content, _ in said), ("tools", tools)], calls)

    def facts(self) -> dict[str, Any]:
        """Everything for JSON. turns: of the assistant; special tokens: in how many conversations they are text."""
        import numpy as np

        hashes = np.frombuffer(self._hashes, np.int64)
        counts = {name: self._counts[name] for name in _COUNTS}
        where: dict[str, dict[str, int]] = {}
        for (token, place), count in self._special_where.most_common():
            where.setdefault(token, {})[place] = count
        return {
            **counts,
            "longest": self._longest,
            "longest_answer": self._longest_answer,
            "duplicates": len(hashes) - len(np.unique(hashes)),
            "special_tokens_as_text": dict(self._special_records.most_common()),
            "special_tokens_where": where,
        }

    def _add_answer(self, answer: str) -> None:
        """The last that is learned; where it is a call alone there is none."""
        value = _parsed(answer)
        self._counts["answers"] += bool(answer)
        self._counts["structured"] += isinstance(value, list | dict)
        self._counts["nothing_found"] += _is_nothing(answer, value)

    def _add_special(self, texts: Iterable[tuple[str, str]], arguments: Iterable[str]) -> None:
        found = {
            (token, place)
            for place, text in (*texts, *(("arguments", made) for made in arguments))
            if text
            for token in self._special.findall(text)
        }
        if found:
            self._special_where.update(found)
            self._special_records.update({token for token, _ in found})


def warnings(train: Mapping[str, Any], held_out: Mapping[str, Any], *, near_in_train: int) -> list[str]:
    """What to look at before training. `near_in_train`: held-out conversations that are nearly in training."""
    return [
        *_of_side("обучение", "training", train),
        *_of_side("отложено", "held out", held_out),
        *_of_restraint(train),
        *_of_held_out(held_out, near_in_train),
    ]


def _of_side(ru: str, en: str, facts: Mapping[str, Any]) -> Iterator[str]:
    total = facts["conversations"]
    if count := facts["without_learned_tokens"]:
        yield (
            f"Диалогов, в которых нечему учиться ({ru}): {count:,} из {total:,}; проверьте шаблон и ответы · "
            f"Conversations with nothing to learn ({en}): {count:,} of {total:,}; check the template and the answers"
        )
    if count := facts["answers_without_end"]:
        yield (
            f"Ответов без токена конца ({ru}): {count:,}; модель не научится останавливаться · "
            f"Answers without an end-of-turn token ({en}): {count:,}; the model will not learn to stop"
        )
    if (count := facts["duplicates"]) > MANY_DUPLICATES * total:
        yield (
            f"Точных повторов ({ru}): {count:,} из {total:,}, {count / total:.1%}; уберите лишние · "
            f"Exact duplicates ({en}): {count:,} of {total:,}, {count / total:.1%}; remove them"
        )
    if facts["tokens"] and (share := facts["learned_tokens"] / facts["tokens"]) < LITTLE_LEARNED:
        yield (
            f"Учится лишь {share:.1%} токенов ({ru}): почти всё время уйдёт на чтение; сократите запросы · "
            f"Only {share:.1%} of the tokens are learned ({en}): nearly all time goes to reading; shorten the prompts"
        )


def _of_restraint(train: Mapping[str, Any]) -> Iterator[str]:
    answers, nothing = train["answers"], train["nothing_found"]
    if answers and 2 * train["structured"] >= answers and nothing < FEW_NOTHING * answers:
        yield (
            f"Ответов «ничего нет»: {nothing:,} из {answers:,}, меньше {FEW_NOTHING:.0%}; модель будет находить и там, "
            "где искать нечего: добавьте такие записи · "
            f"Answers that say nothing found: {nothing:,} of {answers:,}, under {FEW_NOTHING:.0%}; the model will find "
            "something in any text: add such records"
        )
    tools, silent = train["with_tools"], train["no_call"]
    if tools and silent < FEW_NO_CALL * tools:
        yield (
            f"Диалогов с инструментами, но без вызова: {silent:,} из {tools:,}, меньше {FEW_NO_CALL:.0%}; модель будет "
            "вызывать их и без нужды: добавьте такие записи · "
            f"Conversations with tools and no call: {silent:,} of {tools:,}, under {FEW_NO_CALL:.0%}; the model will "
            "call them without need: add such records"
        )


def _of_held_out(held_out: Mapping[str, Any], near_in_train: int) -> Iterator[str]:
    total = held_out["conversations"]
    if near_in_train:
        yield (
            f"Отложенных диалогов, почти таких же, как в обучении: {near_in_train:,} из {total:,}; оценка будет "
            "завышена: уберите их с одной из сторон · "
            f"Held-out conversations nearly the same as in training: {near_in_train:,} of {total:,}; the evaluation "
            "will flatter: remove them from one side"
        )
    if total < FEW_HELD_OUT:
        yield (
            f"Отложено диалогов: {total:,}, меньше {FEW_HELD_OUT}; оценка будет неточной: отложите больше · "
            f"Conversations held out: {total:,}, fewer than {FEW_HELD_OUT}; the evaluation will be rough: hold out more"
        )


def _parsed(answer: str) -> object:
    """The JSON value of an answer; the answer itself where it is none."""
    try:
        return json.loads(answer)
    except (ValueError, RecursionError):
        return answer


def _is_nothing(answer: str, value: object) -> bool:
    """An answer like [], {"terms": []}, null or "нет": without some, a model learns to find something in any text."""
    if value is not answer:
        return _is_hollow(value)
    short = answer.strip()
    said = " ".join(short.split()).casefold().strip(" .!")
    return len(short) <= _LONGEST_NOTHING and (said in _NOTHING or _SAYS_NOTHING.search(said) is not None)


def _is_hollow(value: object) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return value in (None, "") if inner is None else all(map(_is_hollow, inner))


def _called(message: Mapping[str, Any]) -> list[Any]:
    """Names and arguments; an id tells no two calls apart."""
    return [[call["function"]["name"], call["function"]["arguments"]] for call in message["tool_calls"]]


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """The longest token at a place. Branches by letter: alternatives are slow where a model reserves 1,000 tokens."""
    tree: _Tree = {}
    for token in tokens:
        node = tree
        for character in token:
            node = node.setdefault(character, {})
        node[""] = {}
    return re.compile(_branches(tree) or "(?!)")


def _branches(node: _Tree) -> str:
    longer = [re.escape(character) + _branches(child) for character, child in node.items() if character]
    if not longer:
        return ""
    return f"(?:{'|'.join(longer)}){'?' if '' in node else ''}"
