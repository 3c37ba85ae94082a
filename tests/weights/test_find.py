"""Find base models, tokenizers and adapters: local, attached and on a stub of the Hub."""

import time

import hub_questions
import hub_stub
import pytest
from hub_questions import directory_with

from saigakit import registry
from saigakit.errors import SaigaError
from saigakit.registry import MODELS, ModelSpec
from saigakit.weights import find

SAIGA = MODELS["saiga2_7b"]
BASE = {
    "config.json": b"{}",
    "model.safetensors": b"weights, larger than the tokenizer",
    "consolidated.safetensors": b"the same weights under other names",
    "pytorch_model.bin": b"the same weights",
    "tokenizer.model": b"pieces",
    "README.md": b"#",
}
ADAPTER = {"adapter_config.json": b"{}", "adapter_model.bin": b"weights", "tokenizer.model": b"pieces", "a.png": b""}
OLD = {name: content for name, content in BASE.items() if not name.endswith(".safetensors")}
REPOSITORIES = {SAIGA.base_model: BASE, SAIGA.released_adapter: ADAPTER, "someone/old": OLD}


@pytest.fixture(scope="module")
def asked():
    with hub_stub.serving(REPOSITORIES) as (endpoint, _), hub_questions.answering(endpoint) as ask:
        yield lambda *question: [line for line in ask(*question) if " is commit " not in line]


@pytest.fixture(scope="module")
def asked_offline():
    with hub_questions.answering(hub_questions.NOWHERE) as ask:
        yield ask


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    monkeypatch.setenv("SAIGAKIT_INPUT_ROOT", str(tmp_path / "input"))
    return tmp_path / "input"


def test_downloads_only_one_kind_of_weights_of_a_base_model(asked, tmp_path):
    _, *names = asked("find.base_dir(registry.find('saiga2_7b'))", tmp_path)
    assert names == ["config.json", "model.safetensors", "tokenizer.model"]


def test_checks_the_disk_before_downloading_weights_but_not_once_they_are_cached(asked, tmp_path):
    small = "setattr(find.workspace, 'free_disk', lambda path: 0) or find.base_dir(registry.find('saiga2_7b'))"
    kind, sentence = asked(small, tmp_path)
    assert kind == "SaigaError" and "Downloading TheBloke/Llama-2-7B-fp16 needs 0.00 GB of disk" in sentence
    assert "SAIGAKIT_CACHE" in sentence and "run_dir" not in sentence
    asked("find.base_dir(registry.find('saiga2_7b'))", tmp_path)
    _, *names = asked(small, tmp_path)
    assert "model.safetensors" in names


def test_downloads_bin_files_of_a_base_model_without_safetensors(asked, tmp_path):
    _, *names = asked("find.base_dir(registry.find('someone/old'))", tmp_path)
    assert names == ["config.json", "pytorch_model.bin", "tokenizer.model"]


def test_uses_the_tokenizer_of_the_released_adapter(asked, tmp_path):
    directory, *names = asked("find.tokenizer_dir(registry.find('saiga2_7b'))", tmp_path)
    assert "saiga2_7b_lora" in directory
    assert names == ["adapter_config.json", "tokenizer.model"]


@pytest.mark.parametrize("adapter", ["released", "IlyaGusev/saiga2_7b_lora"])
def test_downloads_an_adapter_with_its_weights(asked, tmp_path, adapter):
    _, *names = asked(f"find.adapter_dir(registry.find('saiga2_7b'), {adapter!r})", tmp_path)
    assert names == ["adapter_config.json", "adapter_model.bin", "tokenizer.model"]


@pytest.mark.parametrize(
    ("repository", "said"),
    [
        ("gated", "is gated: accept its licence"),
        ("vanished", "is not on the Hub"),
        ("private", "HF_TOKEN has no access to it"),
        ("expired", "The Hub rejects the token in HF_TOKEN: it is mistyped, expired or deleted"),
        ("broken", "Bad request"),
        ("overloaded", "503 Service Unavailable"),
    ],
)
def test_a_hub_error_says_what_to_attach(asked, tmp_path, repository, said):
    kind, sentence = asked(f"find.base_dir(registry.find('someone/{repository}'))", tmp_path)
    assert kind == "SaigaError"
    assert sentence.startswith(f"someone/{repository} ")
    assert said in sentence
    assert "attach a copy" in sentence
    assert "base_source" in sentence


@pytest.mark.parametrize("what", ["base_dir(registry.find('a/b'))", "tokenizer_dir(registry.find('a/b'))"])
def test_fails_fast_without_a_connection(asked_offline, tmp_path, what):
    start = time.monotonic()
    kind, sentence = asked_offline(f"find.{what}", tmp_path)
    assert kind == "SaigaError"
    assert "a/b could not be fetched from the Hub: " in sentence
    assert "switch Internet on" in sentence
    assert time.monotonic() - start < 20  # the Hub's own retries take 24 s


