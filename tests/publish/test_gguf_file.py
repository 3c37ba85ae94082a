"""Publishing a GGUF: the real Hub client and the real kaggle command line against local stubs."""

import json
import shutil

import pytest
import small_models
from hub_writing_stub import TOKEN
from kaggle_stub import MODELS, Listing, listed, sizes_of

from saigakit import evaluate, export
from saigakit.cli import export_options
from saigakit.core import manifest
from saigakit.core.display import Table
from saigakit.core.files import sha256
from saigakit.errors import SaigaError
from saigakit.evaluate import results
from saigakit.kaggle import models
from saigakit.publish import gguf_file

REPO = "someone/saiga-cats-gguf"
MODEL, INSTANCE = "alice/saiga-cats", "alice/saiga-cats/gguf/q4-k-m"
SHOWN = {"Modelfile", "README.md", "llama-server.txt", "memory.png", "model.gguf", "saigakit.json", "sizes.png"}
PUSH = """
import sys
from saigakit.publish import gguf_file as publish_gguf
from saigakit.errors import SaigaError
try:
    print(publish_gguf.push_to_hub(*sys.argv[1:3]))
except SaigaError as error:
    print("SaigaError", error)
"""


@pytest.fixture(scope="module")
def stage(tiny, tmp_path_factory):
    """A finished 03_merge_gguf with the adapter of a finished 02_train."""
    run_dir = tmp_path_factory.mktemp("run")
    inputs = {"train": {"train.jsonl": "5ec2e7"}}
    parameters = {"model": "saiga_tiny", "base_source": "/home/me/base"}
    with manifest.making(run_dir / "02_train", stage="02_train", parameters=parameters, inputs=inputs) as made:
        small_models.adapter(made, tiny / "base")
    return export.merge_gguf(model="saiga_tiny", run_dir=run_dir)


@pytest.fixture
def push(hub, served, stage, tmp_path):
    def push(directory=stage):
        return served[1](PUSH, directory, REPO, token=TOKEN, directory=tmp_path).strip().splitlines()[-1]

    return push


def test_the_gguf_arrives_with_its_companions_and_without_paths_of_this_machine(push, hub, stage):
    assert push() == f"{hub.endpoint}/{REPO}"
    files = hub.repositories[REPO]
    assert set(files) == {".gitattributes", *SHOWN}
    assert files["model.gguf"] == (stage / "model.gguf").read_bytes()
    assert REPO in hub.private
    assert not any(str(stage.parent).encode() in content or b"/home/me" in content for content in files.values())
    card = files["README.md"].decode()
    assert "| training records, SHA-256 | `5ec2e7` |" in card
    assert f"# {REPO.split('/')[1]}" in card


def test_a_damaged_gguf_is_refused_before_and_after_the_upload(push, hub, stage, tmp_path):
    hub.faults["swap"] = True
    assert "memory.png has the SHA-256" in push()  # the first of the swapped files
    damaged = tmp_path / "03_merge_gguf"
    damaged.mkdir()
    for file in stage.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    (damaged / "model.gguf").write_bytes((stage / "model.gguf").read_bytes()[:-1])
    assert "model.gguf changed since it was made. Run 03_merge_gguf again" in push(damaged)


def test_the_files_of_saigakit_export_are_published_like_a_stage(push, hub, tiny, tmp_path):
    adapters = [small_models.adapter(tmp_path / name, tiny / "base", r=rank) for name, rank in (("a", 4), ("b", 8))]
    file = tmp_path / "made" / "cats.gguf"
    options = {"quant_types": ["Q4_0", "Q8_0"], "merge_into": None, "importance": None, "base_source": None}
    given = [f"{adapter}:0.5" for adapter in adapters]
    export_options.export(file_format="gguf", model="saiga_tiny", adapters=given, output=str(file), **options)
    assert push(file) == f"{hub.endpoint}/{REPO}"
    files = hub.repositories[REPO]
    made = {"cats.gguf", "cats-Q8_0.gguf", "Modelfile", "README.md", "llama-server.txt", "saigakit.json"}
    assert set(files) == {".gitattributes", *made}
    assert not any(str(tmp_path).encode() in content for content in files.values())
    content = json.loads(files["saigakit.json"])
    assert content["parameters"]["adapter"] == [["a local path", 0.5], ["a local path", 0.5]]
    for adapter in adapters:
        assert sha256(adapter / "adapter_model.safetensors") in files["README.md"].decode()
    file.with_name("cats-Q8_0.gguf").write_bytes(b"GGUF")
    assert "cats-Q8_0.gguf changed since it was made. Export it again" in push(file)
    manifest.path_for(file).unlink()
    assert "has no cats.saigakit.json next to it" in push(file)
    assert "dogs.gguf does not exist" in push(file.with_name("dogs.gguf"))


def test_the_file_of_a_stage_is_published_like_the_stage(push, hub, stage):
    assert push(stage / "model.gguf") == f"{hub.endpoint}/{REPO}"
    assert set(hub.repositories[REPO]) == {".gitattributes", *SHOWN}


def test_an_export_next_to_a_stages_files_is_published_by_itself(push, hub, stage, tiny, tmp_path):
    run_dir = shutil.copytree(stage.parent, tmp_path / "run")
    file = run_dir / "03_merge_gguf" / "small.gguf"
    options = {"quant_types": ["Q4_0"], "merge_into": None, "importance": None, "base_source": None}
    adapters = [str(run_dir / "02_train")]
    export_options.export(file_format="gguf", model="saiga_tiny", adapters=adapters, output=str(file), **options)
    assert push(file) == f"{hub.endpoint}/{REPO}"
    files = hub.repositories[REPO]
    assert files["small.gguf"] == file.read_bytes() and "model.gguf" not in files
    assert "| training records, SHA-256 | `5ec2e7` |" in files["README.md"].decode()


