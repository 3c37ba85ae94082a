"""Look up everything that follows from a model's name: base model, adapter, prompt, context, defaults."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

from saigakit.errors import SaigaError, suggestion

Quantization = Literal["nf4", "int8", "none"]

SAIGA_SYSTEM_PROMPT = "Ты — Сайга, русскоязычный автоматический ассистент. Ты разговариваешь с людьми и помогаешь им."
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


# Names in a GGUF of the fields of Sampling.
SAMPLING_IN_GGUF = {"top_k": "top_k", "top_p": "top_p", "temperature": "temp", "repeat_penalty": "penalty_repeat"}


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling settings, with llama.cpp's names and meanings."""

    temperature: float = 0.2
    top_p: float = 0.9
    top_k: int = 30
    repeat_penalty: float = 1.0  # a penalty breaks JSON and code, which repeat themselves

    @classmethod
    def of(cls, spec: "ModelSpec", base_dir: Path) -> Self:
        """What the registry states, else what the base's generation_config.json recommends, else the defaults."""
        file = base_dir / "generation_config.json"
        try:
            found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        except ValueError as error:
            raise SaigaError(f"{file} is damaged ({error}); download it again.") from None
        names = {"repetition_penalty": "repeat_penalty"} | {name: name for name in ("temperature", "top_p", "top_k")}
        recommended = {ours: found[name] for name, ours in names.items() if found.get(name) is not None}
        return cls(**{**recommended, **spec.sampling})

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, str]) -> Self:
        """The settings that a GGUF recommends in `general.sampling.*`; the defaults for those it lacks."""
        keys = {ours: f"general.sampling.{name}" for ours, name in SAMPLING_IN_GGUF.items()}
        return cls(**{ours: type(getattr(cls, ours))(metadata[key]) for ours, key in keys.items() if key in metadata})


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Shape of a new LoRA; a continued adapter keeps its own."""

    rank: int = 16
    alpha: int = 16
    dropout: float = 0.05
    target_modules: tuple[str, ...] = ALL_LINEAR
    modules_to_save: tuple[str, ...] = ()  # trained in full, such as "embed_tokens"
    rslora: bool = False  # scale by alpha / sqrt(rank), arXiv:2312.03732
    dora: bool = False  # separate direction and magnitude, arXiv:2402.09353

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        tuples = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**values | tuples)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    name: str
    base_model: str  # a Hub id, a directory, or "package:NAME" for weights from a Python package
    revision: str | None = None  # of the base on the Hub; None: that in PINS, or else main
    released_adapter: str | None = None
    template: str | None = None  # templates/<template>.jinja; None: the tokenizer's own
    system_prompt: str | None = None
    context_length: int = 8192  # tokens that the model was trained for
    max_seq_length: int = 2048  # tokens that a T4 can hold: tests/train/test_preflight_max_seq_length.py
    golden_ids: tuple[tuple[str, tuple[int, ...]], ...] = ()  # (text, ids), asserted at every load
    sampling: Mapping[str, Any] = field(default_factory=dict)  # fields of Sampling; see Sampling.of for the others
    lora: Lora = field(default_factory=Lora)
    learning_rate: float = 1e-4
    quantization: Quantization = "nf4"
    float16_safe: bool = True  # False: activations overflow float16, so no T4 (sm_75)
    parameters_b: float = 7.0  # billions
    licence: str = ""


_SAIGA2_7B = ModelSpec(
    name="saiga2_7b",
    base_model="TheBloke/Llama-2-7B-fp16",
    released_adapter="IlyaGusev/saiga2_7b_lora",
    template="saiga2",
    system_prompt=SAIGA_SYSTEM_PROMPT,
    sampling={"temperature": 0.2, "top_p": 0.9, "top_k": 30, "repeat_penalty": 1.1},  # of rulm
    context_length=4096,
    max_seq_length=4096,
    golden_ids=(
        # Role headers of Saiga-2 in the Llama-2 vocabulary, as rulm trained them (1587/2188/12435 are Mistral's).
        ("system\n", (1788, 13)),
        ("user\nПривет", (1404, 13, 30013, 641, 7616)),
        ("bot\n", (9225, 13)),
        # Runs of spaces: a tokenizer.json that transformers 5 converts from tokenizer.model splits them differently.
        ("if x:\n            return x", (565, 921, 29901, 13, 9651, 736, 921)),
    ),
    parameters_b=6.74,
    licence="llama2",
)
_SAIGA_LLAMA3_8B = ModelSpec(
    name="saiga_llama3_8b",
    base_model="IlyaGusev/saiga_llama3_8b",
    system_prompt=SAIGA_SYSTEM_PROMPT,
    max_seq_length=7168,
    sampling={**_SAIGA2_7B.sampling, "temperature": 0.6},
    parameters_b=8.03,
    licence="llama3",
)

_ROWS = (
    _SAIGA2_7B,
    replace(
        _SAIGA2_7B,
        name="saiga2_13b",
        base_model="meta-llama/Llama-2-13b-hf",
        released_adapter="IlyaGusev/saiga2_13b_lora",
        parameters_b=13.0,
    ),
    replace(
        _SAIGA2_7B,
        name="saiga_mistral_7b",
        base_model="Open-Orca/Mistral-7B-OpenOrca",
        released_adapter="IlyaGusev/saiga_mistral_7b_lora",
        golden_ids=(
            ("system\n", (1587, 13)),
            ("user\n", (2188, 13)),
            ("bot\n", (12435, 13)),
            ("if x:\n            return x", (513, 1318, 28747, 13, 17422, 604, 1318)),
        ),
        parameters_b=7.24,
        licence="apache-2.0",
    ),
    _SAIGA_LLAMA3_8B,
    replace(
        _SAIGA_LLAMA3_8B,
        name="saiga_nemo_12b",
        base_model="IlyaGusev/saiga_nemo_12b",
        context_length=16384,
        max_seq_length=3584,
        parameters_b=12.2,
        licence="apache-2.0",
    ),
    replace(
        _SAIGA_LLAMA3_8B,
        name="saiga_yandexgpt_8b",
        base_model="IlyaGusev/saiga_yandexgpt_8b",
        context_length=16384,
        parameters_b=8.04,
        licence="yandexgpt-5-lite-8b",
    ),
    replace(
        _SAIGA_LLAMA3_8B,
        name="saiga_gemma3_12b",
        base_model="IlyaGusev/saiga_gemma3_12b",
        max_seq_length=1024,
        float16_safe=False,  # huggingface/transformers#36814: NaN in float16
        parameters_b=12.2,
        licence="gemma",
    ),
    ModelSpec(
        name="tlite_2.1_8b",
        base_model="t-tech/T-lite-it-2.1",
        context_length=32768,
        max_seq_length=6656,
        sampling={"temperature": 0.6},
        parameters_b=8.19,
        licence="apache-2.0",
    ),
    ModelSpec(
        name="vikhr_nemo_12b",
        base_model="Vikhrmodels/Vikhr-Nemo-12B-Instruct-R-21-09-24",
        context_length=16384,
        max_seq_length=3584,
        sampling={"temperature": 0.3},
        parameters_b=12.2,
        licence="apache-2.0",
    ),
    ModelSpec(
        name="avibe",
        base_model="AvitoTech/avibe",  # AvitoTech/avibe-eagle serves it in float16; but see unsloth#3155, NaN in Qwen3
        max_seq_length=7168,
        parameters_b=7.9,
        licence="apache-2.0",
    ),
    ModelSpec(
        name="qvikhr3_4b",
        base_model="Vikhrmodels/QVikhr-3-4B-Instruction",
        context_length=40960,
        max_seq_length=14336,
        parameters_b=4.02,
        licence="apache-2.0",
    ),
    ModelSpec(
        name="ruadapt_qwen3_4b",
        base_model="RefalMachine/RuadaptQwen3-4B-Instruct",
        context_length=32768,
        max_seq_length=14336,
        parameters_b=4.0,
        licence="apache-2.0",
    ),
    ModelSpec(
        name="qwen3_4b_2507",
        base_model="Qwen/Qwen3-4B-Instruct-2507",
        context_length=262144,
        max_seq_length=14336,
        sampling={"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repeat_penalty": 1.0},
        parameters_b=4.02,
        licence="apache-2.0",
    ),
    ModelSpec(
        name="yandexgpt5_lite_8b_instruct",
        base_model="yandex/YandexGPT-5-Lite-8B-instruct",
        context_length=32768,
        max_seq_length=7168,
        sampling={"temperature": 0.3},
        parameters_b=8.04,
        licence="yandexgpt-5-lite-8b",
    ),
    ModelSpec(
        name="smollm2_135m",
        base_model="package:smollm2_135m",
        max_seq_length=1024,
        golden_ids=(("<|im_start|>", (44, 108, 306, 79, 3738, 108, 46)),),  # as text, never the special token 1
        sampling={"temperature": 0.0, "repeat_penalty": 1.0},  # it copies terms: greedy, free to repeat
        lora=Lora(rank=32, alpha=64, dropout=0.0),
        learning_rate=1e-3,
        quantization="none",
        parameters_b=0.135,
        licence="apache-2.0",
    ),
    replace(
        _SAIGA2_7B,
        name="saiga_tiny",
        base_model="package:saiga_tiny",
        released_adapter="package:saiga_tiny",
        context_length=1024,
        max_seq_length=512,
        golden_ids=(),
        lora=Lora(rank=4, alpha=8),
        learning_rate=1e-3,
        parameters_b=0.0001,
        licence="apache-2.0",
    ),
)
MODELS: dict[str, ModelSpec] = {spec.name: spec for spec in _ROWS}
# By repository on the Hub: the commit that is used, and SHA-256 by name of the files whose hash is known.
PINS: dict[str, tuple[str, dict[str, str]]] = {
    "IlyaGusev/saiga_llama3_8b": ("17e1bcc9c6d3e31852a95a168f7d3778f395cd2a", {}),  # v7 in its card
    "meta-llama/Llama-2-13b-hf": ("5c31dfb671ce7cfe2d7bb7c04375e44c55e815b1", {}),
    "Qwen/Qwen3-4B-Instruct-2507": ("cdbee75f17c01a7cc42f958dc650907174af0554", {}),
}


def find(model: str) -> ModelSpec:
    """The row for a registry name, a Hub id (`owner/name` or `owner/name@revision`) or a model directory."""
    if not isinstance(model, str):
        raise SaigaError(f"model={model!r} is not text; give a name.")
    if model in MODELS:
        return MODELS[model]
    if model.endswith(".gguf"):
        raise SaigaError(f"model={model!r} is a GGUF file, which cannot be trained. Did you mean its base model?")
    if model and Path(model).is_dir():
        return with_context(ModelSpec(name=model, base_model=model))
    repo, _, revision = model.partition("@")
    if repo.count("/") == 1 and not repo.startswith((".", "/")):
        return ModelSpec(name=model, base_model=repo, revision=revision or None)
    raise SaigaError(
        f"model={model!r} is unknown.{suggestion(model, MODELS)} Give a registry name ({', '.join(MODELS)}), "
        "a Hub id (owner/name or owner/name@revision) or an existing directory."
    )


def with_context(spec: ModelSpec) -> ModelSpec:
    """With the lengths that config.json of a directory allows; unchanged where it says nothing, as for a Hub id."""
    try:
        content = json.loads((Path(spec.base_model) / "config.json").read_text(encoding="utf-8"))
        context = int(content.get("text_config", content)["max_position_embeddings"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):  # what needs it says more
        return spec
    return replace(spec, context_length=context, max_seq_length=min(context, spec.max_seq_length))
