"""Write the model card, Modelfile and server command that accompany a GGUF."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from saigakit.core import install, manifest
from saigakit.core.files import require_absent, write_text
from saigakit.core.workspace import GIB
from saigakit.export import fit, markdown, modelfile
from saigakit.llamacpp import forward
from saigakit.prompt import encoding
from saigakit.prompt.backends import gguf_vocabulary
from saigakit.registry import ModelSpec, Sampling
from saigakit.weights import lineage

MODELFILE, SERVER, CARD = "Modelfile", "llama-server.txt", "README.md"
_RUN = """llama.cpp, with the chat template in the file:

{server}

Ollama {ollama_version} or later, with the chat template in the file:

{ollama}

llama-cpp-python (on a Xeon with AMX, gcc before 14 miscompiles llama.cpp, and Python crashes when it loads a model;
install it there with `CMAKE_ARGS="{without_amx}" pip install --no-cache-dir --force-reinstall llama-cpp-python`):

{python}

In these programs, a text that spells special tokens such as `{special}` becomes those tokens; `saigakit chat` keeps it
as text."""


def companion_paths(directory: Path, prefix: str) -> dict[str, Path]:
    return {name: directory / f"{prefix}{name}" for name in (MODELFILE, SERVER, CARD)}


def write_companions(
    files: Mapping[str, Path], *, spec: ModelSpec, inputs: Mapping[str, Any], prefix: str = "", completes: bool = False
) -> list[Path]:
    """Write `companion_texts` next to the first of `files`, with `prefix` before their names.

    `completes`: keep those that are there, which a full disk has interrupted, instead of refusing them.
    """
    paths = companion_paths(next(iter(files.values())).parent, prefix)
    if not completes:
        for file in paths.values():
            require_absent(file)
    texts = companion_texts(files, spec=spec, inputs=inputs)
    return [path if path.exists() else write_text(path, texts[name]) for name, path in paths.items()]


def companion_texts(
    files: Mapping[str, Path],
    *,
    spec: ModelSpec,
    inputs: Mapping[str, Any],
    title: str = "",
    measured: str = "",
) -> dict[str, str]:
    """Modelfile, server command and card, for the best of `files`; `inputs` of the manifest, `measured` in Markdown."""
    sizes = {quant_type: file.stat().st_size for quant_type, file in files.items()}
    with gguf_vocabulary(next(iter(files.values()))) as llm:
        tokenizer = encoding.GgufTokenizer(llm)
        trained_for = int(llm.metadata[f"{llm.metadata['general.architecture']}.context_length"])
        model = fit.ModelFiles(
            shape=forward.read_shape(llm), longest=min(spec.context_length, trained_for), files=sizes
        )
        (end,) = encoding.end_of_turn_ids(tokenizer)
        names = {number: name for name, number in tokenizer.special_tokens.items()}
        choice = model.choose()
        settings = modelfile.RunSettings(
            name=files[choice.quant_type].name,
            stops=list(dict.fromkeys(names[number] for number in (end, llm.token_eos()) if number in names)),
            system_prompt=llm.metadata.get(lineage.SYSTEM_PROMPT_KEY),
            sampling=Sampling.from_gguf(llm.metadata),
            choice=choice,
        )
    base = markdown.linked(spec.base_model)
    sections = {
        "Files": f"{_files_table(files, model)}\n\n{model.recommend()}",
        **({"Measured": measured} if measured else {}),
        "Run": _run_section(settings, names[end]),
        "Made of": markdown.table(("what", "value"), {"base": base, **_origin(inputs)}.items()),
    }
    english, russian = base, f"Это {base}"
    if inputs.get("adapter"):
        english, russian = f"{base} with a LoRA adapter merged in", f"{russian} со слитым адаптером LoRA"
    english += " as GGUF, for llama.cpp and programs built on it; made with saigakit."
    russian += " в формате GGUF: работает на обычном компьютере без видеокарты."
    card = markdown.Card(
        spec=spec,
        title=title.split("/")[-1] or Path(spec.name).name,
        library="gguf",
        tags=["gguf", "llama.cpp", "saiga", "saigakit"],
        relation="quantized",
        chat_template=tokenizer.chat_template,
        system_prompt=settings.system_prompt,
        versions=manifest.versions(),
    )
    card_text = card.text(english, russian, sections)
    return {MODELFILE: settings.modelfile(), SERVER: settings.llama_server(), CARD: card_text}


def _files_table(files: Mapping[str, Path], model: fit.ModelFiles) -> str:
    n_ctx = model.least_context
    rows = []
    for quant_type, file in files.items():
        resident, size = model.needs(quant_type, n_ctx)["f16"].resident / GIB, model.files[quant_type] / 1e9
        rows.append((markdown.code(file.name), quant_type, f"{size:.3f} GB", f"{resident:.2f} GiB"))
    return markdown.table(("file", "type", "size", f"memory with {n_ctx} tokens of context, KV f16"), rows)


def _run_section(settings: modelfile.RunSettings, end_of_turn: str) -> str:
    ollama = markdown.block("ollama create NAME -f Modelfile\nollama run NAME", "bash")
    return _RUN.format(
        server=markdown.block(settings.llama_server(), "bash"),
        ollama_version=modelfile.OLLAMA_VERSION,
        ollama="\n\n".join([ollama, *settings.ollama_notes()]),
        without_amx=install.WITHOUT_AMX,
        python=markdown.block(settings.python(), "python"),
        special=end_of_turn,
    )


def _origin(inputs: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of what the GGUF was made of and what its adapter was trained on."""
    rows: dict[str, Collection[str]] = {
        "base": lineage.weight_hashes(inputs.get("base") or {}),
        "adapter": [
            digest for name, digest in (inputs.get("adapter") or {}).items() if name.endswith((".safetensors", ".bin"))
        ],
        "training records": (inputs.get("train") or {}).values(),
    }
    return {
        f"{what}, SHA-256": ", ".join(map(markdown.code, sorted(digests))) for what, digests in rows.items() if digests
    }
