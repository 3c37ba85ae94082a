"""A Jinja chat template into the texts around each message, for programs whose templates are no Jinja."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from saigakit.errors import SaigaError
from saigakit.prompt import template
from saigakit.prompt.template import Message

_WORDS = tuple(f"⟦Яя{number}⟧" for number in range(6))  # in no template, so each is found again where it was rendered
_TOOLS = tuple(
    {
        "type": "function",
        "function": {
            "name": f"do_{word}",
            "description": f"О {word}",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "string", "description": word}},
                "required": ["a"],
            },
        },
    }
    for word in ("⟦Tt⟧", "⟦Uu⟧")
)
_CALLS = tuple({"name": f"do_{word}", "arguments": {"a": word, "b": [1, {"c": True}]}} for word in ("⟦Tt⟧", "⟦Uu⟧"))


@dataclass(frozen=True, kw_only=True)
class ToolFormat:
    """Texts around descriptions of functions, calls and results; each JSON is that of Python's json.dumps."""

    before: str  # the descriptions, where there is no system message
    before_with_system: str  # from the system message's text to the descriptions
    between: str
    after: str
    call: str  # before the first call of an answer
    call_after_text: str  # where the answer also has words
    between_calls: str
    after_calls: str
    result: str
    between_results: str
    after_results: str


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """Texts around the messages of a prompt. `turns`: before and after what user and assistant say."""

    begin: str  # of a prompt without a system message
    system: tuple[str, str]
    turns: Mapping[str, tuple[str, str]]
    answer: str  # what the model goes on from
    tools: ToolFormat | None
    is_trimmed: bool  # the template takes blanks off both ends of a text

    @classmethod
    def of(cls, chat_template: str, variables: Mapping[str, str], end_of_turn: str) -> Self:
        """Found by rendering; `variables` are bos_token and the like, `end_of_turn` is what an answer ends with.

        Raises SaigaError where a prompt is not the texts of its turns in a row.
        """
        made = cls._found(chat_template, variables, end_of_turn)
        for messages, tools in _tried(made.tools is not None):
            if made.prompt(messages, tools) != _rendered(chat_template, variables, messages, tools):
                raise _unknown(f"it renders {len(messages)} messages otherwise than their parts")
        return made

    @classmethod
    def _found(cls, chat_template: str, variables: Mapping[str, str], end_of_turn: str) -> Self:
        def parts(messages: Sequence[Message], words: Sequence[str]) -> list[str]:
            return _split(_rendered(chat_template, variables, messages, None), words)

        system, asked, answered, again = _WORDS[:4]
        head, rest = parts([_user(asked)], [asked])
        _, to_answer, to_question, _ = parts(
            [_user(asked), _assistant(answered), _user(again)], [asked, answered, again]
        )
        before_system, from_system, _ = parts([_system(system), _user(asked)], [system, asked])
        after_answer, before_user = _cut(to_question, end_of_turn)
        after_user, before_answer = _cut(to_answer, end_of_turn)
        padded = _rendered(chat_template, variables, [_user(f"  {asked}\n")], None)
        return cls(
            begin=_without_end(head, before_user),
            system=(before_system, _without_end(from_system, before_user)),
            turns={"user": (before_user, after_user), "assistant": (before_answer, after_answer)},
            answer=rest.removeprefix(after_user),
            tools=_tools(chat_template, variables, (before_user, after_answer, to_answer, before_answer)),
            is_trimmed=f"  {asked}" not in padded,
        )

    def prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """As the Jinja template renders it."""
        system = next((message["content"] for message in messages if message["role"] == "system"), "")
        text, follows_result = self._beginning(system, tools), False
        for message in messages:
            if message["role"] == "tool" and self.tools and tools:
                text += self.tools.between_results if follows_result else self.tools.result
                text, follows_result = text + message["content"], True
            elif message["role"] in self.turns:
                text += self._after_results(follows_result)
                before, after = self.turns[message["role"]]
                text += before + message["content"] + self._calls(message, tools) + after
                follows_result = False
        return text + self._after_results(follows_result) + self.answer

    def _beginning(self, system: str, tools: Sequence[Mapping[str, Any]] | None) -> str:
        if tools and self.tools:
            head = self.system[0] + system + self.tools.before_with_system if system else self.tools.before
            return head + self.tools.between.join(map(_json, tools)) + self.tools.after
        return self.system[0] + system + self.system[1] if system else self.begin

    def _after_results(self, follows_result: bool) -> str:
        return self.tools.after_results if self.tools and follows_result else ""

    def _calls(self, message: Message, tools: Sequence[Mapping[str, Any]] | None) -> str:
        if not (self.tools and tools and message.get("tool_calls")):
            return ""
        head = self.tools.call_after_text if message["content"] else self.tools.call
        calls = [_json({key: call["function"][key] for key in ("name", "arguments")}) for call in message["tool_calls"]]
        return head + self.tools.between_calls.join(calls) + self.tools.after_calls


