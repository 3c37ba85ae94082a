"""Normalise a record of any supported format to a conversation, or list its problems."""

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from saigakit.data import shapes, tool_calls
from saigakit.data.formats import Shape
from saigakit.data.records import BadRecord, quote
from saigakit.data.tool_calls import describe, describe_type, is_empty, text_problems

# "role", "content" and, if present, "reasoning_content", "tool_calls", "tool_call_id", "name", "weight"
Message = dict[str, Any]
Conversation = dict[str, Any]  # "messages" and, if present, "tools"
_Turn = tuple[str, Message]  # the name of the content's field, and the message
_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "bot", "gpt", "chatgpt", "model"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
    "function_call": "call",  # its text is JSON of calls
}
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_OF_ROLE = {  # what a message may have besides its content
    "assistant": ("tool_calls", "function_call", "weight", *_THOUGHTS),
    "call": ("weight", *_THOUGHTS),
    "tool": ("tool_call_id", "name"),  # of the call that it answers
}
_NEXT = {
    "start": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "call": ("tool",),
    "tool": ("tool", "assistant"),
}
_ORDER = "use the order system (optional), user, assistant, user …"


@dataclasses.dataclass
class Notes:
    """What was not taken as it is, over all records."""

    unread: Counter[str] = dataclasses.field(default_factory=Counter)  # keys, with the number of records that have them
    as_json: int = 0  # answers that were lists or objects


def normalise_record(record: object, notes: Notes | None = None) -> Conversation | BadRecord:
    """Accept a list of messages (OpenAI's or ShareGPT's) or a question and its answer, under the keys in `shapes`.

    A "system" beside them becomes the first message. "tools" and calls become OpenAI's, with tools and arguments as
    JSON text, so that they fit one column of a Dataset. A thought before an answer becomes its "reasoning_content".
    What is empty is ignored; what is not used is counted in `notes`.
    """
    record = {"messages": record} if isinstance(record, list) else record
    if not isinstance(record, dict):
        return BadRecord((f"record: is {describe_type(record)}; it must be an object",))
    found = shapes.find_shapes(record)
    if isinstance(found, BadRecord):
        return found
    outside = [key for key in ("function_call", "tool_call_id", "tool_calls") if record.get(key)]
    problems = [f"{key}: is outside the messages; move it into its message" for key in outside]
    tools = tool_calls.read_tools(record, problems)
    names = None if problems else [tool["function"]["name"] for tool in tools]
    first, *others = [_Reading(shape, record, names) for shape in found]
    if any(other.messages != first.messages for other in others):
        named = ", ".join(" and ".join(shape) for shape in found)
        return BadRecord((f"record: has different conversations under {named}; write each as a record",))
    problems += first.problems
    if problems := problems or _turn_problems(first.turns):
        return BadRecord(tuple(problems))
    if notes:
        notes.as_json += first.as_json
        if (unused := record.keys() - shapes.READ[found[0]]) or first.unread:
            unused.difference_update(*found[1:])
            for key in (*shapes.informative(record, unused), *first.unread):  # Counter.update takes 1 µs more
                notes.unread[key] += 1
    return {"messages": first.messages, **({"tools": tool_calls.to_json(tools)} if tools else {})}


