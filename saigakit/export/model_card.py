"""Write the model card, Modelfile and server command that accompany a GGUF."""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from saigakit.core import install, manifest
from saigakit.core.files import require_absent, write_text
from saigakit.export import fit, markdown, modelfile
from saigakit.prompt import encoding
from saigakit.prompt.backends import gguf_vocabulary
from saigakit.registry import ModelSpec, Sampling
from saigakit.weights import lineage
from saigakit.weights.memory import Shape

if TYPE_CHECKING:
    import llama_cpp

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

Ollama $ollama_version or later (the chat template inside the file is used):

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
    end_of_turn: str
    stops: list[str]  # what ends an answer: the token that training taught and the file's EOS
    system_prompt: str | None
    sampling: Sampling
    shape: Shape
    longest: int  # tokens of context that it was trained for
    choice: fit.Choice


def card_text(
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
        files=_files_table(described, sizes),
        fits=fit.in_words(described.shape, by_type, longest=described.longest),
        compared=f"## Measured\n\n{compared.strip()}\n\n" if compared else "",
        server=markdown.block(_server(described, name), "bash"),
        ollama_version=modelfile.OLLAMA_VERSION,
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


def _files_table(described: Described, sizes: Mapping[str, tuple[str, int]]) -> str:
    least = min(fit.LEAST_CONTEXT, described.longest)
    rows = []
    for quant_type, (name, size) in sizes.items():
        needs = fit.Needs.of(described.shape, size, least)
        rows.append((name, quant_type, f"{size / 1e9:.3f} GB", f"{needs.resident / fit.GIB:.2f} GiB"))
    return markdown.table(("file", "type", "size", f"memory with {least} tokens of context, KV f16"), rows)


def _ollama(described: Described) -> str:
    commands = markdown.block("ollama create NAME -f Modelfile\nollama run NAME", "bash")
    return "\n\n".join([commands, *modelfile.ollama_notes(described.choice, described.system_prompt)])


def _server(described: Described, name: str) -> str:
    return modelfile.llama_server(name, sampling=described.sampling, choice=described.choice)


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


MODELFILE, SERVER, CARD = "Modelfile", "llama-server.txt", "README.md"


def paths(directory: Path, prefix: str) -> dict[str, Path]:
    return {name: directory / f"{prefix}{name}" for name in (MODELFILE, SERVER, CARD)}


def write(
    files: Mapping[str, Path],
    *,
    spec: ModelSpec,
    inputs: Mapping[str, Any],
    prefix: str = "",
) -> list[Path]:
    """Write the texts next to the first of `files` (quant type to GGUF), for the one that fits best.

    `prefix` begins their names; `inputs` are those of the manifest. Raises SaigaError where a file with one of these
    names exists: nothing is overwritten.
    """
    made = paths(next(iter(files.values())).parent, prefix)
    for file in made.values():
        require_absent(file)
    texts = made_of(files, spec=spec, origin=origin(inputs))
    return [write_text(made[name], text) for name, text in texts.items()]


def made_of(
    files: Mapping[str, Path],
    *,
    spec: ModelSpec,
    origin: Mapping[str, str] | None = None,
    title: str = "",
    compared: str = "",
) -> dict[str, str]:
    """The texts by MODELFILE, SERVER and CARD."""
    by_type = {quant_type: file.stat().st_size for quant_type, file in files.items()}
    described = _described(next(iter(files.values())), spec, by_type)
    name = files[described.choice.quant_type].name
    sizes = {one: (file.name, by_type[one]) for one, file in files.items()}
    return {
        MODELFILE: modelfile.modelfile(
            name,
            stops=described.stops,
            sampling=described.sampling,
            choice=described.choice,
            system_prompt=described.system_prompt,
        ),
        SERVER: _server(described, name),
        CARD: card_text(spec, described, sizes, title=title, origin=origin, compared=compared),
    }


def _described(file: Path, spec: ModelSpec, by_type: Mapping[str, int]) -> Described:
    with gguf_vocabulary(file) as llm:
        written = llm.metadata
        tokenizer = encoding.GgufTokenizer(llm)
        (end,) = encoding.end_of_turn_ids(tokenizer)
        names = {number: name for name, number in tokenizer.special_tokens.items()}
        shape, trained_for = _shape(llm), int(written[f"{written['general.architecture']}.context_length"])
        longest = min(spec.context_length, trained_for)
        return Described(
            chat_template=tokenizer.chat_template,
            end_of_turn=names[end],
            stops=list(dict.fromkeys(names[number] for number in (end, llm.token_eos()) if number in names)),
            system_prompt=written.get(lineage.SYSTEM_PROMPT_KEY),
            sampling=Sampling.from_gguf(written),
            shape=shape,
            longest=longest,
            choice=fit.chosen(shape, by_type, longest=longest),
        )


def _shape(llm: "llama_cpp.Llama") -> Shape:
    kind = llm.metadata["general.architecture"]

    def number(key: str, otherwise: int = 0) -> int:
        return int(llm.metadata.get(f"{kind}.{key}", otherwise))

    hidden, heads = number("embedding_length"), number("attention.head_count")
    return Shape(
        hidden=hidden,
        layers=number("block_count"),
        heads=heads,
        kv_heads=number("attention.head_count_kv", heads),
        head_dim=number("attention.key_length", hidden // heads),
        intermediate=number("feed_forward_length"),
        vocabulary=llm.n_vocab(),
        tied=False,
    )
