"""Count what a report states about the training and the evaluation set, and turn it into warnings."""

import json
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os.path import commonprefix
from typing import Any, NamedTuple

from saigakit.prompt import thoughts
from saigakit.prompt.encoding import IGNORE_INDEX, trained_answers

_MIN_NOTHING = _MIN_NO_CALL = 0.10  # of the answers: fewer do not teach the model to hold back
_MAX_DUPLICATES = 0.01  # of the conversations
_MIN_TRAINED = 0.02  # of the tokens
_MIN_HELD_OUT = 20  # conversations
_MAX_TOO_LONG = 0.05  # of the records
_NOTHING = frozenset({"нет", "ничего", "ничего нет", "не найдено", "ничего не найдено", "none", "no", "nothing"})
_SAYS_NOTHING = re.compile(
    r"^[\w ]+ нет$|\bне найден[аоы]?\b|\bотсутству[юе]т|\bnot found\b|^no \w+ found$"  # «Терминов нет»
)
_SHOWN, _SHOWN_BEFORE = 80, 20  # characters of a question or an answer, and of what two answers have in common
_LONGEST_NOTHING = 40  # characters, including blanks
_JSON = json.JSONEncoder(ensure_ascii=False, sort_keys=True).encode
_DECODE = json.JSONDecoder(parse_float=lambda text: int(n) if (n := float(text)).is_integer() else n).decode  # 1.0 is 1
_RUN = re.compile(b"\x01+")
_COUNTS = (
    "conversations rows turns tokens learned_tokens without_learned_tokens answers_without_end answers structured "
    "nothing_found with_tools no_call"
)
_DAMAGE_WARNINGS = {
    "mojibake": "Записей в неверной кодировке: {0:,}; прочтите исходные файлы заново · "
    "Records in a wrong encoding: {0:,}; read the original files again: {1}",
    "replaced": "Записей с U+FFFD вместо букв: {0:,}; прочтите исходные файлы заново · "
    "Records with U+FFFD for letters: {0:,}; read the original files again: {1}",
    "control": "Записей с управляющими символами: {0:,}; удалите их · "
    "Records with control characters: {0:,}; remove these: {1}",
    "decomposed": "Записей с «й» или «ё» из двух символов: {0:,}; приведите тексты к NFC · "
    "Records with letters of two characters: {0:,}; normalise the texts to NFC: {1}",
}
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
_Tree = dict[str, Any]


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
    tokens = trained = longest_answer = without_end = 0
    for row in rows:
        labels = row["labels"]
        is_trained = bytes([label != IGNORE_INDEX for label in labels])
        tokens += len(labels)
        trained += is_trained.count(1)
        for run in _RUN.finditer(is_trained):  # one answer
            without_end += labels[run.end() - 1] not in end_ids
            longest_answer = max(longest_answer, run.end() - run.start())
    longest = max((len(row["labels"]) for row in rows), default=0)
    return TokenCounts(len(rows), tokens, trained, longest, longest_answer, without_end)


class SplitAudit:
    """Counts about the training or the evaluation set. Keeps 24 bytes of each conversation, and no text."""

    def __init__(self, special_tokens: Iterable[str]) -> None:
        self._special = _match_any(filter(str.strip, special_tokens))
        self._counts: Counter[str] = Counter()
        self._longest = self._longest_answer = 0
        self._hashes, self._questions, self._answers = array("q"), array("q"), array("q")
        self._special_records: Counter[str] = Counter()
        self._special_where: Counter[tuple[str, str]] = Counter()

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
        self._special_where.update(found)
        self._special_records.update({token for token, _ in found})

    def facts(self, show: Callable[[int, int], str] = "{}, {}".format) -> dict[str, Any]:
        """turns: of the assistant; special tokens: the number of conversations with them as text.

        `show`: a text about two conversations, given by their order, that ask the same and are answered differently.
        """
        import numpy as np

        differing, example = _find_differing(self._questions, self._answers)
        where: dict[str, dict[str, int]] = {}
        for (token, place), count in self._special_where.most_common():
            where.setdefault(token, {})[place] = count
        return {
            **{name: int(self._counts[name]) for name in _COUNTS.split()},
            "longest": self._longest,
            "longest_answer": self._longest_answer,
            "duplicates": len(self._hashes) - len(np.unique(np.frombuffer(self._hashes, np.int64))),
            "different_answers": differing,
            "different_answers_example": show(*example) if example else "",
            "special_tokens_as_text": dict(self._special_records.most_common()),
            "special_tokens_where": where,
        }