def test_the_same_model_may_be_pushed_again_and_another_may_not(push, hub):
    push()
    assert push() == f"{hub.endpoint}/{REPO}"
    hub.repositories[REPO]["saigakit.json"] = (
        b'{"stage": "02_train", "parameters": {"model": "x"}, "inputs": {"base": 1}}'
    )
    assert "holds 02_train of model='x'; nothing was overwritten" in push()


def test_the_card_has_the_table_of_04_infer_only_for_these_files(stage, capsys, monkeypatch):
    content = manifest.read(stage)
    monkeypatch.setattr(results, "read", lambda directory: None)
    table = Table(("model", "F1"), [("GGUF", "0.5")], "Замечание")
    monkeypatch.setattr(results, "show_table", lambda found: table)
    directory = stage.parent / evaluate.STAGE
    directory.mkdir(exist_ok=True)
    identity = {"stage": evaluate.STAGE, "parameters": {}, "outputs": {}}
    (directory / manifest.NAME).write_text(json.dumps({**identity, "inputs": {"gguf": content["outputs"]}}))
    assert gguf_file._measured(stage, content) == "| model | F1 |\n| --- | --- |\n| GGUF | 0.5 |\n\nЗамечание\n"
    (directory / manifest.NAME).write_text(json.dumps({**identity, "inputs": {"gguf": {"model.gguf": "another"}}}))
    assert gguf_file._measured(stage, content) == ""
    assert "compared another gguf" in capsys.readouterr().out


def test_a_new_model_on_kaggle_is_created_with_its_first_version(kaggle, stage):
    kaggle.answers = Listing(kaggle)
    assert gguf_file.push_to_kaggle(stage, "saiga-cats") == f"{INSTANCE}/1"
    (model,) = kaggle.sent(MODELS + "CreateModel")
    assert (model["ownerSlug"], model["slug"], model["isPrivate"]) == ("alice", "saiga-cats", True)
    assert "как" not in model["slug"] and "# saiga-cats" in model["description"]
    (instance,) = kaggle.sent(MODELS + "CreateModelInstance")
    assert instance["body"]["framework"] == "MODEL_FRAMEWORK_GGUF"
    assert instance["body"]["licenseName"] == "Apache 2.0"
    assert set(sizes_of(kaggle)) == SHOWN
    assert (stage / "model.gguf").read_bytes() in kaggle.uploads


def test_an_existing_model_on_kaggle_gets_a_new_version(kaggle, stage):
    kaggle.answer(MODELS + "GetModel", {"id": 5, "ref": MODEL, "isPrivate": True})
    kaggle.answer(MODELS + "GetModelInstance", {"id": 6, "slug": "q4-k-m", "versionNumber": 3})
    kaggle.answers = Listing(kaggle)
    assert gguf_file.push_to_kaggle(stage, "saiga-cats") == f"{INSTANCE}/4"
    assert not kaggle.sent(MODELS + "CreateModel") and not kaggle.sent(MODELS + "CreateModelInstance")
    (asked,) = kaggle.sent(MODELS + "ListModelInstanceVersionFiles")
    assert asked["versionNumber"] == 4


def test_a_file_that_did_not_arrive_on_kaggle_is_reported(kaggle):
    listed(kaggle, {"model.gguf": 17})
    with pytest.raises(SaigaError, match=r"model\.gguf has 17 bytes in alice/saiga-cats/gguf/q4-k-m/1 and 18 here"):
        models.require_arrived(f"{INSTANCE}/1", {"model.gguf": 18})
    with pytest.raises(SaigaError, match=r"Modelfile did not arrive"):
        models.require_arrived(f"{INSTANCE}/1", {"model.gguf": 17, "Modelfile": 3}, wait_s=0)


def test_an_existing_public_model_on_kaggle_is_refused_for_a_private_push(kaggle, stage):
    kaggle.answer(MODELS + "GetModel", {"id": 5, "ref": MODEL, "isPrivate": False, "title": "x"})
    with pytest.raises(SaigaError, match="is public, but private=True"):
        gguf_file.push_to_kaggle(stage, "saiga-cats")
    assert not kaggle.uploads


def test_an_error_that_kaggle_only_prints_is_raised(kaggle, stage):
    kaggle.answer(MODELS + "CreateModel", {"error": "The requested title is taken"})
    with pytest.raises(SaigaError, match=r"Kaggle refused alice/saiga-cats: .*title is taken"):
        gguf_file.push_to_kaggle(stage, "saiga-cats")


@pytest.mark.parametrize("name", ["Saiga", "saiga cats", "a", "alice/saiga-cats", "-saiga-"])
def test_a_name_that_kaggle_does_not_allow_is_refused(stage, name):
    with pytest.raises(SaigaError, match="is not the name of a Kaggle model"):
        gguf_file.push_to_kaggle(stage, name)


@pytest.mark.parametrize(("model", "is_printed"), [("saiga_tiny", False), ("saiga_yandexgpt_8b", True)])
def test_the_cap_of_yandexgpts_licence_is_printed(kaggle, stage, tmp_path, capsys, model, is_printed):
    copied = shutil.copytree(stage, tmp_path / "03_merge_gguf")
    small_models.edit_json(copied / manifest.NAME, parameters={**manifest.read(stage)["parameters"], "model": model})
    kaggle.answers = Listing(kaggle)
    gguf_file.push_to_kaggle(copied, "saiga-cats")
    assert ("10 million output tokens a month" in capsys.readouterr().out) == is_printed