class _Reading:
    """The turns of a record of one shape, their problems, and what is not used."""

    def __init__(self, shape: Shape, record: Mapping[str, Any], names: Collection[str] | None) -> None:
        """`names`: the functions that can be called, or None if unknown."""
        self.names = names
        self.turns: list[_Turn] = []
        self.problems: list[str] = []
        self.unread: set[str] = set()
        self.as_json = 0
        if not is_empty(record.get("system")):
            self._add("system", "system", record["system"])
        if len(shape) == 1:
            self._add_list(shape[0], record[shape[0]])
        else:
            self._add_pair(shape, record)

    @property
    def messages(self) -> list[Message]:
        return [message for _, message in self.turns]

    def _add_pair(self, shape: Shape, record: Mapping[str, Any]) -> None:
        if not is_empty(record.get("history")):
            self._add_history(record["history"])
        *given, last = shape
        keys = given if len(given) == 1 else shapes.informative(record, given) or given[:1]
        question, answer = record.get(keys[0]), record.get(last)
        if len(keys) > 1:  # one line end, as in LLaMA-Factory's converter and axolotl's AlpacaPrompter for chats
            others = [record[key] for key in keys if not isinstance(record[key], str)]
            question = others[0] if others else "\n".join(record[key] for key in keys)
        is_list = shapes.is_messages(question)
        if is_list:
            self._add_list(keys[0], question)
        else:
            self._add(" and ".join(keys), "user", question)
        if shapes.is_messages(answer) and (is_list or shapes.are_complete(answer)):
            self._add_list(last, answer)
        else:
            self._add(last, "assistant", answer)

    def _add_history(self, history: object) -> None:
        """Add earlier turns, which LLaMA-Factory's Alpaca has as pairs of a question and an answer."""
        for index, pair in enumerate(tool_calls.decode("history", history, list, "a list", self.problems) or ()):
            where = f"history[{index}]"
            if isinstance(pair, list) and len(pair) == 2:
                self._add(f"{where}[0]", "user", pair[0])
                self._add(f"{where}[1]", "assistant", pair[1])
            else:
                self.problems.append(
                    f"{where}: is {describe_type(pair)}; it must be a list of a question and an answer"
                )

    def _add_list(self, name: str, messages: object) -> None:
        for index, message in enumerate(self._rows(name, messages)):
            where = f"{name}[{index}]"
            if not isinstance(message, dict):
                self.problems.append(
                    f"{where}: is {describe_type(message)}; it must be an object with role and content"
                )
                continue
            is_sharegpt = not message.get("role") and ("from" in message or "value" in message)
            role_key, content_key = ("from", "value") if is_sharegpt else ("role", "content")
            given, content = message.get(role_key), message.get(content_key)
            role = _ROLES.get(given) or _ROLES.get(given.strip().lower()) if isinstance(given, str) else None
            if role == "system" and is_empty(content):
                continue
            if role is None:
                shown = "missing" if given is None else describe(given)
                self.problems.append(f"{where}.{role_key}: is {shown}; use system, user, assistant or tool")
            elif len(message) == 2 and content is not None:  # most messages have nothing else
                self._add(f"{where}.{content_key}", role, content)
            else:
                known = (role_key, content_key, *_OF_ROLE.get(role, ()))
                self.unread |= tool_calls.unread_keys(where, message, known)
                self._add(f"{where}.{content_key}", role, content, {key: message.get(key) for key in known[2:]})

    def _rows(self, name: str, messages: object) -> Sequence[object]:
        """The messages, also from JSON text, and from columns, as `datasets` stores a sequence of objects."""
        if isinstance(messages, str) and messages.lstrip().startswith(("[", "{")):
            messages = tool_calls.decode(name, messages, object, "a list of messages", self.problems)
            if messages is None:
                return ()
        if isinstance(messages, dict) and (columns := {k: v for k, v in messages.items() if v and isinstance(v, list)}):
            self.unread |= tool_calls.unread_keys(name, messages, columns)
            if len({len(column) for column in columns.values()}) == 1:
                return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            lengths = ", ".join(f"{quote(key)} {len(column)}" for key, column in columns.items())
            self.problems.append(f"{name}: its columns have different lengths ({lengths}); add what is missing")
            return ()
        if not isinstance(messages, list) or not messages:
            self.problems.append(f"{name}: is {describe_type(messages)}; it must be a list of messages")
            return ()
        return messages

    def _add(self, where: str, role: str, content: object, others: Mapping[str, Any] | None = None) -> None:
        """`where`: the field of the content. `others`: what else the message has."""
        calls = (where, content) if role == "call" else None
        turn: Message = {"role": "assistant" if calls else role, "content": ""}
        if others:
            calls = self._add_others(where.rpartition(".")[0], others, turn) or calls
        if calls:
            turn["tool_calls"] = tool_calls.read_calls(*calls, self.names, self.problems, self.unread)
            content = "" if role == "call" or is_empty(content) else content
        text = content if isinstance(content, str) else self._as_text(where, content, turn["role"])
        if text and turn["role"] == "assistant":
            text = shapes.split_thought(where, text, turn, self.problems)
        if text is not None and not (text == "" and (calls or role == "tool")):  # a call, or an empty result
            self.problems += text_problems(f"{where} after the thought" if "reasoning_content" in turn else where, text)
        turn["content"] = text
        self.turns.append((where, turn))

    def _add_others(self, where: str, others: Mapping[str, Any], turn: Message) -> tuple[str, object] | None:
        """Return the calls."""
        if turn["role"] == "tool":
            answered = {key: text for key, text in others.items() if not is_empty(text)}
            self.problems += [each for key, text in answered.items() for each in text_problems(f"{where}.{key}", text)]
            turn |= answered
        if turn["role"] != "assistant":
            return None
        weight = others.get("weight")
        if isinstance(weight, bool) or weight not in (None, 0, 1):
            shown = weight if isinstance(weight, int | float) else describe_type(weight)
            self.problems.append(
                f"{where}.weight: is {shown}; use 0 for an answer that must not be trained, otherwise 1"
            )
        elif weight == 0:  # as in OpenAI's fine-tuning files
            turn["weight"] = 0
        for key in shapes.informative(others, _THOUGHTS):
            shapes.add_thought(f"{where}.{key}", others[key], turn, self.problems)
        return tool_calls.find_calls(where, others, self.problems)

    def _as_text(self, where: str, content: object, role: str) -> str | None:
        """None if there are problems."""
        before, text = len(self.problems), ""
        if shapes.is_parts(content):
            text = shapes.join_parts(where, content, self.problems, self.unread)
        elif role == "assistant" and isinstance(content, list | dict):
            self.problems += tool_calls.value_problems(where, content)
            self.as_json += 1
            text = tool_calls.to_json(content) if len(self.problems) == before else ""
        else:
            self.problems += text_problems(where, content)
        return text if len(self.problems) == before else None


def _turn_problems(turns: Sequence[_Turn]) -> list[str]:
    """Check the order of the roles, that every tool_call_id is one of the previous calls, and that an answer counts."""
    state, problems = "start", []
    ids: Sequence[str] = ()
    for field, message in turns:
        where, role, answered = field.partition(".")[0], message["role"], message.get("tool_call_id")
        if role not in _NEXT[state]:
            has_tools = state == "call" or any(each["role"] == "tool" for _, each in turns)
            order = f"{_ORDER}, with tool and assistant after tool_calls" if has_tools else _ORDER
            return [f"{where}: the role is {role}, expected {_NEXT[state][-1]}; {order}"]
        if answered is not None and answered not in ids:
            known = ", ".join(map(quote, ids)) or "none"
            problems.append(
                f"{where}.tool_call_id: is {quote(answered)}; the ids of the previous assistant turn are {known}"
            )
        state = role
        if "tool_calls" in message:
            state, ids = "call", [call["id"] for call in message["tool_calls"] if "id" in call]
    if role != "assistant":
        return [f"{where}: the last message is of {role}; end with one of the assistant"]
    if all(message.get("weight") == 0 for _, message in turns if message["role"] == "assistant"):
        where = where.partition("[")[0]
        problems.append(f"{where}: all answers have weight 0, so nothing is trained; leave the record out")
    return problems
