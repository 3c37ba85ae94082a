"""Conversations that fit the longest length, with the rows that they are trained as."""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Self

from saigakit.data import rows
from saigakit.data.schema import Conversation
from saigakit.data.store import Conversations
from saigakit.errors import SaigaError
from saigakit.prompt import encoding
from saigakit.prompt.encoding import Tokenizer


@dataclass
class Fitted:
    """Conversations that fit the limit, with their tokens."""

    conversations: Conversations
    encoded: rows.Rows = field(default_factory=rows.Rows)
    firsts: "array[int]" = field(default_factory=lambda: array("i", [0]))  # of each conversation's rows, and the end
    lengths: "array[int]" = field(default_factory=lambda: array("i"))  # of all, before turns were cut off
    cut: int = 0
    dropped: int = 0

    @classmethod
    def of(cls, conversations: Conversations, tokenizer: Tokenizer, limit: int, name: str) -> Self:
        made = cls(conversations)

        def fitting() -> Iterator[Conversation]:
            encoding = rows.encode_fitting(conversations, tokenizer, limit, name=name)
            for conversation, encoded, tokens, is_cut in encoding:
                made.lengths.append(tokens)
                made.cut += is_cut
                made.dropped += not encoded
                for row in encoded:
                    made.encoded.append(row)
                if encoded:
                    made.firsts.append(len(made.encoded))
                    yield dict(conversation)

        made.conversations = Conversations.stored(fitting())
        if not made.encoded:
            raise SaigaError(
                f"{name}: all {made.dropped} conversations are longer than max_seq_length={limit} tokens, the "
                f"shortest has {min(made.lengths)}. Raise max_seq_length or shorten the texts."
            )
        if said := rows.what_did_not_fit(name, len(made.lengths), made.cut, made.dropped, limit):
            print(said, flush=True)
        return made

    def rows_of(self, place: int) -> list[encoding.Example]:
        return [self.encoded[row] for row in range(self.firsts[place], self.firsts[place + 1])]
