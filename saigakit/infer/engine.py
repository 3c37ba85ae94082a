"""Load a GGUF file and stream an answer."""

import codecs
import importlib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from saigakit.core import launch, manifest, workspace
from saigakit.core.files import sha256_of_text
from saigakit.core.lazy import llama_cpp
from saigakit.errors import SaigaError
from saigakit.llamacpp import forward
from saigakit.prompt import encoding
from saigakit.prompt.backends import token_bytes, vocabulary_sha256
from saigakit.prompt.sandbox import BROKEN
from saigakit.prompt.template import Message, broken
from saigakit.registry import Sampling
from saigakit.weights.memory import CacheType

_CACHE_TYPES: dict[CacheType, int] = {"f16": 1, "q8_0": 8}  # ggml_type


def load(
    gguf_file: str | Path,
    *,
    n_ctx: int = 4096,
    n_threads: int | None = None,
    cache_type: CacheType = "f16",
) -> "llama_cpp.Llama":
    """Load the model, onto the GPU if it fits; close it with `llm.close()`.

    `cache_type="q8_0"` halves the memory of the context. Raises SaigaError for a missing or damaged file.
    """
    file = require_gguf(gguf_file)
    threads = n_threads or os.cpu_count() or 1

    class Llama(llama_cpp.Llama):
        """Change settings that the constructor of llama_cpp.Llama does not take."""

        def __setattr__(self, name: str, value: object) -> None:
            if name == "model_params":
                forward.disable_amx(value)
            if name == "_model":  # beyond its training length a model answers with noise, and llama.cpp warns
                self.context_params.n_ctx = min(self.context_params.n_ctx, value.n_ctx_train())  # type: ignore[attr-defined]
                size = self.context_params.n_ctx
                needed = size * cache_bytes(value.model) // (1 if cache_type == "f16" else 2)  # type: ignore[attr-defined]
                if not layers and needed > (free := workspace.available_memory()):  # else the system kills the process
                    sizes = f"need {needed / workspace.GB:.1f} GB, and {free / workspace.GB:.1f} GB are free"
                    raise SaigaError(f"{size:,} tokens of context {sizes}. Give a smaller n_ctx.")
            super().__setattr__(name, value)

    remedy = "" if cache_type == "f16" else " A q8_0 cache needs a head_dim of 32, 64, …; try cache_type='f16'."
    layers = _gpu_layers(file)
    with explaining(file, n_ctx, remedy):
        llm = Llama(
            str(file),
            n_ctx=n_ctx,
            n_gpu_layers=layers,
            n_threads=threads,
            n_threads_batch=threads,
            # A q8_0 cache needs it; on a CPU it is further from float32 (benchmarks/same_answers.py).
            flash_attn=cache_type != "f16" or layers != 0,
            type_k=_CACHE_TYPES[cache_type],
            type_v=_CACHE_TYPES[cache_type],
            verbose=False,
        )
    require_as_exported(llm, file)
    return llm


def cache_bytes(model: Any) -> int:  # noqa: ANN401  # a ctypes pointer
    """Of the keys and values of a token in f16."""
    width = llama_cpp.llama_model_n_embd(model) // llama_cpp.llama_model_n_head(model)
    heads = llama_cpp.llama_model_n_layer(model) * llama_cpp.llama_model_n_head_kv(model)
    return int(2 * heads * width * 2)


@contextmanager
def explaining(file: Path, n_ctx: int, remedy: str = "") -> Iterator[None]:
    """Turn what loading `file` raises into SaigaError, with llama.cpp's reason."""
    reasons: list[str] = []
    try:
        with forward.collecting_errors() as reasons:
            yield
    except BROKEN as error:  # llama-cpp-python compiles the template
        raise broken(error, file) from None
    except (ValueError, LookupError, ArithmeticError, RuntimeError) as error:
        raise SaigaError(
            f"llama.cpp {llama_cpp.__version__} cannot load {file} ({next(iter(reasons), error)}): it is cut short or "
            f"damaged, its architecture is too new for this version, or {n_ctx} tokens of context do not fit into "
            f"memory.{remedy}"
        ) from None


