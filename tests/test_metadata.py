"""kaggle-metadata contains nothing that Kaggle would silently drop or misread."""

import json
from pathlib import Path

import pytest

METADATA = Path(__file__).parent.parent / "kaggle-metadata"
STAGES = ("01_format", "02_train", "03_merge_gguf", "04_infer")
DATASETS = ("wheels", "example-data")
# Kaggle ignores unknown keys, including misspelt ones.
KNOWN_KEYS = {
    "id", "title", "code_file", "language", "kernel_type", "is_private", "enable_gpu", "enable_tpu",
    "enable_internet", "machine_shape", "dataset_sources", "kernel_sources",
}  # fmt: skip


def read(stage):
    return json.loads((METADATA / stage / "kernel-metadata.json").read_text(encoding="utf-8"))


def read_dataset(name):
    return json.loads((METADATA / name / "dataset-metadata.json").read_text(encoding="utf-8"))


def records():
    lines = (METADATA / "example-data" / "records.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


@pytest.mark.parametrize("stage", STAGES)
def test_kaggle_knows_every_key(stage):
    assert set(read(stage)) <= KNOWN_KEYS


@pytest.mark.parametrize("stage", STAGES)
def test_the_slug_follows_from_the_title(stage):
    slugify = pytest.importorskip("slugify").slugify
    content = read(stage)
    assert content["id"] == f"USERNAME/{slugify(content['title'])}"
    assert 5 <= len(content["title"]) <= 50


@pytest.mark.parametrize("stage", STAGES)
def test_the_code_file_is_the_notebook_of_the_stage(stage):
    assert (METADATA / stage / read(stage)["code_file"]).resolve() == METADATA.parent / "notebooks" / f"{stage}.ipynb"
    assert (METADATA / stage / read(stage)["code_file"]).is_file()


@pytest.mark.parametrize("stage", STAGES)
def test_every_switch_is_explicit(stage):
    # The defaults of the command line differ from its documentation, and a number instead of a bool is a TypeError.
    content = read(stage)
    switches = {key: content[key] for key in ("is_private", "enable_gpu", "enable_tpu", "enable_internet")}
    gpu = stage in ("02_train", "04_infer")
    assert switches == {"is_private": True, "enable_gpu": gpu, "enable_tpu": False, "enable_internet": True}
    assert content.get("machine_shape") == ("NvidiaTeslaT4" if gpu else None)
    assert (content["language"], content["kernel_type"]) == ("python", "notebook")


@pytest.mark.parametrize("stage", STAGES)
def test_a_copied_or_imported_notebook_brings_the_same_accelerator_and_internet(stage):
    notebook = json.loads((METADATA / stage / read(stage)["code_file"]).read_text(encoding="utf-8"))
    pushed = read(stage)
    assert notebook["metadata"]["kaggle"] == {
        "accelerator": {"NvidiaTeslaT4": "nvidiaTeslaT4", None: "none"}[pushed.get("machine_shape")],
        "isGpuEnabled": pushed["enable_gpu"],
        "isInternetEnabled": pushed["enable_internet"],
        "language": pushed["language"],
        "sourceType": pushed["kernel_type"],
    }


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_attaches_every_stage_before_it(stage):
    assert read(stage)["kernel_sources"] == [read(earlier)["id"] for earlier in STAGES[: STAGES.index(stage)]]


def test_every_attached_data_set_is_one_of_ours():
    ours = {read_dataset(name)["id"] for name in DATASETS}
    attached = {source for stage in STAGES for source in read(stage)["dataset_sources"]}
    assert attached == ours


@pytest.mark.parametrize("name", DATASETS)
def test_the_texts_of_a_data_set_have_lengths_that_kaggle_accepts(name):
    slugify = pytest.importorskip("slugify").slugify
    content = read_dataset(name)
    slug = content["id"].removeprefix("USERNAME/")
    assert slug == slugify(content["title"])
    assert 6 <= len(slug) <= 50 and 6 <= len(content["title"]) <= 50
    assert 20 <= len(content["subtitle"]) <= 80
    assert len(content["licenses"]) == 1


def test_an_example_has_a_system_a_user_and_an_assistant_turn():
    rows = records()
    assert len(rows) >= 48
    assert all([message["role"] for message in row] == ["system", "user", "assistant"] for row in rows)
    assert len({row[0]["content"] for row in rows}) == 1


def test_an_example_text_occurs_once():
    texts = [row[1]["content"] for row in records()]
    assert len(texts) == len(set(texts))


def test_an_example_answer_quotes_its_text():
    for _, user, assistant in records():
        for item in json.loads(assistant["content"]):
            assert set(item) == {"term", "definition"}
            assert item["definition"] in user["content"]
            assert item["term"][:-2].lower() in user["content"].lower()  # the ending may be of another case


def test_about_a_quarter_of_the_examples_define_nothing():
    answers = [row[2]["content"] for row in records()]
    assert 12 <= answers.count("[]") <= len(answers) // 3
