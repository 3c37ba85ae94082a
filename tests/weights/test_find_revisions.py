"""Repositories are used at the commit that the registry or the user names, checked, and replaced by no directory."""

import re

import hub_questions
import hub_stub
import pytest
from hub_questions import directory_with

from saigakit import registry
from saigakit.registry import MODELS
from saigakit.weights import find

SAIGA = MODELS["saiga2_7b"]
BASE = {"config.json": b"{}", "model.safetensors": b"weights", "tokenizer.model": b"pieces"}
ADAPTER = {"adapter_config.json": b"{}", "adapter_model.bin": b"weights"}
PINNED = MODELS["qwen3_4b_2507"].base_model
REPOSITORIES = {
    SAIGA.released_adapter: ADAPTER,
    "someone/old": BASE,
    f"someone/old@{hub_stub.OTHER_BRANCH}": {"config.json": b"{}", "model.safetensors": b"older weights"},
    "someone/lora": ADAPTER,
    f"someone/lora@{hub_stub.OTHER_BRANCH}": ADAPTER | {"adapter_model.bin": b"older weights"},
    hub_stub.SWAPPED: BASE,
    f"{hub_stub.SWAPPED}-lora": ADAPTER,
    PINNED: BASE,
    f"{PINNED}@{hub_stub.OTHER_BRANCH}": {"config.json": b"{}", "model.safetensors": b"the pinned weights"},
    "someone/with-kernel": BASE | {"config.json": b'{"_attn_implementation": "someone/kernel"}'},
}
PIN = f"registry.PINS.update({{{PINNED!r}: ({hub_stub.OTHER_COMMIT!r}, RECORDED)}}) or "


@pytest.fixture(scope="module")
def asked():
    with hub_stub.serving(REPOSITORIES) as (endpoint, _), hub_questions.answering(endpoint) as ask:
        yield ask


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    monkeypatch.setenv("SAIGAKIT_INPUT_ROOT", str(tmp_path / "input"))
    return tmp_path / "input"


def hub_calls(monkeypatch):
    """What is asked of the Hub, which answers with a directory."""
    calls = []
    monkeypatch.setattr(find.hub, "snapshot", lambda repo, *rest: calls.append((repo, *rest[1:3])))
    return calls


@pytest.mark.parametrize("adapter", ["released", "IlyaGusev/saiga2_7b_lora"])
@pytest.mark.parametrize("place", ["datasets", "anything/from/someone", ".."])
def test_no_directory_of_its_name_replaces_the_released_adapter(inputs, monkeypatch, adapter, place):
    inputs.mkdir()
    monkeypatch.chdir(inputs.parent)
    directory_with(inputs / place / "IlyaGusev" / "saiga2_7b_lora", "adapter_config.json")
    calls = hub_calls(monkeypatch)
    find.adapter_dir(SAIGA, adapter, inputs.parent)
    assert calls == [("IlyaGusev/saiga2_7b_lora", "model", None)]


@pytest.mark.parametrize("model", ["saiga_llama3_8b", "tlite_2.1_8b"])
def test_no_directory_of_its_name_replaces_a_base_of_the_registry(tmp_path, monkeypatch, model):
    spec = registry.find(model)
    monkeypatch.chdir(tmp_path)
    directory_with(tmp_path / spec.base_model, "config.json")
    calls = hub_calls(monkeypatch)
    find.tokenizer_dir(spec)
    pin = registry.PINS.get(spec.base_model, (None, {}))
    assert calls == [(spec.base_model, "model", pin[0])]


def test_a_directory_that_the_user_names_is_used_and_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    made = directory_with(tmp_path / "someone" / "model", "config.json")
    assert find.base_dir(registry.find("someone/model")).samefile(made)
    assert (
        f"someone/model is {made}; for the repository on the Hub write someone/model@main." in capsys.readouterr().out
    )


def test_prints_nothing_for_a_path_that_cannot_be_a_repository(tmp_path, capsys):
    made = directory_with(tmp_path / "model", "config.json")
    find.base_dir(registry.find(str(made)))
    find.base_dir(SAIGA, str(made))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("revision", [hub_stub.OTHER_BRANCH, hub_stub.OTHER_COMMIT])
def test_takes_the_revision_that_the_user_names(asked, tmp_path, revision):
    for found in (f"find.base_dir(registry.find('someone/old@{revision}'))",
                  f"find.adapter_dir(registry.find('saiga2_7b'), 'someone/lora@{revision}')"):  # fmt: skip
        directory = asked(f"print('at') or {found}", tmp_path)
        assert any(line.endswith(f"/snapshots/{hub_stub.OTHER_COMMIT}") for line in directory), directory


def test_main_can_be_named_although_a_directory_has_that_name(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directory_with(tmp_path / "someone" / "lora", "adapter_config.json")
    found = asked("find.adapter_dir(registry.find('saiga2_7b'), 'someone/lora@main')", tmp_path)
    assert any(line.endswith(f"/snapshots/{hub_stub.COMMIT}") for line in found)


def test_prints_the_commit_of_a_repository_without_one(asked, tmp_path):
    printed, *_ = asked("find.base_dir(registry.find('someone/old'))", tmp_path)
    assert printed == f"someone/old: main is commit {hub_stub.COMMIT}."


def test_an_unknown_revision_is_explained(asked, tmp_path):
    kind, sentence = asked("find.base_dir(registry.find('someone/old@v7'))", tmp_path)
    assert (kind, "has no revision of that name" in sentence) == ("SaigaError", True)


def test_a_model_of_the_registry_is_taken_at_its_commit(asked, tmp_path):
    directory, *_ = asked(f"{PIN.replace('RECORDED', '{}')}find.base_dir(registry.find('qwen3_4b_2507'))", tmp_path)
    assert directory.endswith(f"/snapshots/{hub_stub.OTHER_COMMIT}")


def test_a_file_without_its_recorded_hash_is_refused(asked, tmp_path):
    recorded = PIN.replace("RECORDED", f"{{'model.safetensors': {'0' * 64!r}}}")
    kind, sentence = asked(f"{recorded}find.base_dir(registry.find('qwen3_4b_2507'))", tmp_path)
    assert kind == "SaigaError" and f"not {'0' * 64}. Delete " in sentence


@pytest.mark.parametrize(
    "hashed",
    [
        f"base_files.hashes(find.base_dir(registry.find({hub_stub.SWAPPED!r})))",
        f"base_files.manifest.hashes(find.adapter_dir(registry.find('saiga2_7b'), '{hub_stub.SWAPPED}-lora'))",
    ],
)
def test_a_download_without_the_hash_of_the_hub_is_refused_with_the_file_to_delete(asked, tmp_path, hashed):
    _, kind, sentence = asked(hashed.replace("base_files", "find.base_files"), tmp_path)
    assert kind == "SaigaError"
    assert "is damaged or another file: its SHA-256 is " in sentence
    assert re.search(r"Delete /.*/blobs/[0-9a-f]{64} and try again", sentence)


def test_a_config_is_refused_before_the_weights_are_downloaded(asked, tmp_path):
    _, kind, sentence = asked("find.base_dir(registry.find('someone/with-kernel'))", tmp_path)
    assert kind == "SaigaError" and "_attn_implementation='someone/kernel'" in sentence
    assert not list(tmp_path.rglob("model.safetensors"))


def test_every_pin_is_a_commit_of_a_repository_in_the_registry():
    named = {each for spec in MODELS.values() for each in (spec.base_model, spec.released_adapter)}
    assert registry.PINS.keys() <= named
    assert all(len(commit) == 40 and int(commit, 16) for commit, _ in registry.PINS.values())
