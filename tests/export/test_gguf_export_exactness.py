"""Our file against convert_hf_to_gguf in float32 and llama.cpp's quantiser, run on the merged model."""

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_cpp
import llama_cpp_chain
import pytest
import small_models
import vocabularies
from matrix import matrix
from pytest import approx
from safetensors.numpy import load_file, save_file

from saigakit import registry
from saigakit.export.gguf_export import Export, output_files
from saigakit.export.merge_plan import MergePlan
from saigakit.llamacpp import quantization
from saigakit.prompt import encoding, template
from saigakit.weights.merge import Merged

EVERY = tuple(quant_type for quant_type in quantization.QUANT_TYPES if quant_type != "F32")
BY_LAYER = ("Q2_K", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_M", "IQ4_XS")  # their tensor types depend on the layer
SOME = ("F16", "Q4_K_M")
PROMISED = {"F16", "BF16", "Q8_0", "Q4_0", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K", "Q3_K_M", "Q2_K", "IQ4_XS"}
assert set(EVERY) >= PROMISED


def own_template(base_dir):
    return (base_dir / "chat_template.jinja").read_text(encoding="utf-8")


def inference_template(base_dir):
    return template.for_inference(template.with_tools(own_template(base_dir)))


def tokenizer_json(base_dir):
    return json.dumps(json.loads((base_dir / "tokenizer.json").read_text(encoding="utf-8")), ensure_ascii=False)


# Metadata that may differ: our value, and that of llama.cpp's chain; a function computes it from the base. A case fails
# if any other key differs, a value is a different one, or a listed key does not differ.
ABSENT = "(absent)"
# The converter derives it from the directory.
NAMED = {"general.name": ("base", "Merged")}
# The model's sampling, so that other programs answer as this one does.
SAMPLING = {
    "general.sampling.top_k": (30, ABSENT),
    "general.sampling.top_p": (approx(0.9), ABSENT),
    "general.sampling.temp": (approx(0.2), ABSENT),
    "general.sampling.penalty_repeat": (1.0, ABSENT),
}
USUAL = {**NAMED, **SAMPLING}
# From the tokenizer; the converter reads only tokenizer.json, which these directories do not have.
UNKNOWN = {"tokenizer.ggml.unknown_token_id": (0, ABSENT)}
PADDING = {"tokenizer.ggml.padding_token_id": (0, ABSENT)}
# Explicit where the converter relies on llama.cpp's default, which is the same.
SPACE = {"tokenizer.ggml.add_space_prefix": (True, ABSENT)}
NO_SPACE = {"tokenizer.ggml.add_space_prefix": (False, ABSENT)}
NO_EOS = {"tokenizer.ggml.add_eos_token": (False, ABSENT)}
# False if the template spells bos, which would come twice; the converter copies what tokenizer.json does.
NO_BOS = {"tokenizer.ggml.add_bos_token": (False, ABSENT)}
BOS_IN_TEMPLATE = {"tokenizer.ggml.add_bos_token": (False, True)}
# As in training; the converter writes for every Gemma that no space is put before a text.
GEMMA_SPACE = {"tokenizer.ggml.add_space_prefix": (True, False)}
# From the registry; a directory has none.
LICENCE = {"general.license": ("apache-2.0", ABSENT)}
# What ends a turn in the template, if that is not eos.
END_OF_TURN = {"tokenizer.ggml.eot_token_id": (2, ABSENT)}
# Without tags that only training needs, and with tools.
TEMPLATE = {"tokenizer.chat_template": (inference_template, own_template)}
# llama.cpp never normalises text, so the program that runs the file must.
NORMALIZED = {"saigakit.unicode_normalization": ("NFC", ABSENT)}
TINY = {**USUAL, **UNKNOWN, **PADDING, **SPACE}
TINY_GEMMA = {**USUAL, **UNKNOWN, **GEMMA_SPACE}


def head_dim(size):
    return {f"qwen2.attention.{kind}_length": (size, ABSENT) for kind in ("key", "value")}


@dataclass(frozen=True)
class Case:
    """A small model with the architecture of a real one, the compared quant types, and the differing metadata."""

    settings: Mapping[str, Any]
    quant_types: tuple[str, ...] = SOME
    different: Mapping[str, tuple[Any, Any]] = field(default_factory=lambda: TINY)
    vocabulary: Callable[[Path, Path | None], None] | None = None  # default: that of the tiny Saiga
    change: Callable[[Path], None] | None = None  # applied to the directory
    has_adapter: bool = True
    pre: str | None = None  # the name of the pre-tokenizer, given to the converter


@dataclass(frozen=True)
class Registered:
    """A packaged model of the registry, with its released adapter if it has one."""

    model: str
    different: Mapping[str, tuple[Any, Any]]
    quant_types: tuple[str, ...] = SOME


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
    """As Gemma 3 is published: inside a model with vision, and without the usual settings."""
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


def ends_turns_with_another_token(directory: Path) -> None:
    """As Gemma is published: a turn does not end with eos."""
    for name, changes in (("config.json", {"eos_token_id": 0}), ("tokenizer_config.json", {"eos_token": "<unk>"})):
        small_models.edit_json(directory / name, **changes)


SHAPES = {
    "llama-2": Case({**SIZES, "num_key_value_heads": 8}, EVERY),
    "llama-3": Case({**DEEP, "rope_parameters": small_models.LLAMA3_ROPE}, BY_LAYER),
    "tied": Case({**GROUPED, "tie_word_embeddings": True}),
    "rows of 288": Case({**GROUPED, "hidden_size": 288, "tie_word_embeddings": True}, EVERY),
    "rows of 48": Case({"hidden_size": 48, "intermediate_size": 80}),
    "mistral": Case({**GROUPED, "kind": "mistral", "sliding_window": 64}),
    "nemo": Case({**GROUPED, "kind": "mistral", "head_dim": 64}),
    "yandexgpt": Case(
        {**GROUPED, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rms_norm_eps": 1e-5}
    ),
    "qwen2": Case({**GROUPED, "kind": "qwen2"}, different={**TINY, **head_dim(32)}),
    "qwen3": Case({**GROUPED, "kind": "qwen3", "head_dim": 64}),
    "qwen2 yarn": Case(
        {**GROUPED, "kind": "qwen2", "rope_parameters": small_models.YARN}, different={**TINY, **head_dim(32)}
    ),
    "qwen3 yarn": Case(
        {
            **GROUPED,
            "kind": "qwen3",
            "head_dim": 64,
            "rope_parameters": {**small_models.YARN, "beta_fast": 32.0, "beta_slow": 1.0},
        }
    ),
    "gemma-2": Case(
        {**GEMMA, "kind": "gemma2"},
        # The default of llama.cpp.
        different={**TINY_GEMMA, **END_OF_TURN, "gemma2.rope.freq_base": (10000.0, ABSENT)},
        change=ends_turns_with_another_token,
    ),
    "gemma-3": Case({**GEMMA, "kind": "gemma3_text", "rope_parameters": GEMMA3_ROPE}, EVERY, TINY_GEMMA),
    "gemma-3 with images": Case(
        {**GEMMA, "kind": "gemma3_text", "rope_parameters": GEMMA3_ROPE},
        ("Q4_K_M",),
        {**TINY_GEMMA, "general.name": ("base", "Base")},
        change=with_images,
        has_adapter=False,
    ),
}
SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
VOCABULARIES = {
    "llama-2": Case(
        {**SMALL, "vocab_size": 32000},
        ("Q4_K_M",),
        {**USUAL, **UNKNOWN, **NO_BOS, **NO_EOS, **SPACE},
        vocabularies.llama2,
    ),
    "mistral v1": Case(
        {**SMALL, "kind": "mistral", "vocab_size": 32000},
        ("Q4_K_M",),
        {**USUAL, **UNKNOWN, **NO_BOS, **NO_EOS, **SPACE},
        vocabularies.mistral_v1,
    ),
    "mistral v3": Case(
        {**SMALL, "kind": "mistral", "vocab_size": 32768},
        ("Q4_K_M",),
        {**USUAL, **UNKNOWN, **NO_BOS, **NO_EOS, **SPACE},
        vocabularies.mistral_v3,
    ),
    "nemo": Case(
        {**SMALL, "kind": "mistral", "head_dim": 32, "vocab_size": 131072},
        ("Q4_K_M",),
        # llama.cpp splits some words differently from this tokenizer.
        {**USUAL, **BOS_IN_TEMPLATE, **NO_EOS, **NO_SPACE, "tokenizer.huggingface.json": (tokenizer_json, ABSENT)},
        vocabularies.nemo,
    ),
    "llama-3": Case(
        {**SMALL, "vocab_size": 128256},
        ("Q4_K_M",),
        {**USUAL, **BOS_IN_TEMPLATE, **NO_EOS, **NO_SPACE, **TEMPLATE},
        vocabularies.llama3,
    ),
    "qwen2": Case(
        {**SMALL, "kind": "qwen2", "vocab_size": 151936},
        ("Q4_K_M",),
        {**USUAL, **NO_BOS, **NO_EOS, **NO_SPACE, **TEMPLATE, **head_dim(8), **NORMALIZED},
        vocabularies.qwen2,
    ),
    # SmolLM2's words instead of the two above, which take long. The converter recognises a pre-tokenizer by the ids
    # that the real vocabulary gives a text, so it needs the name.
    "llama-3 with other words": Case(
        {**SMALL, "vocab_size": 128256},
        ("Q4_K_M",),
        {**USUAL, **NO_BOS, **NO_EOS, **NO_SPACE, **TEMPLATE},
        vocabularies.llama3_tokens,
        pre="llama-bpe",
    ),
    "qwen2 with other words": Case(
        {**SMALL, "kind": "qwen2", "vocab_size": 49216},
        ("Q4_K_M",),
        {**USUAL, **NO_BOS, **NO_EOS, **NO_SPACE, **TEMPLATE, **head_dim(8), **NORMALIZED},
        vocabularies.qwen_tokens,
        pre="qwen2",
    ),
    "smollm2_135m": Registered(
        "smollm2_135m",
        {
            **SAMPLING,
            "general.sampling.temp": (0.0, ABSENT),
            "general.sampling.penalty_repeat": (1.0, ABSENT),
            **LICENCE,
            **NO_EOS,
            **NO_SPACE,
            **TEMPLATE,
            "general.name": ("smollm2_135m", "Smollm2_135M"),
        },
    ),
    "saiga_tiny": Registered(
        "saiga_tiny",
        {
            **LICENCE,
            **UNKNOWN,
            **SPACE,
            "general.name": ("saiga_tiny", "Merged"),
            # The converter reads the rest of the sampling, which is equal, from generation_config.json.
            "general.sampling.top_k": (30, 40),
            # From the registry: the default beginning of a conversation.
            "tokenizer.chat_template": (template.for_inference(small_models.SAIGA2), ABSENT),
            "saigakit.system_prompt": (registry.SAIGA_SYSTEM_PROMPT, ABSENT),
        },
    ),
}
CHAT_TEMPLATES = {
    **dict.fromkeys((vocabularies.llama3, vocabularies.llama3_tokens), vocabularies.LLAMA3),
    **dict.fromkeys((vocabularies.qwen2, vocabularies.qwen_tokens), vocabularies.HERMES_TOOLS),
}
CASES = SHAPES | {f"vocabulary of {name}": case for name, case in VOCABULARIES.items()}
QUICK = ["llama-3", "gemma-3", "qwen3", "vocabulary of llama-3 with other words"]


@pytest.fixture(scope="module")
def exports(request, converter, tmp_path_factory):
    """The export and llama.cpp's file in float32 of each case that this run needs; the converter runs once."""
    made, skipped, jobs = {}, {}, []
    in_file = [item for item in request.session.items if item.path == request.path]
    needed = {item.callspec.params["name"] for item in in_file if not item.get_closest_marker("skip")}
    for name, case in ((name, CASES[name]) for name in CASES if name in needed):
        here = tmp_path_factory.mktemp("exactness")
        make = _registered if isinstance(case, Registered) else _small
        try:
            export, pre = make(request, here, case)
        except pytest.skip.Exception as reason:
            skipped[name] = reason
            continue
        made[name] = (export, here / "float.gguf")
        jobs.append((_merged(export, here / "merged"), here / "float.gguf", pre))
    llama_cpp_chain.convert(converter, jobs)
    return made, skipped


@pytest.fixture
def exported(exports, name):
    """Those of the case `name`; skips the test if its vocabulary is not available."""
    made, skipped = exports
    if name in skipped:
        raise skipped[name]
    return made[name]


def _registered(request, _, case):
    if case.model == "smollm2_135m":
        request.getfixturevalue("smollm2")
    adapter = "released" if registry.find(case.model).released_adapter else None
    return Export.of(MergePlan.of(case.model, adapter), case.quant_types), None


def _small(request, here, case):
    base_dir = _base(request, here / "base", case)
    adapter_dir = small_models.adapter(here / "adapter", base_dir) if case.has_adapter else None
    return Export.of(MergePlan.of(str(base_dir), adapter_dir), case.quant_types), case.pre


def _base(request, directory, case):
    small_models.base(directory, request.getfixturevalue("tiny") / "base", **case.settings)
    if case.vocabulary is not None:
        for file in ("tokenizer.model", "special_tokens_map.json", "tokenizer_config.json"):
            (directory / file).unlink()
        fixture = vocabularies.source_fixture(case.vocabulary)
        case.vocabulary(directory, request.getfixturevalue(fixture) if fixture else None)
        chat_template = CHAT_TEMPLATES.get(case.vocabulary, small_models.SAIGA2)
        (directory / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    if case.change:
        case.change(directory)
    return directory


def _merged(export: Export, directory: Path) -> Path:
    """The merged model in float32 in Hugging Face's format; the base itself if there is nothing to merge."""
    merged: Merged = export.merged
    if not merged.adapters:
        return export.plan.base_dir
    shutil.copytree(export.plan.base_dir, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = {name: merged.read(name) for name in merged.shapes}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def require_equal_to_llama_cpp(export, float_file, different, directory):
    export.write(directory / "ours.gguf")
    for quant_type, ours_file in output_files(directory / "ours.gguf", export.quant_types).items():
        theirs_file = llama_cpp_chain.quantise(float_file, quant_type, directory / "theirs.gguf")
        ours, theirs = llama_cpp_chain.File.of(ours_file), llama_cpp_chain.File.of(theirs_file)
        types = [{name: tensor.ggml_type for name, tensor in file.tensors.items()} for file in (ours, theirs)]
        assert types[0] == types[1], quant_type
        assert list(ours.tensors) == list(theirs.tensors), quant_type
        assert [name for name in ours.tensors if ours.tensors[name] != theirs.tensors[name]] == [], quant_type
        assert differences(ours.metadata, theirs.metadata) == expected(different, export.plan.base_dir), quant_type
        ours_file.unlink()


def differences(ours, theirs):
    pairs = {key: (ours.get(key, ABSENT), theirs.get(key, ABSENT)) for key in {**ours, **theirs}}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def expected(different, base_dir):
    return {key: tuple(made(base_dir) if callable(made) else made for made in pair) for key, pair in different.items()}


@pytest.mark.parametrize("name", matrix(CASES, QUICK))
def test_the_file_equals_the_output_of_llama_cpps_converter_and_quantiser(exported, name, tmp_path):
    require_equal_to_llama_cpp(*exported, CASES[name].different, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vocabulary of llama-3", "vocabulary of qwen2"])
def test_llama_cpp_gives_texts_the_ids_of_the_models_own_tokenizer(exported, converter, name, tmp_path):
    export, _ = exported
    export.write(tmp_path / "ours.gguf")
    with closing(llama_cpp.Llama(str(tmp_path / "ours.gguf"), vocab_only=True, verbose=False)) as llm:
        tokenizer = encoding.load_gguf_tokenizer(llm)
        for text, ids in vocabularies.expected_ids(converter, CASES[name].vocabulary):
            assert tokenizer.encode_text(text) == ids
