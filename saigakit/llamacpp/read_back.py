"""Read a finished GGUF file back: the bytes that were written, and what llama.cpp makes of them."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from saigakit.errors import SaigaError
from saigakit.llamacpp import forward, quantization, streaming, vocabulary
from saigakit.llamacpp.streaming import Written
from saigakit.prompt.encoding import FastTokenizer


def require_readable(file: Path, written: Sequence[Written], tokenizer: FastTokenizer, texts: Sequence[str]) -> str:
    """Compare all bytes, load the file with llama.cpp, compare token ids, and say what was checked.

    Raises SaigaError if a check fails.
    """
    require_written(file, written)
    with forward.load_weights(file, check_tensors=True):
        pass
    checks = ["every byte is as written", "llama.cpp loads it and all its blocks are valid"]
    if texts:
        checks.append(_check_ids(file, tokenizer, texts))
    return f"Read back: {', '.join(checks)}."


def _check_ids(file: Path, tokenizer: FastTokenizer, texts: Sequence[str]) -> str:
    # llama.cpp's tokenizer refuses some texts here as it will when somebody sends them to the model.
    refused = vocabulary.compare_ids(file, tokenizer, texts)
    sentence = f"{len(texts) - len(refused)} evaluation texts have the token ids of the training"
    return f"{sentence}, and {len(refused)} cannot be tokenised as text: {refused[0]}" if refused else sentence


def require_written(file: Path, written: Sequence[Written]) -> None:
    """Read every part again. Raises SaigaError that names the part whose bytes differ."""
    with file.open("rb") as stream, ThreadPoolExecutor(quantization.usable_cores()) as pool:

        def is_intact(part: Written) -> bool:
            content = os.pread(stream.fileno(), part.size, part.offset)
            return len(content) == part.size and streaming.checksum(memoryview(content)) == part.checksum

        for part, intact in zip(written, pool.map(is_intact, written), strict=True):
            if not intact:
                raise SaigaError(
                    f"{file} was not written correctly: {part.name} differs on disk at byte {part.offset}. "
                    "The disk may be failing; run again."
                )
