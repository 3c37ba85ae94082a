"""Turn evaluation records into questions with reference answers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from saigakit.errors import SaigaError
from saigakit.prompt import encoding
from saigakit.prompt.template import Message, drop_nulls

MARGIN = 16  # tokens by which an answer may exceed the longest reference


class Question(NamedTuple):
    """The messages up to an answer, and that answer as the reference."""

    messages: list[Message]
    answer: Message
    tools: str | None = None  # JSON text

    def prompt(self, tokenizer: encoding.Tokenizer) -> list[int]:
        return encoding.encode(self.messages, tokenizer, tools=self.tools, add_generation_prompt=True)["input_ids"]

    def reference(self, tokenizer: encoding.Tokenizer) -> str:
        """The text of the answer; function calls as the model writes them."""
        if "tool_calls" not in self.answer:
            return str(self.answer["content"])
        messages = encoding.cut_after_answers([*self.messages, self.answer])[-1]
        labels = encoding.encode(messages, tokenizer, tools=self.tools)["labels"][len(self.prompt(tokenizer)) :]
        return tokenizer.decode([label for label in labels if label != encoding.IGNORE_INDEX])


def make_question(conversation: Mapping[str, Any]) -> Question | None:
    """Ask for the last answer whose weight is not 0; None if the assistant never answers."""
    messages: list[Message] = [drop_nulls(message) for message in conversation["messages"]]
    last = max(encoding.trained_answers(messages), default=0)
    return Question(messages[:last], messages[last], conversation.get("tools")) if last else None


def read_examples(file: Path) -> list[Question]:
    lines = file.read_text(encoding="utf-8").split("\n")  # not splitlines: JSON strings may contain U+2028
    questions = [question for line in lines if line and (question := make_question(json.loads(line)))]
    if not questions:
        raise SaigaError(f"{file} has no conversation with an answer, so there is nothing to compare.")
    return questions