def _tools(chat_template: str, variables: Mapping[str, str], known: tuple[str, str, str, str]) -> ToolFormat | None:
    """None where the template has no functions, or writes them otherwise than as the JSON of a description."""
    before_user, after_answer, to_answer, before_answer = known
    system, asked, answered, again, first, second = _WORDS
    described, calls = list(map(_json, _TOOLS)), list(map(_json, _CALLS))

    def parts(messages: Sequence[Message], words: Sequence[str]) -> list[str]:
        return _split(_rendered(chat_template, variables, messages, _TOOLS), words)

    talk = [_user(asked), _calling(""), _result(first), _result(second), _assistant(answered), _user(again)]
    try:
        before, between, after, _ = parts([_user(asked)], [*described, asked])
        _, from_system, _, _, _ = parts([_system(system), _user(asked)], [system, *described, asked])
        words = [asked, *calls, first, second, answered]
        *_, to_call, between_calls, to_result, between_results, from_results, _ = parts(talk, words)
        *_, after_text, _, _, _ = parts(
            [_user(asked), _calling(answered), _result(first)], [asked, answered, *calls, first]
        )
        after_calls, cut, result = to_result.partition(after_answer)
        if not cut or not to_call.startswith(to_answer):
            return None
        return ToolFormat(
            before=before,
            before_with_system=from_system,
            between=between,
            after=_without_end(after, before_user),
            call=to_call.removeprefix(to_answer),
            call_after_text=after_text,
            between_calls=between_calls,
            after_calls=after_calls,
            result=result,
            between_results=between_results,
            after_results=_without_end(from_results, before_answer),
        )
    except SaigaError:
        return None


def _tried(with_tools: bool) -> list[tuple[list[Message], Sequence[Mapping[str, Any]] | None]]:
    """Conversations in which each part stands beside each other that it can stand beside."""
    system, asked, answered, again, first, second = _WORDS
    talk = [_user(asked), _assistant(answered), _user(again), _assistant(second), _user(first)]
    tried: list[tuple[list[Message], Sequence[Mapping[str, Any]] | None]] = []
    for head in ([], [_system(system)]):
        tried += [(head + talk, None), (head + talk[:1], None)]
        for text in ("", answered) if with_tools else ():
            called = [*head, *talk[:3], _calling(text), _result(first)]
            tried += [
                ([*head, *talk], _TOOLS[:1]),
                (called, _TOOLS),
                ([*called, _result(second), _assistant(answered), _user(again)], _TOOLS),
            ]
    return tried


def _rendered(
    chat_template: str,
    variables: Mapping[str, str],
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
) -> str:
    return template.render(messages, chat_template, tools=tools, add_generation_prompt=True, variables=variables)


def _split(text: str, words: Sequence[str]) -> list[str]:
    """What stands between `words`. Raises SaigaError where one of them is not there once."""
    found = []
    for word in words:
        before, there, text = text.partition(word)
        if not there:
            raise _unknown(f"{word!r} of a message is not found in what it renders")
        found.append(before)
    return [*found, text]


def _cut(text: str, end_of_turn: str) -> tuple[str, str]:
    """What ends one turn and what begins the next."""
    end = text.find(end_of_turn)
    if end < 0:
        return "", text
    rest = text[end + len(end_of_turn) :]
    blanks = len(rest) - len(rest.lstrip())
    return text[: len(text) - len(rest) + blanks], rest[blanks:]


def _without_end(text: str, end: str) -> str:
    if not text.endswith(end):
        raise _unknown(f"{end!r} does not stand before each turn")
    return text[: len(text) - len(end)]


def _unknown(why: str) -> SaigaError:
    return SaigaError(
        f"The chat template of this model is not the texts of its turns in a row ({why}), so no template of another "
        "kind can be made from it. Use llama-server --jinja, which reads the template inside the GGUF."
    )


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _system(text: str) -> Message:
    return {"role": "system", "content": text}


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _calling(text: str) -> Message:
    calls = [{"id": f"c{number}", "type": "function", "function": call} for number, call in enumerate(_CALLS)]
    return {"role": "assistant", "content": text, "tool_calls": calls}


def _result(text: str) -> Message:
    return {"role": "tool", "content": text}
