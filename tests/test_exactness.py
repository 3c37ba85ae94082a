"""Our file against llama.cpp's own chain on the merged model: convert_hf_to_gguf in float32, then its quantiser."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import llama_cpp_chain
import pytest
import small_models
import vocabularies
from safetensors.numpy import load_file, save_file

from saigakit import models, quantization
from saigakit.export import Export
from saigakit.merge import Merged

EVERY = tuple(quant_type for quant_type in quantization.QUANT_TYPES if quant_type != "F32")
SOME = ("F16", "Q4_K_M")
# Metadata that need not be equal, each with its reason. `*` stands for the architecture's name.
NAMED = "what the file is called: the converter guesses from the directory and a model card"
SPELLED = "said where the converter leaves it to what llama.cpp takes for granted, which is the same"
DIFFERENT = {
    "general.name": NAMED,
    "general.basename": NAMED,
    "general.finetune": NAMED,
    "general.version": NAMED,
    "general.size_label": "counts all numbers of the file; of tied embeddings and of frequency factors too",
    "general.license": "of the registry; a directory has none",
    "general.sampling.top_k": "the model's sampling, so that other programs answer as this one",
    "general.sampling.top_p": "the model's sampling, so that other programs answer as this one",
    "general.sampling.temp": "the model's sampling, so that other programs answer as this one",
    "general.sampling.penalty_repeat": "the model's sampling, so that other programs answer as this one",
    "saigakit.system_prompt": "what a conversation begins with by default",
    "saigakit.unicode_normalization": "llama.cpp never normalises a text, so the program that runs the file must",
    "tokenizer.huggingface.json": "llama.cpp splits some words otherwise than this tokenizer",
    "tokenizer.chat_template": "without tags that only trainers know, and with tools",
    "tokenizer.ggml.eot_token_id": "what ends a turn of the template, where that is not eos",
    "tokenizer.ggml.unknown_token_id": "as the tokenizer names it; the converter looks in tokenizer.json alone",
    "tokenizer.ggml.padding_token_id": "as the tokenizer names it; the converter looks in tokenizer.json alone",
    "tokenizer.ggml.add_bos_token": "false where the template spells bos, or it would come twice",
    "tokenizer.ggml.add_eos_token": SPELLED,
    "tokenizer.ggml.add_space_prefix": "as the tokenizer does it, which training used; the converter asks a setting",
    "*.attention.key_length": SPELLED,
    "*.attention.value_length": SPELLED,
    "*.rope.freq_base": SPELLED,
}


@dataclass(frozen=True)
class Case:
    """A small model of the shape of a real one, and the types that it is compared in."""

    settings: Mapping[str, Any]
    quant_types: tuple[str, ...] = SOME
    vocabulary: Callable[[Path, Path | None], None] | None = None  # else that of the tiny Saiga
    change: Callable[[Path], None] | None = None  # of the made directory
    pre: str | None = None


SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 8}
GROUPED = {**SIZES, "num_key_value_heads": 2}
DEEP = {**GROUPED, "num_hidden_layers": 17}
GEMMA = {
    **GROUPED,
    "num_hidden_layers": 8,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 24,
    "tie_word_embeddings": True,
}
LOCAL = {"rope_type": "default", "rope_theta": 1e4}
GEMMA3_ROPE = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, "sliding_attention": LOCAL}


def with_images(directory: Path) -> None:
    """As Gemma 3 is published: the language model inside one that sees images, and what is usual left unsaid."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    del config["tie_word_embeddings"]
    config["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}
    del config["rope_parameters"], config["layer_types"], config["architectures"]
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": config}
    (directory / "config.json").write_text(json.dumps(outer), encoding="utf-8")
    tensors = load_file(directory / "model.safetensors")
    inner = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    inner["vision_tower.vision_model.embeddings.patch_embedding.weight"] = next(iter(tensors.values()))[:2].copy()
    save_file(inner, directory / "model.safetensors", metadata={"format": "pt"})


SHAPES = {
    "llama-2": Case({**SIZES, "num_key_value_heads": 8}, EVERY),
    "llama-3": Case({**DEEP, "rope_parameters": small_models.LLAMA3_ROPE}, EVERY),
    "tied": Case({**GROUPED, "tie_word_embeddings": True}),
    "rows of 288": Case({**GROUPED, "hidden_size": 288, "tie_word_embeddings": True}, EVERY),
    "rows of 48": Case({"hidden_size": 48, "intermediate_size": 80}),
    "mistral": Case({**GROUPED, "kind": "mistral", "sliding_window": 64}),
    "nemo": Case({**GROUPED, "kind": "mistral", "head_dim": 64}),
    "yandexgpt": Case(
        {**GROUPED, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rms_norm_eps": 1e-5}
    ),
    "qwen2": Case({**GROUPED, "kind": "qwen2"}),
    "qwen3": Case({**GROUPED, "kind": "qwen3", "head_dim": 64}),
    "gemma-2": Case({**GEMMA, "kind": "gemma2"}),
    "gemma-3": Case({**GEMMA, "kind": "gemma3_text", "rope_parameters": GEMMA3_ROPE}, EVERY),
    "gemma-3 with images": Case(
        {**GEMMA, "kind": "gemma3_text", "rope_parameters": GEMMA3_ROPE}, ("Q4_K_M",), change=with_images
    ),
}
SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
VOCABULARIES = {
    "llama-2": Case({**SMALL, "vocab_size": 32000}, ("Q4_K_M",), vocabularies.llama2),
    "llama-3": Case({**SMALL, "vocab_size": 128256}, ("Q4_K_M",), vocabularies.llama3_tokens, pre="llama-bpe"),
    "nemo": Case(
        {**SMALL, "kind": "mistral", "head_dim": 32, "vocab_size": 131072}, ("Q4_K_M",), vocabularies.nemo, pre="tekken"
    ),
    "qwen": Case({**SMALL, "kind": "qwen2", "vocab_size": 49216}, ("Q4_K_M",), vocabularies.qwen_tokens, pre="qwen2"),
}


def _made(request, cases):
    """Of each case (what we export, llama.cpp's file in float32); the converter runs once for all."""
    tiny, converter = request.getfixturevalue("tiny"), request.getfixturevalue("converter")
    directory = request.getfixturevalue("tmp_path_factory").mktemp("exactness")
    exports, jobs = {}, []
    for name, case in cases.items():
        here = directory / name.replace(" ", "_")
        base_dir = _base(request, here / "base", tiny, case)
        adapter_dir = None if case.change else small_models.adapter(here / "adapter", base_dir)
        exports[name] = Export.of(models.find(str(base_dir)), adapter_dir, None, "F16")
        _merged(exports[name].merged, base_dir, here / "merged")
        jobs.append((here / "merged", here / "float.gguf", case.pre))
    llama_cpp_chain.convert(converter, jobs)
    return {name: (export, file) for (name, export), (_, file, _) in zip(exports.items(), jobs, strict=True)}


@pytest.fixture(scope="module")
def shapes(request):
    return _made(request, SHAPES)


@pytest.fixture(scope="module")
def real_vocabularies(request):
    return _made(request, VOCABULARIES)


def _base(request, directory, tiny, case):
    small_models.base(directory, tiny / "base", **case.settings)
    if case.vocabulary is not None:
        for file in ("tokenizer.model", "special_tokens_map.json", "tokenizer_config.json"):
            (directory / file).unlink()
        needs_words = case.vocabulary in (vocabularies.llama3_tokens, vocabularies.qwen_tokens)
        case.vocabulary(directory, request.getfixturevalue("smollm2") if needs_words else None)
        names = {vocabularies.llama3_tokens: vocabularies.LLAMA3, vocabularies.qwen_tokens: vocabularies.HERMES_TOOLS}
        chat_template = names.get(case.vocabulary, small_models.SAIGA2)
        (directory / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    if case.change:
        case.change(directory)
    return directory


def _merged(merged: Merged, base_dir: Path, directory: Path) -> None:
    """The merged model in float32 as a directory of Hugging Face's."""
    shutil.copytree(base_dir, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = {name: merged.read(name) for name in merged.shapes}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def require_equal_metadata(ours, theirs):
    def general(key):
        return key if key.startswith(("general", "tokenizer", "saigakit")) else "*." + key.partition(".")[2]

    there = object()
    unequal = [key for key in {**ours, **theirs} if ours.get(key, there) != theirs.get(key, there)]
    assert [key for key in unequal if general(key) not in DIFFERENT] == []


def require_that_of_llama_cpp(made, quant_type, tmp_path):
    export, float_file = made
    replace(export, quant_types=[quant_type]).write(tmp_path / "ours.gguf")
    llama_cpp_chain.quantise(float_file, quant_type, tmp_path / "theirs.gguf")
    ours, theirs = (llama_cpp_chain.File.of(tmp_path / f"{which}.gguf") for which in ("ours", "theirs"))
    types = [{name: tensor.ggml_type for name, tensor in file.tensors.items()} for file in (ours, theirs)]
    assert types[0] == types[1]
    assert list(ours.tensors) == list(theirs.tensors)
    assert [name for name in ours.tensors if ours.tensors[name] != theirs.tensors[name]] == []
    require_equal_metadata(ours.metadata, theirs.metadata)


def pairs(cases):
    return [(name, quant_type) for name, case in cases.items() for quant_type in case.quant_types]


@pytest.mark.parametrize(("name", "quant_type"), pairs(SHAPES))
def test_the_file_is_that_of_llama_cpps_own_chain(shapes, name, quant_type, tmp_path):
    require_that_of_llama_cpp(shapes[name], quant_type, tmp_path)


@pytest.mark.parametrize(("name", "quant_type"), pairs(VOCABULARIES))
def test_a_file_with_a_real_vocabulary_is_that_of_llama_cpps_own_chain(real_vocabularies, name, quant_type, tmp_path):
    require_that_of_llama_cpp(real_vocabularies[name], quant_type, tmp_path)
