"""Normalised conversations into a file and out of it again: a million of them take 8 MB of memory."""

import bisect
import json
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, overload

from saigakit.core import workspace
from saigakit.data.schema import Conversation

_BLOCK = 2**20  # bytes read ahead where one conversation follows another
_LINE_ENDS = {character: f"\\u{ord(character):04x}" for character in "\u0085\u2028\u2029"}
_ENCODER = json.JSONEncoder(ensure_ascii=False)
_DECODER = json.JSONDecoder()


class Origins:
    """Where conversations were read: files by their labels, and in them lines, in 4 bytes each."""

    def __init__(self, labels: Sequence[str]) -> None:
        """Each conversation is one line, unless others are added."""
        self._labels = list(labels)
        self._firsts = [0]  # of each file, the number of its first conversation
        self._lines: array[int] | None = None

    def begin(self, file: int) -> None:
        self._lines = array("i") if self._lines is None else self._lines
        self._firsts[file:] = [len(self._lines)]

    def add(self, line: int) -> None:
        assert self._lines is not None
        self._lines.append(line)

    def of(self, number: int) -> str:
        file = bisect.bisect_right(self._firsts, number) - 1
        return f"{self._labels[file]}:{number + 1 if self._lines is None else self._lines[number]}"


class Conversations(Sequence[Conversation]):
    """Lines of a file, each made an object when it is asked for; a selection shares the file."""

    def __init__(
        self, stream: BinaryIO, offsets: "array[int]", indices: Sequence[int], origins: Origins | None = None
    ) -> None:
        self._stream = stream
        self._offsets = offsets  # where each line begins, and the end
        self._indices = indices
        self._origins = origins

    @classmethod
    def of_file(cls, file: Path) -> "Conversations":
        """Of a file that `data.write_conversations` made, which is not checked again."""
        stream = file.open("rb")
        return cls._of_lines(stream, stream, Origins([file.name]))

    @classmethod
    def stored(
        cls, conversations: Iterable[Conversation], *, expected: int = 0, origins: Origins | None = None
    ) -> "Conversations":
        """In a file without a name, which ends with the process. `expected`: bytes that it will have at least.

        Raises SaigaError where the disk has no room for it.
        """
        directory, what = workspace.scratch_dir(), "The checked copy of the records"
        if workspace.free_disk(directory) < expected:
            raise workspace.scratch_full(what, expected)
        stream = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115  # it is read as long as the object lives
        try:
            stored = cls._of_lines(stream, _written(conversations, stream), origins)
            stream.flush()
        except OSError as error:
            if not workspace.is_full(error):
                raise
            expected = max(expected, os.fstat(stream.fileno()).st_size)
            with suppress(OSError):  # what is in its buffer has no room either
                stream.close()
            raise workspace.scratch_full(what, expected) from None
        return stored

    @classmethod
    def _of_lines(cls, stream: BinaryIO, lines: Iterable[bytes], origins: Origins | None) -> "Conversations":
        offsets, end = array("q", [0]), 0
        for line in lines:
            end += len(line)
            offsets.append(end)
        return cls(stream, offsets, range(len(offsets) - 1), origins)

    def select(self, indices: Iterable[int]) -> "Conversations":
        return self._of(array("q", (self._indices[index] for index in indices)))

    def _of(self, indices: Sequence[int]) -> "Conversations":
        return Conversations(self._stream, self._offsets, indices, self._origins)

    def origin(self, index: int) -> str | None:
        """ "records.jsonl:17", where a conversation was read; None for those that were made."""
        return None if self._origins is None else self._origins.of(self._indices[index])

    @property
    def places(self) -> Sequence[int]:
        """Of each conversation, the number of its line in the file."""
        return self._indices

    def lines(self) -> Iterator[bytes]:
        """Each as one line of JSON, its end included."""
        block, start, following = b"", 0, -1
        for index in self._indices:
            begin, end = self._offsets[index], self._offsets[index + 1]
            if begin < start or end > start + len(block):
                block, start = self._bytes(begin, max(end - begin, _BLOCK if begin == following else 0)), begin
            following = end
            yield block[begin - start : end - start]

    def _bytes(self, begin: int, count: int) -> bytes:
        return os.pread(self._stream.fileno(), count, begin)  # leaves alone the place that a forked process shares

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[Conversation]:
        return map(_conversation, self.lines())

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> "Conversations": ...
    def __getitem__(self, index: int | slice) -> "Conversation | Conversations":
        if isinstance(index, slice):
            return self._of(self._indices[index])
        place = self._indices[index]
        begin, end = self._offsets[place], self._offsets[place + 1]
        return _conversation(self._bytes(begin, end - begin))


def as_line(conversation: Mapping[str, Any]) -> bytes:
    """Only "\\n" looks like a line's end in it, even to str.splitlines."""
    kept = {"messages": conversation["messages"]}
    if "tools" in conversation:
        kept["tools"] = conversation["tools"]
    line = _ENCODER.encode(kept)
    for character, escaped in _LINE_ENDS.items():
        line = line.replace(character, escaped)
    return f"{line}\n".encode()


def _conversation(line: bytes) -> Conversation:
    made: Conversation = _DECODER.decode(line.decode("utf-8"))
    return made


def _written(conversations: Iterable[Conversation], stream: BinaryIO) -> Iterator[bytes]:
    for conversation in conversations:
        line = as_line(conversation)
        stream.write(line)
        yield line
