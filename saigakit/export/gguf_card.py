"""GGUF files and what they were made of into a model card: sizes, what fits, how to run them."""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from saigakit.core import install, manifest
from saigakit.export import fit, markdown, modelfile
from saigakit.registry import ModelSpec, Sampling
from saigakit.weights import lineage
from saigakit.weights.memory import Shape

_WEIGHTS = (".safetensors", ".bin")
_CARD = Template("""---
$metadata
---
# $title

$base$adapter as GGUF, for llama.cpp and what is built on it; made with saigakit. The base model's licence ($licence)
applies.

Это $base$adapter_ru в формате GGUF: работает на обычном компьютере без видеокарты. Всё измеренное измерил автор;
независимой проверки не было. Ответы бывают неверны. Действует лицензия базовой модели: $licence.

## Files

$files

$fits

$compared## Run

llama.cpp (the chat template inside the file is used):

$server

Ollama:

$ollama

llama-cpp-python (on a Xeon with AMX, gcc before 14 miscompiles llama.cpp, and Python dies while it loads a model;
install it there with `CMAKE_ARGS="$without_amx" pip install --no-cache-dir --force-reinstall llama-cpp-python`):

$python

A text that spells special tokens such as `$special` becomes those tokens in these programs; `saigakit chat` keeps it
text.

## Made of

$origin

## Prompt

Chat template (SHA-256 `$template_hash`):

$template

$system_prompt
## Versions

$versions
""")
_PYTHON = """from llama_cpp import {imported}

llm = Llama("{name}", n_ctx={n_ctx}, flash_attn=True{cache})
messages = [{messages}]
answer = llm.create_chat_completion(
    messages, temperature={temperature:g}, top_p={top_p:g}, top_k={top_k}, min_p=0.0, repeat_penalty={penalty:g}
)
print(answer["choices"][0]["message"]["content"])"""


@dataclass(frozen=True, kw_only=True)
class Described:
    """What a GGUF says of itself, and how it is best loaded."""

    chat_template: str
    variables: Mapping[str, str]  # bos_token and the like, as the template may name them
    end_of_turn: str
    stops: list[str]  # what ends an answer: the token that training taught and the file's EOS
    system_prompt: str | None
    sampling: Sampling
    shape: Shape
    longest: int  # tokens of context that it was trained for
    choice: fit.Choice
    server: str  # the command that serves it
    has_modelfile: bool


def text(
    spec: ModelSpec,
    described: Described,
    sizes: Mapping[str, tuple[str, int]],
    *,
    title: str = "",
    origin: Mapping[str, str] | None = None,
    compared: str = "",
) -> str:
    """`sizes`: name and bytes of the file of each quant type. `origin`: as `origin()` gives it. `compared`: what was
    measured, in Markdown."""
    origin, is_merged = origin or {}, any(what.startswith("adapter") for what in origin or {})
    base, name = markdown.linked(spec.base_model), sizes[described.choice.quant_type][0]
    by_type = {quant_type: size for quant_type, (_, size) in sizes.items()}
    system_prompt = described.system_prompt
    return _CARD.substitute(
        metadata=markdown.metadata(
            spec, "gguf", ["gguf", "llama.cpp", "saiga", "saigakit"], base_model_relation="quantized"
        ),
        title=title.split("/")[-1] or Path(spec.name).name,
        base=base,
        adapter=" with a LoRA adapter merged in" if is_merged else "",
        adapter_ru=" с вложенным адаптером LoRA" if is_merged else "",
        licence=spec.licence or "see there",
        files=_files(described, sizes),
        fits=fit.in_words(described.shape, by_type, longest=described.longest),
        compared=f"## Measured\n\n{compared.strip()}\n\n" if compared else "",
        server=markdown.block(described.server, "bash"),
        ollama=_ollama(described),
        without_amx=install.WITHOUT_AMX,
        python=markdown.block(_python(described, name), "python"),
        special=described.end_of_turn,
        origin=markdown.table(("what", "value"), {"base": base, **origin}.items()),
        template_hash=hashlib.sha256(described.chat_template.encode("utf-8")).hexdigest(),
        template=markdown.block(described.chat_template, "jinja"),
        system_prompt=f"System prompt: {markdown.code(system_prompt)}\n" if system_prompt else "",
        versions=markdown.table(("package", "version"), manifest.versions().items()),
    )


def _files(described: Described, sizes: Mapping[str, tuple[str, int]]) -> str:
    least = min(fit.LEAST_CONTEXT, described.longest)
    rows = []
    for quant_type, (name, size) in sizes.items():
        needs = fit.Needs.of(described.shape, size, least)
        rows.append((name, quant_type, f"{size / 1e9:.3f} GB", f"{needs.resident / fit.GIB:.2f} GiB"))
    return markdown.table(("file", "type", "size", f"memory with {least} tokens of context, KV f16"), rows)


def _ollama(described: Described) -> str:
    if described.has_modelfile:
        commands = markdown.block("ollama create NAME -f Modelfile\nollama run NAME", "bash")
        return "\n\n".join([commands, *modelfile.cache_notes(described.choice)])
    return "This chat template cannot be written as one of Ollama's; use llama-server, which reads it from the file."


def _python(described: Described, name: str) -> str:
    messages = [{"role": "user", "content": "Привет!"}]
    if described.system_prompt:
        messages.insert(0, {"role": "system", "content": described.system_prompt})
    in_float16 = described.choice.cache_type == "f16"
    return _PYTHON.format(
        name=name,
        imported="Llama" if in_float16 else "GGML_TYPE_Q8_0, Llama",
        cache="" if in_float16 else ", type_k=GGML_TYPE_Q8_0, type_v=GGML_TYPE_Q8_0",
        n_ctx=described.choice.n_ctx,
        messages=", ".join(json.dumps(message, ensure_ascii=False) for message in messages),
        temperature=described.sampling.temperature,
        top_p=described.sampling.top_p,
        top_k=described.sampling.top_k,
        penalty=described.sampling.repeat_penalty,
    )


def origin(inputs: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of what a GGUF was made of and of what its adapter was trained on; `inputs`: those of its manifest."""
    rows: dict[str, Collection[str]] = {
        "base": lineage.weights_of(inputs.get("base") or {}),
        "adapter": [found for name, found in (inputs.get("adapter") or {}).items() if name.endswith(_WEIGHTS)],
        "training records": (inputs.get("train") or {}).values(),
    }
    return {f"{what}, SHA-256": hashes(sorted(digests)) for what, digests in rows.items() if digests}


def hashes(digests: Iterable[str]) -> str:
    return ", ".join(map(markdown.code, digests))