def require_as_exported(llm: "llama_cpp.Llama", file: Path) -> None:
    """Raise SaigaError if the manifest beside the file tells of another chat template, vocabulary or size."""
    made = manifest.read(file.parent) if (file.parent / manifest.NAME).is_file() else {}
    if (about := made.get("files", {}).get(file.name)) is None:
        return
    template_hash = sha256_of_text(llm.metadata.get("tokenizer.chat_template", ""))
    found = {"chat template": template_hash == made["chat_template_sha256"]}
    found |= {"size": file.stat().st_size == about["bytes"]}
    if "vocabulary_sha256" in made:  # not in a manifest of an earlier version
        found |= {"vocabulary": vocabulary_sha256(llm) == made["vocabulary_sha256"]}
    if other := [name for name, is_same in found.items() if not is_same]:
        llm.close()
        raise SaigaError(
            f"{file} is not the file that {file.parent / manifest.NAME} describes: its {other[0]} is another. Run "
            "03_merge_gguf again, or move the file away from there if it is from elsewhere."
        )


def require_gguf(gguf_file: str | Path) -> Path:
    """Raises SaigaError for a file that is missing, no GGUF, or so damaged that llama.cpp crashes."""
    importlib.import_module("llama_cpp")  # if it is not installed, this says so before the child below does
    file = Path(gguf_file)
    if file.is_dir() and (found := sorted(file.rglob("*.gguf"))):
        raise SaigaError(f"{file} is a directory. Did you mean {found[0]}?")
    if not file.is_file():
        problem = "is a directory without a .gguf file" if file.is_dir() else "does not exist"
        raise SaigaError(f"{file} {problem}. Give a .gguf file, or run 03_merge_gguf first.")
    with file.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise SaigaError(f"{file} is not a GGUF file: it begins with {magic!r}.")
    _require_harmless(file, file.stat().st_mtime_ns)
    return file


@cache
def _require_harmless(file: Path, _changed: int) -> None:
    """Let a child read the file first, because llama.cpp ends its process on some damage; not on Windows."""
    if os.name == "nt":
        return
    try:
        quiet = {"GGML_NO_BACKTRACE": "1"}  # else it starts a debugger, whose output would bury the reason
        launch.run([sys.executable, "-m", "saigakit.infer", str(file)], environment=quiet)
    except SaigaError as error:
        if not re.search(r"killed by signal (?!9\b|24\b)", str(error)):  # 9, 24: without memory, and without end
            raise
        raise SaigaError(f"{file} is damaged: it crashes llama.cpp. Download or export it again.\n{error}") from None


def _gpu_layers(file: Path) -> int:
    free = gpu_memory() if llama_cpp.llama_supports_gpu_offload() else 0
    return -1 if free > 1.3 * file.stat().st_size else 0  # the rest is for the context and its buffers


def gpu_memory() -> int:
    """Free bytes; on a Mac the GPU may take about two thirds of the machine's memory."""
    if sys.platform == "darwin":
        return workspace.available_memory() * 2 // 3
    return sum(gpu.free for gpu in workspace.gpus())


def on_gpu(llm: "llama_cpp.Llama") -> bool:
    return bool(llm.model_params.n_gpu_layers) and bool(llama_cpp.llama_supports_gpu_offload())


def stop_ids(llm: "llama_cpp.Llama") -> frozenset[int]:
    """The tokens that end an answer: the template's, and those that llama.cpp knows by their names."""
    tokenizer = encoding.load_gguf_tokenizer(llm)
    return encoding.end_of_turn_ids(tokenizer) | tokenizer.end_of_generation_ids


def require_room(llm: "llama_cpp.Llama", prompt: Sequence[int]) -> int:
    """How many tokens an answer may have. Raises SaigaError if the prompt fills the context."""
    if len(prompt) < llm.n_ctx():
        return int(llm.n_ctx()) - len(prompt)
    raise SaigaError(
        f"The conversation has {len(prompt)} tokens, but the context holds {llm.n_ctx()}. Load the model with a "
        "larger n_ctx or start a new conversation."
    )


def stream(
    llm: "llama_cpp.Llama",
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    sampling: Sampling | None = None,
    max_new_tokens: int | None = None,
) -> Iterator[str]:
    """Yield the answer in whole characters. Raises SaigaError if the conversation fills the context."""
    tokenizer = encoding.load_gguf_tokenizer(llm)
    prompt = encoding.encode(messages, tokenizer, tools=tools, add_generation_prompt=True)["input_ids"]
    room = require_room(llm, prompt)
    ends = stop_ids(llm)
    sampling = sampling or Sampling.from_gguf(llm.metadata)
    tokens = llm.generate(
        prompt,
        temp=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=0.0,
        repeat_penalty=sampling.repeat_penalty,
    )
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for _, token in zip(range(min(room, max_new_tokens or room)), tokens, strict=False):
        if token in ends:
            break
        if text := decoder.decode(token_bytes(llm, token)):
            yield text
    if rest := decoder.decode(b"", final=True):
        yield rest
