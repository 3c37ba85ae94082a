"""What Kaggle gets when a notebook is pushed."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from kaggle_runs import SAVE, STAGES, code
from kaggle_stub import KERNELS

from saigakit import cli
from saigakit.errors import SaigaError
from saigakit.kaggle import kernels, notebook

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("stage", STAGES)
def test_a_pushed_stage_arrives_as_its_metadata_says(kaggle, stage):
    kaggle.accept_pushes()
    slug = "alice/saigakit-" + stage.replace("_", "-")
    assert kernels.push(stage, {"model": "saiga_tiny"}) == slug
    [sent] = kaggle.sent(KERNELS + "SaveKernel")
    earlier = ["alice/saigakit-" + other.replace("_", "-") for other in STAGES[: STAGES.index(stage)]]
    assert (sent["slug"], sent["newTitle"]) == (slug, slug.removeprefix("alice/").replace("-", " "))
    gpu = stage in ("02_train", "04_infer")
    assert (sent.get("enableGpu", False), sent.get("machineShape")) == (gpu, "NvidiaTeslaT4" if gpu else None)
    assert "alice/saigakit-wheels" in sent["datasetDataSources"]
    assert sent.get("kernelDataSources", []) == earlier
    assert sent["isPrivate"] is True and sent["enableInternet"] is True
    [injected] = set(code(sent["text"])) - set(code((REPOSITORY / "notebooks" / f"{stage}.ipynb").read_text("utf-8")))
    assert injected.splitlines() == ["# Parameters", 'model = "saiga_tiny"']


def test_a_pushed_notebook_contains_its_parameters(kaggle, folder):
    kaggle.accept_pushes()
    kernels.push(folder, {"learning_rate": 3e-4})
    text = kaggle.sent(KERNELS + "SaveKernel")[0]["text"]
    values = {}
    exec("\n".join(code(text)[:2]), values)
    assert values["learning_rate"] == 3e-4
    assert str(folder.parent.parent) not in text


def test_an_unknown_parameter_is_refused_before_anything_is_sent(kaggle, folder):
    with pytest.raises(SaigaError, match=r"no parameter learn_rate\. Did you mean 'learning_rate'\?"):
        kernels.push(folder, {"learn_rate": 3e-4})
    assert kaggle.calls == []


def test_saigakit_push_starts_a_notebook_with_its_parameters(kaggle):
    kaggle.accept_pushes()
    ended = CliRunner().invoke(cli.main, ["push", "02_train", "-p", "epochs", "3"])
    assert ended.exit_code == 0, ended.output
    assert "epochs = 3" in "\n".join(code(kaggle.sent(KERNELS + "SaveKernel")[0]["text"]))


def test_an_unknown_stage_is_refused_with_the_known_ones(kaggle):
    with pytest.raises(SaigaError, match="01_format, 02_train, 03_merge_gguf, 04_infer"):
        kernels.push("05_profit")


@pytest.mark.parametrize(
    ("stage", "name", "value", "message"),
    [
        ("02_train", "epochs", "drei", "epochs='drei' is not a number"),
        ("02_train", "model", str(REPOSITORY / "notebooks"), "is on this machine, and Kaggle does not have it"),
        ("02_train", "batch_size", 0, "batch_size=0 must be a whole number"),
        ("02_train", "model", "saiga2", "unknown.*Did you mean 'saiga2_7b'"),
        ("01_format", "eval_fraction", 1.5, "eval_fraction=1.5 must be a number between 0 and 1"),
        ("01_format", "max_seq_length", 10**6, "over the context length of saiga2_7b"),
        ("03_merge_gguf", "quant_type", "Q4", "quant_type='Q4' is unknown"),
        ("03_merge_gguf", "quality_tokens", -1, "quality_tokens=-1 must be a whole number of at least 0"),
        ("04_infer", "max_examples", True, "max_examples=True must be a whole number"),
    ],
)
def test_a_value_that_the_stage_would_refuse_never_waits_for_a_machine(kaggle, stage, name, value, message):
    with pytest.raises(SaigaError, match=message):
        kernels.push(stage, {name: value})
    assert kaggle.calls == []


def test_a_model_of_kaggles_machine_is_not_looked_for_here(kaggle):
    kaggle.accept_pushes()
    kernels.push("02_train", {"model": "/kaggle/input/models/alice/saiga", "epochs": 1})
    assert len(kaggle.sent(SAVE)) == 1


def test_the_accelerator_is_sent_in_the_metadata_and_as_an_option(kaggle, folder):
    kaggle.accept_pushes()
    kernels.push(folder, accelerator="NvidiaL4X1")
    [sent] = kaggle.sent(SAVE)
    assert (sent["machineShape"], sent["enableGpu"]) == ("NvidiaL4X1", True)


@pytest.mark.parametrize(
    ("accelerator", "message"),
    [("TpuV6E8", "no TPU"), ("NvidiaTeslaP100", "retired.*NvidiaTeslaT4"), ("nvidiateslat4", "NvidiaTeslaT4")],
)
def test_an_accelerator_that_kaggle_would_replace_in_silence_is_refused(kaggle, folder, accelerator, message):
    ended = CliRunner().invoke(cli.main, ["push", str(folder), "--accelerator", accelerator])
    assert ended.exit_code == 1
    assert re.search(message, ended.output)
    assert kaggle.calls == []


def test_a_notebook_over_a_megabyte_is_refused_before_it_is_sent(kaggle, folder):
    file = folder.parent.parent / "notebooks" / "02_train.ipynb"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["cells"][1]["source"] = f"text = {'x' * 1_000_000!r}"
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(SaigaError, match=r"02_train\.ipynb has 1,000,\d\d\d bytes, and Kaggle accepts 1,000,000"):
        kernels.push(folder)
    assert kaggle.calls == []


def test_outputs_do_not_count_and_are_not_sent(kaggle, folder):
    kaggle.accept_pushes()
    file = folder.parent.parent / "notebooks" / "02_train.ipynb"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["cells"][1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "x" * 1_100_000}]
    file.write_text(json.dumps(content), encoding="utf-8")
    kernels.push(folder)
    assert "xxx" not in kaggle.sent(SAVE)[0]["text"]


def test_a_title_that_gives_another_name_is_refused_before_it_is_sent(kaggle, folder):
    metadata = folder / "kernel-metadata.json"
    metadata.write_text(metadata.read_text("utf-8").replace("saigakit 02 train", "Saigakit: train!"), encoding="utf-8")
    with pytest.raises(SaigaError, match="gives the name 'saigakit-train', but the id ends in 'saigakit-02-train'"):
        kernels.push(folder)
    assert kaggle.calls == []


def test_a_public_push_is_public(kaggle, folder):
    kaggle.accept_pushes()
    kernels.push(folder, public=True)
    assert not kaggle.sent(SAVE)[0].get("isPrivate", False)


def test_metadata_are_found_from_any_directory(kaggle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert notebook.find_folder("02_train") == REPOSITORY / "kaggle-metadata" / "02_train"
