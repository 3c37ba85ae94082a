"""A finished GGUF file into a sentence that says what can read it: gguf's reader, llama.cpp, the user's own records."""

import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from saigakit import vocabulary
from saigakit.errors import SaigaError
from saigakit.tokenization import FastTokenizer

if TYPE_CHECKING:
    from saigakit.shards import Shape

_RECORDS = 200  # held-out records whose ids are compared
_LARGE = 65_536  # tokens; gguf's reader, in Python, takes half a minute for 128,000 with their merges


def held_out_texts(run_dir: Path) -> list[str]:
    """What is said in the first held-out records; nothing where 01_format has not run."""
    file = run_dir / "01_format" / "held_out.jsonl"
    if not file.is_file():
        return []
    with file.open(encoding="utf-8") as stream:
        records = [json.loads(line) for line in itertools.islice(stream, _RECORDS)]
    said = [message.get("content") for record in records for message in record["messages"]]
    return [text for text in said if isinstance(text, str) and text]


def require_readable(file: Path, shapes: Mapping[str, "Shape"], tokenizer: FastTokenizer, texts: Sequence[str]) -> str:
    """The sentence. Raises SaigaError where one of the readers finds something else than was written."""
    readers = ["llama.cpp loads it and finds every block valid"]
    if _tokens(shapes) <= _LARGE:
        _require_tensors(file, shapes)
        readers.insert(0, f"gguf reads its {len(shapes)} tensors")
    _require_loadable(file)
    vocabulary.require_same_ids(file, tokenizer, texts)
    if texts:
        readers.append(f"{len(texts)} held-out texts have the ids of the training")
    return f"Read back: {', '.join(readers)}."


def _tokens(shapes: Mapping[str, "Shape"]) -> int:
    return shapes["token_embd.weight"][0]


def _require_tensors(file: Path, shapes: Mapping[str, "Shape"]) -> None:
    import gguf

    try:
        found = {tensor.name: tuple(map(int, reversed(tensor.shape))) for tensor in gguf.GGUFReader(file).tensors}
    except (ValueError, IndexError) as error:
        raise _wrong(file, f"gguf cannot read it ({error})") from None
    if found != {name: tuple(shape) for name, shape in shapes.items()}:
        raise _wrong(file, f"gguf finds {sum(map(prod, found.values()))} numbers in {len(found)} tensors")


def _require_loadable(file: Path) -> None:
    """By its pages mapped into memory; weights are not packed anew, which would copy them."""
    import llama_cpp

    params = llama_cpp.llama_model_default_params()
    params.load_mode, params.n_gpu_layers = llama_cpp.LLAMA_LOAD_MODE_MMAP, 0
    params.check_tensors, params.use_extra_bufts = True, False
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # a hundred lines otherwise
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), params)
    if not model:
        raise _wrong(file, "llama.cpp does not load it")
    llama_cpp.llama_model_free(model)


def _wrong(file: Path, what: str) -> SaigaError:
    return SaigaError(f"{file} came out wrong: {what}. The disk may be failing; run again.")
