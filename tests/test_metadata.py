"""kaggle-metadata contains nothing that Kaggle would silently drop or misread."""

import json
import os
import re
import shutil
import subprocess
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest
from kaggle_stub import DATASETS as DATASETS_API
from kaggle_stub import KERNELS, UPLOAD, KaggleStub

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


def run(place, command):
    """In a shell, with only the real kaggle command on top of the system's, against a stub of Kaggle's server."""
    stub = KaggleStub()
    stub.answer(KERNELS + "SaveKernel", {"ref": "/x", "url": "https://kaggle.invalid/x", "versionNumber": 1})
    stub.answer("blobs.BlobApiService/StartBlobUpload", {"token": "token", "createUrl": UPLOAD})
    stub.answer(DATASETS_API + "CreateDataset", {"status": "ok", "url": "https://kaggle.invalid/d"})
    environment = {"PATH": f"{sysconfig.get_path('scripts')}:{os.defpath}", **stub.environment(place / "home")}
    done = subprocess.run(command, shell=True, cwd=place, env=environment, capture_output=True, text=True)
    stub.shutdown()
    stub.server_close()
    return done, stub


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """What Kaggle's own command needs of a checkout, after the user's name is written into it."""
    pytest.importorskip("kagglesdk")
    place = tmp_path_factory.mktemp("checkout")
    for name in ("kaggle-metadata", "notebooks"):
        shutil.copytree(METADATA.parent / name, place / name)
    subprocess.run("sed -i s/USERNAME/alice/ kaggle-metadata/*/*.json", shell=True, cwd=place, check=True)
    return place


@pytest.mark.parametrize("stage", STAGES)
def test_kaggle_knows_every_key(stage):
    assert set(read(stage)) <= KNOWN_KEYS


def test_the_kaggle_command_reads_every_key_that_we_know():
    api = metadata.distribution("kaggle").locate_file("kaggle/api/kaggle_api_extended.py")
    source = api.read_text(encoding="utf-8").split("def kernels_push(")[1].split("\n    def ")[0]
    assert set(re.findall(r"meta_data(?:, |\.get\()\"(\w+)\"", source)) >= KNOWN_KEYS


@pytest.mark.parametrize("stage", STAGES)
def test_the_kaggle_command_pushes_what_the_metadata_says(checkout, stage):
    done, stub = run(checkout, f"kaggle kernels push -p kaggle-metadata/{stage}")
    assert "Kernel version 1 successfully pushed" in done.stdout and "does not resolve" not in done.stdout, done
    [sent] = stub.sent(KERNELS + "SaveKernel")
    content = json.loads((checkout / "kaggle-metadata" / stage / "kernel-metadata.json").read_text(encoding="utf-8"))
    expected = {
        "slug": content["id"], "newTitle": content["title"],
        "language": content["language"], "kernelType": content["kernel_type"],
        "isPrivate": content["is_private"], "enableInternet": content["enable_internet"],
        "enableGpu": content["enable_gpu"], "enableTpu": content["enable_tpu"],
        "machineShape": content.get("machine_shape"), "datasetDataSources": content["dataset_sources"],
        "kernelDataSources": content["kernel_sources"] or None,
    }  # fmt: skip
    assert {name: sent.get(name) for name in expected} == expected
    assert "USERNAME" not in json.dumps(content) and content["id"].startswith("alice/")
    pushed, notebook = (
        ["".join(cell["source"]) for cell in json.loads(text)["cells"]]
        for text in (sent["text"], (METADATA.parent / "notebooks" / f"{stage}.ipynb").read_text(encoding="utf-8"))
    )
    assert pushed == notebook


def test_the_kaggle_command_creates_the_example_data(checkout):
    done, stub = run(checkout, "kaggle datasets create -p kaggle-metadata/example-data")
    assert done.returncode == 0 and "is being created" in done.stdout, done
    [sent] = stub.sent(DATASETS_API + "CreateDataset")
    assert (sent["ownerSlug"], sent["slug"]) == ("alice", "saigakit-example-data")
    assert (sent["licenseName"], sent["isPrivate"]) == ("CC0-1.0", True)
    assert stub.uploads == [(METADATA / "example-data" / "records.jsonl").read_bytes()]


@pytest.mark.parametrize(
    ("source", "refusal"),
    [
        ("google/gemma-3/transformers/gemma-3-4b-it/1", None),
        ("google/gemma-3/transformers/gemma-3-4b-it", "must be specified in the form of"),
        ("google/gemma-3/transformers/gemma-3-4b-it/latest", "version-number must be an integer"),
        ("google/gemma-3/transformers//1", "Invalid model instance version"),
    ],
    ids=["five parts", "no version", "a word as version", "an empty part"],
)
def test_the_kaggle_command_takes_a_model_in_five_parts(checkout, tmp_path, source, refusal):
    content = json.loads((checkout / "kaggle-metadata" / "02_train" / "kernel-metadata.json").read_text())
    content |= {"model_sources": [source], "code_file": str(checkout / "notebooks" / "02_train.ipynb")}
    (tmp_path / "kernel-metadata.json").write_text(json.dumps(content), encoding="utf-8")
    done, stub = run(tmp_path, "kaggle kernels push -p .")
    assert (done.returncode, refusal or "") == (int(refusal is not None), refusal or ""), done
    assert refusal is None or refusal in done.stderr
    sent = [sent["modelDataSources"] for sent in stub.sent(KERNELS + "SaveKernel")]
    assert sent == ([] if refusal else [[source]])


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
    assert content["licenses"] == [{"name": {"wheels": "apache-2.0", "example-data": "CC0-1.0"}[name]}]


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
