"""What is published names no file and no directory of this machine."""

import json
from pathlib import Path

import hub_writing_stub
import pytest
import small_models
from finished_stages import stage_02
from kaggle_stub import Listing

from saigakit import export
from saigakit.core import manifest
from saigakit.export import calibration
from saigakit.export.merge_plan import MergePlan
from saigakit.publish import gguf_file, upload
from saigakit.weights import base_files

PRIVATE = "жалобы_клиентов"
TOKEN, REPO = "hf_SecretOfTheTests", "someone/saiga-cats"
ADAPTER = "import sys\nfrom saigakit import publish\nprint(publish.push_adapter(*sys.argv[1:3]))"
GGUF = ADAPTER.replace("push_adapter", "push_to_hub")


@pytest.fixture(scope="module")
def private(tiny, tmp_path_factory):
    """A run whose records, adapter, tokenizer and importance matrix have private names."""
    run_dir = tmp_path_factory.mktemp("run") / PRIVATE
    stage = stage_02(run_dir, tiny)
    content = manifest.read(stage)
    content["inputs"]["train"] = {f"{PRIVATE}.jsonl": "5ec2e7"}
    content["inputs"] |= {"held_out": {f"{PRIVATE}-2.jsonl": "5ec2e8"}, "adapter": {f"{PRIVATE}.md": "ada"}}
    content["inputs"]["base"] = manifest.hashes(tiny / "base") | {f"{PRIVATE}.json": "ba5e"}
    content["parameters"] |= {"adapter": f"runs/{PRIVATE}", "quantization": "none"}
    small_models.edit_json(stage / manifest.NAME, **content)
    (stage / f"{PRIVATE}.txt").write_text("notes")
    matrix = stage.parent / f"{PRIVATE}.imatrix.gguf"
    records = tmp_path_factory.mktemp("records") / f"{PRIVATE}.jsonl"
    records.write_bytes((tiny / "records.jsonl").read_bytes())
    calibration.importance_of_records(records, MergePlan.of("saiga_tiny", "released"), matrix, max_tokens=500)
    export.merge_gguf(model="saiga_tiny", run_dir=run_dir, base_source=str(tiny / "base"), importance=matrix)
    return run_dir


def names_of(*places):
    """Each part of the private names, as bytes, as JSON and as a percent-encoded name."""
    texts = {PRIVATE, str(Path.home()), "/home/me", *map(str, places)} - {"/"}
    return [form for text in texts for form in (text.encode(), json.dumps(text)[1:-1].encode())]


def assert_private(uploaded, *places):
    found = [(name, one) for name, content in uploaded for one in names_of(*places) if one in content]
    assert uploaded and found == []


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    home = tmp_path_factory.mktemp("hf_home")
    with hub_writing_stub.serving(TOKEN) as hub, hub_writing_stub.pushing(hub.endpoint, home) as run:
        yield hub, run


@pytest.mark.parametrize(
    ("program", "stage"), [(ADAPTER, "02_train"), (GGUF, "03_merge_gguf")], ids=["adapter", "gguf"]
)
def test_the_hub_gets_no_private_name(hub, private, tiny, tmp_path, program, stage):
    served, run = hub
    served.clear()
    repo = REPO
    said = run(program, private / stage, repo, token=TOKEN, directory=tmp_path)
    assert f"{served.endpoint}/{repo}" in said
    files = served.repositories[repo]
    assert_private([*files.items(), ("names", "\n".join(files).encode())], private, tiny)
    content = json.loads(files["saigakit.json"])
    assert "5ec2e7" in content["inputs"]["train"].values() and b"5ec2e7" in files["README.md"]
    base = manifest.hashes(tiny / "base")
    weights = base_files.weight_files(base)
    assert weights
    assert content["inputs"]["base"].items() >= {name: base[name] for name in weights}.items()


def test_kaggle_gets_no_private_name(private, tiny, tmp_path, kaggle):
    kaggle.answers = Listing(kaggle)
    gguf_file.push_to_kaggle(private / "03_merge_gguf", "saiga-cats")
    calls = [(name, json.dumps(sent, ensure_ascii=False).encode()) for name, sent in kaggle.calls]
    assert_private([*calls, *(("upload", content) for content in kaggle.uploads)], private, tiny)


@pytest.mark.parametrize(
    ("adapter", "published"),
    [
        ("IlyaGusev/saiga2_7b_lora", "IlyaGusev/saiga2_7b_lora"),
        ("package:saiga_tiny", "package:saiga_tiny"),
        ("/home/me/older", "a local path"),
        ("older", "a local path"),
        ("here/older", "a local path"),
        ([["here/older", 0.5], ["someone/x", 0.5]], [["a local path", 0.5], ["someone/x", 0.5]]),
        (None, None),
    ],
)
def test_of_sources_only_the_names_of_the_hub_are_published(tmp_path, adapter, published):
    (tmp_path / "here" / "older").mkdir(parents=True)
    parameters = {"model": "saiga_tiny", "adapter": adapter, "quantization": "nf4", "epochs": 2.0}
    content = {"parameters": parameters, "inputs": {}, "outputs": {}}
    assert upload.public_manifest(content, (), tmp_path)["parameters"] == {**parameters, "adapter": published}
