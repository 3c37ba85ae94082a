"""List the shapes of records, and recognise the kind, the compression and the encoding of their files."""

import codecs
import gzip
import io
from pathlib import Path
from typing import BinaryIO, cast

from saigakit.core.lazy import pyarrow
from saigakit.errors import SaigaError

Shape = tuple[str, ...]  # the key of a list of messages; or the keys of a question, one is enough, and of its answer
SHAPES: tuple[Shape, ...] = (
    ("messages",),
    ("conversations",),
    ("conversation",),  # LMSYS-Chat-1M, ms-swift
    ("user", "bot"),
    ("instruction", "input", "output"),  # Alpaca
    ("instruction", "input", "response"),  # axolotl's gpteacher
    ("prompt", "completion"),  # TRL, mlx-lm
    ("prompt", "response"),  # ms-swift, as is the next
    ("query", "response"),
    ("question", "answer"),  # axolotl's alpaca_chat.load_qa
)
_PACKED = ("", ".gz", ".zst")
TABLES = tuple(kind + packed for kind in (".csv", ".tsv") for packed in _PACKED)
# The files that are read of a directory or a data set, and tables if there is nothing else.
SUFFIXES = (*(kind + packed for packed in _PACKED for kind in (".jsonl", ".ndjson", ".json")), ".parquet")
REFUSED = {  # what to do about other kinds of files
    ".xlsx": "is a table of Excel; save it as CSV in UTF-8 with the columns user and bot (and system), or messages",
    ".zip": "is an archive; unpack it and name the file or the directory in it",
    ".xz": "is compressed with xz; decompress it with `xz -d`, or use gzip or zstd instead",
    ".bz2": "is compressed with bzip2; decompress it with `bunzip2`, or use gzip or zstd instead",
    ".parquet.gz": "is a gzipped Parquet file; decompress it with `gunzip`",
    ".parquet.zst": "is a Parquet file compressed with zstd; decompress it with `zstd -d`",
}
FILES = (*SUFFIXES, *TABLES, ".arrow", *REFUSED)  # a name with such an ending is a file, not a data set
METADATA = {"dataset-metadata.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_MAGIC = {
    b"\x1f\x8b": ".gz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"PK\x03\x04": ".zip",
    b"\xfd7zXZ\x00": ".xz",
    b"BZh": ".bz2",
    b"PAR1": ".parquet",
}
_CYRILLIC = ("cp1251", "koi8-r", "cp866")
_FREQUENT, _LEAST = frozenset("оеаинтсрвл"), 0.45  # these letters are about 0.6 of a Russian text


def kind_of(path: Path) -> str:
    """The suffix that a file should have by its first bytes, or else the one that it has."""
    for ending, remedy in REFUSED.items():
        if path.name.lower().endswith(ending):
            raise SaigaError(f"{path} {remedy}.")
    with path.open("rb") as stream:
        return _kind_by_content(stream.read(6)) or path.suffix.lower()


def _kind_by_content(head: bytes) -> str:
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), "")


def open_text(path: Path, kind: str) -> BinaryIO:
    """Decompress gzip and zstd, also of several members or frames."""
    if kind == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if kind == ".zst":
        return cast(BinaryIO, io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")))
    return path.open("rb")


def refuse_by_content(path: Path, head: bytes) -> None:
    """`head`: the beginning of the decompressed content."""
    kind = _kind_by_content(head)
    if kind in REFUSED:
        raise SaigaError(f"{path} {REFUSED[kind]}.")
    if kind:
        raise SaigaError(f"{path} is compressed twice, or a compressed {kind[1:]} file; decompress it.")


def find_other_encoding(head: bytes) -> tuple[int, str] | None:
    """(line, encoding) of a text that begins with `head` and is not UTF-8, if it can be told which encoding it is."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return 1, "utf-16"
    if 0 in head[:2] and any(head[:2]):
        return 1, "utf-16be" if head[0] == 0 else "utf-16le"
    lines = [(number, line) for number, line in enumerate(head.split(b"\n"), 1) if not line.isascii()]
    if not lines or any(_is_utf8(line) for _, line in lines):
        return None
    content = b"".join(line for _, line in lines)
    texts = {each: [letter for letter in content.decode(each, "ignore") if letter > "\x7f"] for each in _CYRILLIC}
    shares = {each: sum(map(_FREQUENT.__contains__, text)) / max(1, len(text)) for each, text in texts.items()}
    best = max(shares, key=shares.__getitem__)
    return (lines[0][0], best) if shares[best] >= _LEAST else None


def _is_utf8(line: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(line)  # unlike bytes.decode, accepts half a letter at the end
    except UnicodeDecodeError:
        return False
    return True
