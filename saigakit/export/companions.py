"""A GGUF into the files beside it: Ollama's Modelfile, llama-server's command, a model card."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saigakit.core import manifest
from saigakit.errors import SaigaError
from saigakit.export import fit, gguf_card, modelfile
from saigakit.export.chat_format import ChatFormat
from saigakit.export.gguf_card import Described
from saigakit.prompt import encoding
from saigakit.prompt.backends import gguf_vocabulary
from saigakit.registry import ModelSpec, Sampling
from saigakit.weights import lineage
from saigakit.weights.memory import Shape

if TYPE_CHECKING:
    import llama_cpp

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
    """Beside the first of `files` (quant type to GGUF), whose names begin with `prefix`; for the one that fits best.

    `inputs`: those of the manifest, of which the files were made.
    A chat template that no Modelfile can hold is said aloud, and there is none. Raises SaigaError where a file with
    one of these names is there: nothing is overwritten.
    """
    made = paths(next(iter(files.values())).parent, prefix)
    for file in made.values():
        manifest.require_absent(file)
    texts = made_of(files, spec=spec, origin=gguf_card.origin(inputs))
    return [manifest.write_text(made[name], text) for name, text in texts.items()]


def made_of(
    files: Mapping[str, Path],
    *,
    spec: ModelSpec,
    origin: Mapping[str, str] | None = None,
    title: str = "",
    compared: str = "",
) -> dict[str, str]:
    """The texts by MODELFILE, SERVER and CARD; without the first where there can be none."""
    by_type = {quant_type: file.stat().st_size for quant_type, file in files.items()}
    described = _described(next(iter(files.values())), spec, by_type)
    name = files[described.choice.quant_type].name
    server = modelfile.llama_server(name, sampling=described.sampling, choice=described.choice)
    texts = _modelfile(name, described)
    described = replace(described, server=server, has_modelfile=bool(texts))
    sizes = {one: (file.name, by_type[one]) for one, file in files.items()}
    card = gguf_card.text(spec, described, sizes, title=title, origin=origin, compared=compared)
    return {**texts, SERVER: server, CARD: card}


def _modelfile(name: str, described: Described) -> dict[str, str]:
    try:
        text = modelfile.modelfile(
            name,
            ChatFormat.of(described.chat_template, described.variables, described.end_of_turn),
            stops=described.stops,
            sampling=described.sampling,
            choice=described.choice,
            system_prompt=described.system_prompt,
        )
    except SaigaError as error:
        print(f"There is no {MODELFILE} for Ollama: {error}", flush=True)
        return {}
    return {MODELFILE: text}


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
            variables=tokenizer.variables,
            end_of_turn=names[end],
            stops=list(dict.fromkeys(names[number] for number in (end, llm.token_eos()) if number in names)),
            system_prompt=written.get(lineage.SYSTEM_PROMPT_KEY),
            sampling=Sampling.of_gguf(written),
            shape=shape,
            longest=longest,
            choice=fit.chosen(shape, by_type, longest=longest),
            server="",
            has_modelfile=False,
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