def _find_differing(questions: "array[int]", answers: "array[int]") -> tuple[int, tuple[int, int] | None]:
    """The number of questions that have more than one answer, and the first two records of such a question."""
    import numpy as np

    asked, said = np.frombuffer(questions, np.int64), np.frombuffer(answers, np.int64)
    order = np.lexsort((said, asked))
    is_same, is_other = np.diff(asked[order]) == 0, np.diff(said[order]) != 0
    differing = np.unique(asked[order[1:][is_same & is_other]])
    if not len(differing):
        return 0, None
    first = np.flatnonzero(np.isin(asked, differing))[0]
    return len(differing), (int(first), int(np.flatnonzero((asked == asked[first]) & (said != said[first]))[0]))


def warnings(train: Mapping[str, Any], held_out: Mapping[str, Any], *, near_in_train: int) -> list[str]:
    """What to check before training. `near_in_train`: evaluation records that are nearly in the training set."""
    return [
        *_split_warnings("обучение", "training", train),
        *_split_warnings("валидация", "evaluation", held_out),
        *_restraint_warnings(train),
        *_evaluation_warnings(held_out, near_in_train),
    ]


def _split_warnings(ru: str, en: str, facts: Mapping[str, Any]) -> Iterator[str]:
    total = facts["conversations"]
    if count := facts["without_learned_tokens"]:
        yield (
            f"Диалогов без обучаемых токенов ({ru}): {count:,} из {total:,}; проверьте шаблон и ответы · "
            f"Conversations without trained tokens ({en}): {count:,} of {total:,}; check the template and the answers"
        )
    if count := facts["answers_without_end"]:
        yield (
            f"Ответов без токена конца ({ru}): {count:,}; модель не научится останавливаться · "
            f"Answers without an end-of-turn token ({en}): {count:,}; the model will not learn to stop"
        )
    if (count := facts["duplicates"]) > _MAX_DUPLICATES * total:
        yield (
            f"Точных дубликатов ({ru}): {count:,} из {total:,}, {count / total:.1%}; удалите лишние · "
            f"Exact duplicates ({en}): {count:,} of {total:,}, {count / total:.1%}; remove them"
        )
    if count := facts["different_answers"]:
        yield (
            f"Вопросов с разными ответами ({ru}): {count:,}; модель не поймёт, какой верен: оставьте один · "
            f"Questions with different answers ({en}): {count:,}; the model cannot learn which is right: keep one: "
            f"{facts['different_answers_example']}"
        )
    if facts["tokens"] and (share := facts["learned_tokens"] / facts["tokens"]) < _MIN_TRAINED:
        yield (
            f"Обучаемых токенов лишь {share:.1%} ({ru}): почти всё время уйдёт на контекст; сократите запросы · "
            f"Only {share:.1%} of the tokens are trained ({en}): nearly all time goes to context; shorten the prompts"
        )


def _restraint_warnings(train: Mapping[str, Any]) -> Iterator[str]:
    answers, nothing = train["answers"], train["nothing_found"]
    if answers and 2 * train["structured"] >= answers and nothing < _MIN_NOTHING * answers:
        yield (
            f"Ответов «ничего нет»: {nothing:,} из {answers:,}, меньше {_MIN_NOTHING:.0%}; модель будет находить "
            f"что-то в любом тексте: добавьте такие записи · Answers that nothing was found: {nothing:,} of "
            f"{answers:,}, under {_MIN_NOTHING:.0%}; the model will find something in any text: add such records"
        )
    tools, silent = train["with_tools"], train["no_call"]
    if tools and silent < _MIN_NO_CALL * tools:
        yield (
            f"Диалогов с инструментами без вызова: {silent:,} из {tools:,}, меньше {_MIN_NO_CALL:.0%}; модель будет "
            f"вызывать их без нужды: добавьте такие записи · Conversations with tools but no call: {silent:,} of "
            f"{tools:,}, under {_MIN_NO_CALL:.0%}; the model will call tools needlessly: add such records"
        )


