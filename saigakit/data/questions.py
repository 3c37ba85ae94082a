"""Held-out conversations into questions with their right answers: what a model is asked, as ids."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from saigakit.data.store import without_nulls
from saigakit.errors import SaigaError
from saigakit.prompt import encoding
from saigakit.prompt.template import Message

MARGIN = 16  # tokens that an answer may be longer than the longest reference


class Example(NamedTuple):
    """What is asked and what the data answer."""

    messages: list[Message]
    answer: Message
    tools: str | None = None  # JSON text

    def prompt(self, tokenizer: encoding.Tokenizer) -> list[int]:
        return encoding.encode(self.messages, tokenizer, tools=self.tools, add_generation_prompt=True)["input_ids"]

    def reference(self, tokenizer: encoding.Tokenizer) -> str:
        """The answer's text; calls of functions are as the model writes them."""
        if "tool_calls" not in self.answer:
            return str(self.answer["content"])
        whole = encoding.one_answer_each([*self.messages, self.answer])[-1]
        encoded = encoding.encode(whole, tokenizer, tools=self.tools)
        labels = encoded["labels"][len(self.prompt(tokenizer)) :]
        return tokenizer.decode([label for label in labels if label != encoding.IGNORE_INDEX])


def of_conversation(conversation: Mapping[str, Any]) -> Example | None:
    """Up to its last answer that is not of weight 0, and that answer; None where the assistant never answers."""
    conversation = without_nulls(conversation)
    messages = conversation["messages"]
    answers = [i for i, each in enumerate(messages) if each["role"] == "assistant" and each.get("weight") != 0]
    last = max(answers, default=0)
    return Example(messages[:last], messages[last], conversation.get("tools")) if last else None


def read_examples(file: Path) -> list[Example]:
    """`of_conversation` of each line. Raises SaigaError where none has an answer."""
    lines = file.read_text(encoding="utf-8").split("\n")  # not splitlines: JSON strings may hold U+2028
    asked = (of_conversation(json.loads(line)) for line in lines if line)
    found = [example for example in asked if example is not None]
    if not found:
        raise SaigaError(f"{file} holds no conversation with an answer: nothing can be compared.")
    return found