def test_a_directory_is_both_base_model_and_tokenizer(tiny):
    spec = registry.find(str(tiny / "base"))
    assert find.base_dir(spec) == find.tokenizer_dir(spec) == tiny / "base"


def test_makes_a_packaged_model(tiny):
    spec = registry.find("saiga_tiny")
    assert find.base_dir(spec) == tiny / "base"
    assert find.adapter_dir(spec, "released") == tiny / "adapter"


def test_base_source_replaces_the_hub(tmp_path):
    attached = directory_with(tmp_path / "llama", "config.json")
    assert find.base_dir(SAIGA, str(attached)) == find.tokenizer_dir(SAIGA, str(attached)) == attached


@pytest.mark.parametrize("layout", ["", "datasets/someone"])
def test_finds_base_source_in_both_mount_layouts(inputs, layout):
    attached = directory_with(inputs / layout / "llama-2-7b", "config.json")
    assert find.base_dir(SAIGA, "llama-2-7b") == attached


def test_finds_a_model_mounted_under_its_version(inputs):
    attached = directory_with(inputs / "models" / "meta" / "llama-2" / "pytorch" / "7b-hf" / "1", "config.json")
    assert find.base_dir(SAIGA, "llama-2") == attached


def test_rejects_an_input_attached_twice_and_names_both_places(inputs):
    first = directory_with(inputs / "llama", "config.json")
    second = directory_with(inputs / "datasets" / "someone" / "llama", "config.json")
    with pytest.raises(SaigaError) as caught:
        find.base_dir(SAIGA, "llama")
    assert str(first) in str(caught.value)
    assert str(second) in str(caught.value)


def test_rejects_two_models_in_one_input_and_names_both(inputs):
    for version in ("1", "2"):
        directory_with(inputs / "llama" / version, "config.json")
    with pytest.raises(SaigaError, match=r"more than one config\.json.*llama/1.*llama/2"):
        find.base_dir(SAIGA, "llama")


def test_rejects_a_base_source_without_config(tmp_path):
    directory_with(tmp_path / "empty", "readme.txt")
    with pytest.raises(SaigaError, match=r"not a base model: it has no config\.json"):
        find.base_dir(SAIGA, str(tmp_path / "empty"))


def test_a_finished_stage_is_an_adapter(tmp_path):
    made = directory_with(tmp_path / "02_train", "adapter_config.json")
    assert find.adapter_dir(SAIGA, "02_train", tmp_path) == made


def test_a_finished_stage_of_an_attached_notebook_is_an_adapter(inputs, tmp_path):
    made = directory_with(inputs / "notebooks" / "someone" / "train" / "02_train", "adapter_config.json")
    assert find.adapter_dir(SAIGA, "02_train", tmp_path) == made
    assert find.adapter_dir(SAIGA, "train/02_train", tmp_path) == made  # not a Hub id, although it looks like one


def test_an_attached_copy_of_an_adapter_that_the_user_names_is_used_and_printed(inputs, capsys):
    made = directory_with(inputs / "datasets" / "someone" / "lora", "adapter_config.json")
    assert find.adapter_dir(SAIGA, "someone/lora") == made
    assert f"someone/lora is {made}; for the repository on the Hub write someone/lora@main." in capsys.readouterr().out


def test_rejects_a_directory_without_an_adapter(tmp_path):
    directory_with(tmp_path / "02_train", "config.json")
    with pytest.raises(SaigaError, match=r"not a LoRA adapter: it has no adapter_config\.json"):
        find.adapter_dir(SAIGA, "02_train", tmp_path)


def test_names_a_stage_that_has_not_run(tmp_path):
    with pytest.raises(SaigaError, match="Run 02_train first"):
        find.adapter_dir(SAIGA, "02_train", tmp_path)


def test_rejects_a_model_without_a_released_adapter():
    with pytest.raises(SaigaError, match="mine has no released adapter"):
        find.adapter_dir(ModelSpec(name="mine", base_model="someone/mine"), "released")


def test_expands_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    made = directory_with(tmp_path / "adapter", "adapter_config.json")
    assert find.adapter_dir(SAIGA, "~/adapter") == made


@pytest.mark.parametrize("adapter", [False, 7])
def test_rejects_an_adapter_that_is_not_a_text(adapter):
    with pytest.raises(SaigaError, match="give a path or a Hub id, or leave it out"):
        find.adapter_dir(SAIGA, adapter)