def _evaluation_warnings(held_out: Mapping[str, Any], near_in_train: int) -> Iterator[str]:
    total = held_out["conversations"]
    if near_in_train:
        yield (
            f"Диалогов валидации, почти совпадающих с обучением: {near_in_train:,} из {total:,}; оценка будет "
            f"завышена: уберите их из одной из выборок · Evaluation records nearly the same as in training: "
            f"{near_in_train:,} of {total:,}; the results will be too good: remove them from one of the sets"
        )
    if not total:
        yield (
            "Валидационной выборки нет: записей слишком мало, чтобы их разделить; добавьте записи · "
            "There is no evaluation set: the records are too few to split; add records"
        )
    elif total < _MIN_HELD_OUT:
        yield (
            f"Диалогов в валидации: {total:,}, меньше {_MIN_HELD_OUT}; оценка будет неточной: добавьте записи · "
            f"Evaluation records: {total:,}, fewer than {_MIN_HELD_OUT}; the results will be imprecise: add records"
        )


def length_warnings(part: str, count: int, total: int, limit: int) -> Iterator[str]:
    """`part`: the parameter that names the records; `count`: those cut or left out."""
    if count > _MAX_TOO_LONG * total:
        yield (
            f"Записей длиннее {limit:,} токенов ({part}): {count:,} из {total:,}, {count / total:.1%}; увеличьте "
            f"max_seq_length или сократите тексты · Records over {limit:,} tokens ({part}): {count:,} of {total:,}, "
            f"{count / total:.1%}; raise max_seq_length or shorten the texts"
        )


def show_difference(one: Mapping[str, Any], other: Mapping[str, Any], places: Sequence[str]) -> str:
    """Quote a question and, from shortly before they differ, its two answers."""
    last = trained_answers(one["messages"])[-1]
    asked = [message["content"] for message in one["messages"][:last] if message["role"] == "user"][-1]
    said = [" ".join(_last_answer(each["messages"]).split()) for each in (one, other)]
    start = max(0, len(commonprefix(said)) - _SHOWN_BEFORE)  # noqa: RUF071  # of characters, as it should be
    shown = [
        f"«{'…' * (start > 0)}{text[start : start + _SHOWN]}» ({place})"
        for text, place in zip(said, places, strict=True)
    ]
    return f"«{' '.join(asked.split())[:_SHOWN]}» → {', '.join(shown)}"


def _last_answer(messages: Sequence[Mapping[str, Any]]) -> str:
    last = messages[trained_answers(messages)[-1]]
    return str(last["content"]) + (_JSON(_calls_without_ids(last)) if last.get("tool_calls") else "")


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
    short = answer.strip()
    plain = _plain(answer).strip(" .!")
    return len(short) <= _LONGEST_NOTHING and (plain in _NOTHING or _SAYS_NOTHING.search(plain) is not None)


def _is_hollow(value: object) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return value in (None, "") if inner is None else all(map(_is_hollow, inner))


def _calls_without_ids(message: Mapping[str, Any]) -> list[Any]:
    return [[call["function"]["name"], _DECODE(call["function"]["arguments"])] for call in message["tool_calls"]]


def _match_any(tokens: Iterable[str]) -> re.Pattern[str]:
    """Match the longest token at a place. A tree of letters: alternatives are slow for models that reserve 1,000."""
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


def find_damage(messages: Sequence[Mapping[str, Any]]) -> set[str]:
    """The kinds of damage in the contents and thoughts of messages and in the arguments of calls."""
    calls = (call["function"]["arguments"] for each in messages for call in each.get("tool_calls") or ())
    contents = (each.get(key) or "" for each in messages for key in ("content", thoughts.KEY))
    text = "\n".join([*contents, *calls])
    return {str(match.lastgroup) for match in _DAMAGE.finditer(text)} if _SUSPECT.search(text) else set()


def damage_warnings(damaged: Mapping[str, tuple[int, Sequence[str]]]) -> Iterator[str]:
    """`damaged`: the number of records and the places of the first, by kind."""
    for kind in filter(damaged.__contains__, _DAMAGE_WARNINGS):
        number, places = damaged[kind]
        yield _DAMAGE_WARNINGS[kind].format(number, ", ".join(places))
