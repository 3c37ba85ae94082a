"""The registry has every promised model, with all that follows from its name."""

import dataclasses
import json
from importlib import resources

import pytest

from saigakit import registry
from saigakit.errors import SaigaError
from saigakit.registry import MODELS, Sampling

PROMISED = (
    "saiga2_7b",
    "saiga2_13b",
    "saiga_mistral_7b",
    "saiga_llama3_8b",
    "saiga_nemo_12b",
    "saiga_yandexgpt_8b",
    "saiga_gemma3_12b",
    "tlite_2.1_8b",
    "vikhr_nemo_12b",
    "avibe",
    "qvikhr3_4b",
    "ruadapt_qwen3_4b",
    "qwen3_4b_2507",
    "yandexgpt5_lite_8b_instruct",
    "smollm2_135m",
    "saiga_tiny",
)


@pytest.mark.parametrize("name", PROMISED)
def test_a_promised_model_has_a_base_and_a_licence(name):
    spec = registry.find(name)
    assert spec.name == name
    assert spec.base_model
    assert spec.licence


@pytest.mark.parametrize("spec", MODELS.values(), ids=lambda spec: spec.name)
def test_a_template_of_the_registry_exists(spec):
    file = resources.files("saigakit.prompt").joinpath(f"templates/{spec.template}.jinja")
    assert spec.template is None or file.is_file()


def test_every_template_file_belongs_to_a_model_or_can_be_chosen():
    files = {file.name for file in resources.files("saigakit.prompt").joinpath("templates").iterdir()}
    assert files == {"hermes.jinja", "chatml.jinja"} | {
        f"{spec.template}.jinja" for spec in MODELS.values() if spec.template
    }


@pytest.mark.parametrize("spec", MODELS.values(), ids=lambda spec: spec.name)
def test_a_conversation_in_training_fits_the_context(spec):
    assert 0 < spec.max_seq_length <= spec.context_length


@pytest.mark.parametrize("spec", MODELS.values(), ids=lambda spec: spec.name)
def test_a_model_with_a_released_adapter_has_a_template_of_ours(spec):
    """The adapters of 2023 bring no chat template."""
    assert (spec.released_adapter is None) == (spec.template is None)


def test_three_models_have_at_most_4_billion_parameters_and_no_toy_weights():
    small = [spec.name for spec in MODELS.values() if 1 < spec.parameters_b < 4.1]
    assert small == ["qvikhr3_4b", "ruadapt_qwen3_4b", "qwen3_4b_2507"]


@pytest.mark.parametrize("name", ["saiga2_7b", "saiga2_13b"])
def test_saiga_2_has_the_context_of_llama_2(name):
    assert MODELS[name].context_length == 4096


def test_role_ids_are_those_of_the_vocabulary_of_the_model():
    found = {
        name: [ids[0] for text, ids in MODELS[name].golden_ids if not text.startswith("if")]
        for name in ("saiga2_7b", "saiga_mistral_7b")
    }
    assert found == {"saiga2_7b": [1788, 1404, 9225], "saiga_mistral_7b": [1587, 2188, 12435]}


def test_gemma3_is_not_float16_safe_and_the_others_are():
    assert [spec.name for spec in MODELS.values() if not spec.float16_safe] == ["saiga_gemma3_12b"]


def test_a_row_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MODELS["saiga2_7b"].base_model = "other/model"  # type: ignore[misc]


def test_a_hub_id_gets_a_row_of_its_own():
    assert registry.find("someone/some-model").base_model == "someone/some-model"


def test_a_directory_gets_a_row_of_its_own(tmp_path):
    assert registry.find(str(tmp_path)).base_model == str(tmp_path)


@pytest.mark.parametrize(("typed", "meant"), [("saiga2_7B", "saiga2_7b"), ("saiga_lama3_8b", "saiga_llama3_8b")])
def test_a_misspelt_name_is_answered_with_the_right_one(typed, meant):
    with pytest.raises(SaigaError, match=f"{typed}.*Did you mean '{meant}'"):
        registry.find(typed)


@pytest.mark.parametrize("name", ["", "gpt5", "/nowhere/at/all", "./gone", "a/b/c"])
def test_an_unknown_model_is_refused_with_all_names(name):
    with pytest.raises(SaigaError, match=r"is unknown.*saiga2_7b, .*saiga_tiny.*Hub id"):
        registry.find(name)


def test_a_gguf_file_is_not_a_model():
    with pytest.raises(SaigaError, match=r"'runs/model\.gguf' is a GGUF file.*Did you mean its base model"):
        registry.find("runs/model.gguf")


# Qwen/Qwen3-8B, and Qwen2.5, which recommends a small penalty
QWEN3 = {"do_sample": True, "eos_token_id": [151645, 151643], "temperature": 0.6, "top_k": 20, "top_p": 0.95}


@pytest.mark.parametrize(
    ("model", "recommended", "expected"),
    [
        ("owner/other", QWEN3, Sampling(temperature=0.6, top_p=0.95, top_k=20, repeat_penalty=1.0)),
        ("owner/other", {"repetition_penalty": 1.05, "top_k": None}, Sampling(repeat_penalty=1.05)),
        ("owner/other", None, Sampling(temperature=0.2, top_p=0.9, top_k=30, repeat_penalty=1.0)),
        ("tlite_2.1_8b", {**QWEN3, "temperature": 0.7}, Sampling(temperature=0.6, top_p=0.95, top_k=20)),
        ("saiga2_7b", QWEN3, Sampling(temperature=0.2, top_p=0.9, top_k=30, repeat_penalty=1.1)),
    ],
)
def test_sampling_is_the_registrys_then_the_bases_then_the_default(tmp_path, model, recommended, expected):
    if recommended is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(recommended))
    assert Sampling.of(registry.find(model), tmp_path) == expected


def test_a_damaged_generation_config_is_named(tmp_path):
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(SaigaError, match=r"generation_config\.json is damaged"):
        Sampling.of(registry.find("owner/other"), tmp_path)


@pytest.mark.parametrize("spec", MODELS.values(), ids=lambda spec: spec.name)
def test_every_row_states_fields_of_sampling(spec, tmp_path):
    assert Sampling.of(spec, tmp_path)
