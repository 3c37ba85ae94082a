"""Settings of a training run: checked on creation, unchanged by a round trip through JSON."""

import dataclasses
import json

import pytest

from saigakit import TrainConfig
from saigakit.errors import SaigaError
from saigakit.registry import MODELS, Lora


def config(**changes) -> TrainConfig:
    values = {"model": "saiga2_7b", "train_file": "train.jsonl", "output_dir": "02_train", **changes}
    return TrainConfig(**values)


def test_settings_that_are_not_given_come_from_the_registry():
    spec = MODELS["saiga2_7b"]
    made = config()
    assert (made.sequence_budget, made.weights_as, made.peak_learning_rate, made.new_lora) == (
        spec.max_seq_length,
        spec.quantization,
        spec.learning_rate,
        spec.lora,
    )


def test_settings_that_are_given_take_precedence_over_the_registry():
    made = config(max_seq_length=512, quantization="none", learning_rate=3e-4, lora=Lora(rank=8))
    assert (made.sequence_budget, made.weights_as, made.peak_learning_rate, made.new_lora.rank) == (
        512,
        "none",
        3e-4,
        8,
    )


@pytest.mark.parametrize(
    ("model", "adapter", "start", "is_folded"),
    [
        ("saiga2_7b", "auto", "IlyaGusev/saiga2_7b_lora", True),
        ("saiga2_7b", "folded", "IlyaGusev/saiga2_7b_lora", True),
        ("saiga2_7b", "released", "IlyaGusev/saiga2_7b_lora", False),
        ("saiga2_7b", None, None, False),
        ("saiga2_7b", "runs/1/02_train", "runs/1/02_train", False),
        ("saiga_llama3_8b", "auto", None, False),
        ("saiga_llama3_8b", "someone/lora", "someone/lora", False),
    ],
)
def test_the_adapter_to_start_from(model, adapter, start, is_folded):
    made = config(model=model, adapter=adapter)
    assert (made.start_adapter, made.is_folded) == (start, is_folded)


def test_a_released_adapter_is_refused_for_a_model_without_one():
    with pytest.raises(SaigaError, match="saiga_llama3_8b has no released adapter; leave adapter out"):
        config(model="saiga_llama3_8b", adapter="released")


def test_a_learning_rate_that_yaml_reads_as_text_is_explained():
    with pytest.raises(SaigaError, match=r"learning_rate='2e-4' is not a number.*2\.0e-4"):
        config(learning_rate="2e-4")


@pytest.mark.parametrize("name", ["learning_rate", "epochs", "max_hours"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), True, "3"])
def test_a_number_that_is_not_positive_is_refused(name, value):
    with pytest.raises(SaigaError, match=f"^{name}="):
        config(**{name: value})


@pytest.mark.parametrize("name", ["batch_size", "max_seq_length", "eval_steps", "processes"])
@pytest.mark.parametrize("value", [0, -4, 2.5, True, "16"])
def test_a_count_that_is_not_a_whole_number_is_refused(name, value):
    with pytest.raises(SaigaError, match=f"^{name}=.*whole number"):
        config(**{name: value})


@pytest.mark.parametrize("name", ["batch_size", "epochs", "max_hours", "save_minutes", "replay_fraction", "seed"])
def test_a_setting_that_has_a_default_value_cannot_be_none(name):
    with pytest.raises(SaigaError, match=f"^{name}=None"):
        config(**{name: None})


@pytest.mark.parametrize("value", ["int4", "4bit", False])
def test_an_unknown_quantization_is_refused_with_the_known_ones(value):
    with pytest.raises(SaigaError, match=r"quantization=.*'nf4', 'int8' or 'none'"):
        config(quantization=value)


def test_a_max_seq_length_over_the_context_is_refused_with_both_numbers():
    with pytest.raises(SaigaError, match=r"max_seq_length=8192 is over .* 4096 tokens"):
        config(max_seq_length=8192)
    assert config(max_seq_length=4096).sequence_budget == 4096


def test_an_unknown_model_is_refused():
    with pytest.raises(SaigaError, match="saiga2_7b"):
        config(model="saiga2_7")


def test_it_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().epochs = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "changes", [{}, {"lora": Lora(rank=8, target_modules=("q_proj",)), "adapter": None, "seed": 1}]
)
def test_it_survives_json(tmp_path, changes):
    made = config(eval_file="held_out.jsonl", **changes)
    assert TrainConfig.read(made.write(tmp_path / "config.json")) == made


def test_cyrillic_stays_readable_in_the_file(tmp_path):
    file = config(train_file="данные.jsonl").write(tmp_path / "config.json")
    assert "данные.jsonl" in file.read_text(encoding="utf-8")


def test_an_unknown_setting_is_refused(tmp_path):
    file = config().write(tmp_path / "config.json")
    values = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**values, "warmup_ratio": 0.1}), encoding="utf-8")
    with pytest.raises(SaigaError, match="unknown setting 'warmup_ratio'"):
        TrainConfig.read(file)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": "x"}, "seed='x' must be a whole number from 0"),
        ({"seed": -1}, "seed=-1 must be a whole number from 0"),
        ({"epochs": float("inf")}, "epochs=inf must be above 0"),
        ({"eval_file": 5}, "eval_file=5 is not text; give a path"),
        ({"resume_from": 5}, "resume_from=5 is not text; give a path"),
        ({"lora": {"rank": 8}}, r"give a Lora, for example Lora\(rank=32\)"),
        ({"lora": Lora(rank="16")}, "lora.rank='16' must be a whole number"),
        ({"lora": Lora(rank=0)}, "lora.rank=0 must be a whole number"),
        ({"lora": Lora(dropout=2.0)}, "lora.dropout=2.0 must be a number from 0 to below 1"),
        ({"lora": Lora(target_modules=())}, r"lora.target_modules=\(\) must be a list of names"),
        ({"lora": Lora(target_modules="q_proj")}, "lora.target_modules='q_proj' must be a list of names"),
        ({"model": "smollm2_135m", "adapter": "folded"}, "adapter='folded': smollm2_135m has no released adapter"),
    ],
)
def test_an_invalid_value_is_refused_with_a_message(settings, message):
    with pytest.raises(SaigaError, match=message):
        TrainConfig(**{"model": "saiga_tiny", "train_file": "x", "output_dir": "y"} | settings)
