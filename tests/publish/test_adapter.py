"""Publishing an adapter: the real Hub client against a local stub, in child processes."""

import hashlib
import json
import shutil

import hub_questions
import hub_writing_stub
import huggingface_hub
import pytest
import yaml
from finished_stages import stage_02
from hub_writing_stub import TOKEN
from small_models import SAIGA2, edit_json

from saigakit import evaluate, publish, registry
from saigakit.config import TrainConfig
from saigakit.core import manifest
from saigakit.core.files import sha256
from saigakit.core.hub import uploading
from saigakit.errors import SaigaError
from saigakit.evaluate import results
from saigakit.export import markdown
from saigakit.export.gguf_export import Export
from saigakit.export.merge_plan import MergePlan
from saigakit.prompt import encoding
from saigakit.publish import adapter as published

REPO = "someone/saiga-cats"
PUSH = """
import json, sys, time
time.sleep = lambda _: None  # the client waits between its retries
from saigakit import publish
from saigakit.errors import SaigaError
stage, repo, settings = sys.argv[1:]
try:
    print(publish.push_adapter(stage, repo, **json.loads(settings)))
except SaigaError as error:
    print("SaigaError", error)
"""


@pytest.fixture(scope="module")
def stage(tiny, tmp_path_factory):
    return stage_02(tmp_path_factory.mktemp("run"), tiny)


@pytest.fixture
def push(hub, served, stage, tmp_path):
    """Push in a child process; no file and no output contains the token."""

    def push(repo=REPO, *, directory=stage, token=TOKEN, run=served[1], **settings):
        said = run(PUSH, directory, repo, json.dumps(settings), token=token, directory=tmp_path)
        public = [content for files in hub.repositories.values() for content in files.values()]
        assert [content for content in public if token.strip().encode() in content] == []
        return said.strip().splitlines()[-1]

    return push


def test_the_adapter_arrives_with_its_card_and_without_the_records(push, hub, stage):
    assert push() == f"{hub.endpoint}/{REPO}"
    files = hub.repositories[REPO]
    shown = {"adapter_config.json", "adapter_model.safetensors", "saigakit.json", "log.jsonl", "curve.png", "README.md"}
    assert set(files) == {".gitattributes", *shown}
    for name in shown - {"README.md", "saigakit.json"}:
        assert files[name] == (stage / name).read_bytes()
    assert REPO in hub.private
    assert not any("секретный вопрос".encode() in content or b"/home/me" in content for content in files.values())


def test_the_template_of_the_training_arrives_too_and_is_in_the_card(push, hub, tiny, tmp_path):
    other = SAIGA2.replace("bot", "assistant")
    push(directory=stage_02(tmp_path, tiny, files={"chat_template.jinja": other}))
    files = hub.repositories[REPO]
    assert files["chat_template.jinja"].decode() == other
    assert (
        json.loads(files["saigakit.json"])["outputs"]["chat_template.jinja"]
        == hashlib.sha256(other.encode()).hexdigest()
    )
    assert "<s>assistant" in files["README.md"].decode()


@pytest.mark.parametrize("model", ["saiga_tiny", "saiga_yandexgpt_8b", "yandexgpt5_lite_8b_instruct"])
def test_the_cap_of_yandexgpts_licence_is_printed_before_the_push(monkeypatch, capsys, tiny, tmp_path, model):
    class Repository:
        def __init__(self, repo_id):
            self.repo_id = repo_id

        def push(self, files, content, message, *, private, replace):
            return capsys.readouterr().out

    tokenizer = encoding.load_tokenizer("saiga_tiny", str(tiny / "base"))
    monkeypatch.setattr(published.encoding, "load_tokenizer", lambda *_: tokenizer)
    monkeypatch.setattr(published.upload, "HubRepository", Repository)
    printed = publish.push_adapter(stage_02(tmp_path, tiny, model=model), REPO)
    assert ("10 million output tokens a month" in printed) == (model != "saiga_tiny")


@pytest.mark.parametrize(("base", "is_yandexgpt"), [("yandex/YandexGPT-5-Lite-8B-pretrain", True), ("a/b", False)])
def test_a_base_outside_the_registry_is_known_by_its_name(capsys, base, is_yandexgpt):
    published.upload.print_terms(base)
    assert bool(capsys.readouterr().out) == is_yandexgpt


def test_a_pushed_adapter_can_be_exported_by_03(push, hub, tiny, tmp_path):
    push()
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "saigakit.json"):  # what sources fetches
        (fetched / name).write_bytes(hub.repositories[REPO][name])
    made = Export.of(MergePlan.of("saiga_tiny", fetched, base_source=str(tiny / "base")), ["Q8_0"])
    assert made.plan.lineage.system_prompt == "Ты — кот."


def test_a_repository_is_public_only_on_request(push, hub):
    push(private=False)
    assert REPO in hub.repositories and REPO not in hub.private


def test_an_existing_public_repository_is_refused_for_a_private_push(push, hub):
    hub.repositories[REPO] = {}
    assert "exists and is public, but private=True" in push()
    assert hub.commits == 0


def test_a_later_training_of_the_same_model_replaces_the_earlier_one(push, hub, tiny, tmp_path):
    push()
    later = stage_02(tmp_path / "later", tiny)
    edit_json(later / "adapter_config.json", lora_alpha=99)
    outputs = {file.name: sha256(file) for file in later.iterdir() if file.name != manifest.NAME}
    edit_json(later / manifest.NAME, outputs=outputs)
    hub.repositories[REPO]["adapter_model.bin"] = b"of an older format"
    assert push(directory=later).endswith(REPO)
    assert json.loads(hub.repositories[REPO]["adapter_config.json"])["lora_alpha"] == 99
    assert "adapter_model.bin" not in hub.repositories[REPO]


def test_pushing_the_same_adapter_again_is_allowed(push, hub):
    assert push() == push()


OTHER = {"stage": "02_train", "parameters": {"model": "saiga2_7b"}, "inputs": {"base": {}}}
OTHER_BASE = {**OTHER, "parameters": {"model": "saiga_tiny"}}


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"model.safetensors": b"", "config.json": b"{}"}, "holds 2 files (model.safetensors, config.json)"),
        ({"saigakit.json": json.dumps(OTHER).encode()}, "holds 02_train of model='saiga2_7b';"),
        ({"saigakit.json": json.dumps(OTHER_BASE).encode()}, "of model='saiga_tiny', on other base weights;"),
        ({"saigakit.json": b"[1]"}, "holds 1 files (saigakit.json)"),
        ({"saigakit.json": b"{"}, "holds 1 files (saigakit.json)"),
    ],
)
def test_a_repository_with_something_else_is_replaced_only_on_request(push, hub, files, said):
    hub.repositories[REPO] = {".gitattributes": b"", "README.md": b"#", **files}
    hub.private.add(REPO)
    before = dict(hub.repositories[REPO])
    message = push()
    assert said in message and "nothing was overwritten" in message and "replace=True" in message
    assert hub.repositories[REPO] == before and hub.commits == 0
    assert push(replace=True).endswith(REPO)
    assert "config.json" not in hub.repositories[REPO] and "adapter_config.json" in hub.repositories[REPO]


def test_an_empty_repository_is_filled(push, hub):
    hub.repositories[REPO] = {".gitattributes": b"", "README.md": b"#"}
    hub.private.add(REPO)
    assert push().endswith(REPO)


@pytest.mark.parametrize(
    ("token", "said"),
    [
        (None, "HF_TOKEN is not set"),
        ("  ", "HF_TOKEN is not set"),
        ("hf_Secret\nOfTheTests", "HF_TOKEN contains characters that no token has"),
        ("hf_Секрет", "HF_TOKEN contains characters that no token has"),
    ],
)
def test_a_missing_or_bad_token_is_reported_before_any_request(stage, monkeypatch, token, said):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nowhere")  # the developer may be logged in
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(SaigaError, match=said) as caught:
        publish.push_adapter(stage, REPO)
    assert "OfTheTests" not in str(caught.value) and "Секрет" not in str(caught.value)


def test_a_wrong_token_is_reported(push, hub):
    assert "rejects the token in HF_TOKEN" in push(token="hf_WrongToken")
    assert hub.repositories == {}


def test_a_line_end_after_the_token_is_ignored(push):
    assert push(token=f"{TOKEN}\n").endswith(REPO)


@pytest.mark.parametrize("fault", ["create", "commit"])
def test_a_token_without_write_access_is_reported(push, hub, fault):
    hub.faults[fault] = 403
    assert f"may not write to {REPO}" in push()


@pytest.mark.parametrize("repo", ["cats", "a/b/c", "someone/кошки", "someone/a--b", "", "/abs/path", "someone/x.git/"])
def test_a_bad_name_is_reported_before_any_request(stage, monkeypatch, repo):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(SaigaError, match="is not the name of a repository") as caught:
        publish.push_adapter(stage, repo)
    assert repr(repo) in str(caught.value)


def test_a_missing_connection_is_reported(push, tmp_path):
    with hub_writing_stub.pushing(hub_questions.NOWHERE, tmp_path) as run:
        message = push(run=run)
    assert "was interrupted: " in message and "switch Internet on" in message


def test_a_failed_upload_changes_nothing(push, hub):
    hub.faults["put"] = 403
    message = push()
    assert "SaigaError" in message and REPO in message
    assert set(hub.repositories[REPO]) == {".gitattributes"}


def test_an_interrupted_upload_changes_nothing_and_can_be_repeated(push, hub, stage):
    hub.faults["drop"] = True
    message = push()
    assert f"The upload to {REPO} was interrupted: " in message and "Try again" in message
    assert set(hub.repositories[REPO]) == {".gitattributes"}
    del hub.faults["drop"]
    assert push() == f"{hub.endpoint}/{REPO}"
    assert hub.repositories[REPO]["adapter_model.safetensors"] == (stage / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        ({"cut": True}, f" bytes in {REPO} and "),
        ({"swap": True}, "adapter_model.safetensors has the SHA-256"),
        ({"lose": "saigakit.json"}, "saigakit.json did not arrive"),
        ({"alter": "adapter_config.json"}, "adapter_config.json has different content"),
    ],
)
def test_a_file_damaged_in_transfer_is_named(push, hub, faults, said):
    hub.faults.update(faults)
    assert said in push()


def test_a_changed_stage_is_not_pushed(push, hub, stage, tmp_path):
    shutil.copytree(stage, tmp_path / "02_train")
    (tmp_path / "02_train" / "log.jsonl").write_text("", encoding="utf-8")
    assert "log.jsonl changed since it was made" in push(directory=tmp_path / "02_train")
    assert "is not there: run 02_train first" in push(directory=tmp_path / "nothing")
    assert hub.calls == []


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return encoding.load_tokenizer("saiga_tiny")


def test_the_card_has_metadata_that_the_hub_accepts(stage, tokenizer):
    metadata = yaml.safe_load(published.build_card(stage, REPO, tokenizer).split("---\n")[1])
    assert metadata["language"] == ["ru"] and metadata["license"] == "apache-2.0"
    assert "base_model" not in metadata  # "package:saiga_tiny" is not on the Hub
    of_saiga = yaml.safe_load(markdown.metadata(registry.find("saiga2_7b"), "peft", []))
    assert (of_saiga["base_model"], of_saiga["license"]) == ("TheBloke/Llama-2-7B-fp16", "llama2")
    of_yandex = yaml.safe_load(markdown.metadata(registry.find("saiga_yandexgpt_8b"), "peft", []))
    assert (of_yandex["license"], of_yandex["license_name"]) == ("other", "yandexgpt-5-lite-8b")


def test_the_card_describes_the_training_and_the_measurements(stage, tokenizer):
    text = published.build_card(stage, REPO, tokenizer)
    for part in ("# saiga-cats\n", "Это адаптер LoRA", "evaluation loss | 2.500 → 0.875 |", "best step | 4, 0.750 |",
                 "tokens | 800 |", "chosen by its loss", "`hash of the records`", "| epochs | 2 |",
                 "r 4, alpha 8", hashlib.sha256(tokenizer.chat_template.encode()).hexdigest(),
                 tokenizer.chat_template, "`Ты — кот.`", "| peft | "):  # fmt: skip
        assert part in text
    assert "$" not in text and str(stage.parent) not in text


def test_the_card_reports_an_unfinished_and_folded_training(stage, tokenizer, tmp_path):
    changed = shutil.copytree(stage, tmp_path / "02_train")
    config = json.loads((changed / "train_config.json").read_text(encoding="utf-8")) | {"adapter": "folded"}
    (changed / "train_config.json").write_text(json.dumps(config), encoding="utf-8")
    content = manifest.read(changed) | {"training": {"ended": "max_hours", "step": 8, "steps": 50, "best_step": None}}
    (changed / manifest.NAME).write_text(json.dumps(content), encoding="utf-8")
    text = published.build_card(changed, REPO, tokenizer)
    assert "early: max_hours reached" in text
    assert "the released adapter's rank included" in text
    assert "it includes another adapter" in text and "it continues" not in text


def test_the_card_names_the_adapter_that_was_continued(tmp_path):
    files = {"model": "saiga2_7b", "train_file": "", "output_dir": ""}
    assert published._started_from(TrainConfig(**files), tmp_path) == "IlyaGusev/saiga2_7b_lora"
    assert published._started_from(TrainConfig(**files, adapter=None), tmp_path) is None
    assert published._started_from(TrainConfig(**files, adapter="/home/me/mine"), tmp_path) == "another adapter"


def compared(run_dir, adapter_hashes):
    numbers = {"n": 3, "exact": 0.5, "json_valid": 1.0, "f1": 0.75, "tokens_per_s": 10.0, "bytes": 5 * 10**6}
    rows = [{"name": name, **numbers} for name in ("before", "after")]
    identity = {"stage": "04_infer", "parameters": {}, "inputs": {"adapter": adapter_hashes}}
    with manifest.making(run_dir / evaluate.STAGE, **identity) as made:
        (made / results.FILE).write_text(json.dumps(rows), encoding="utf-8")


def test_the_card_has_the_results_of_04_only_for_this_adapter(stage, tokenizer, tmp_path, capsys):
    mine = shutil.copytree(stage, tmp_path / "02_train")
    compared(tmp_path, manifest.hashes(mine))
    text = published.build_card(mine, REPO, tokenizer)
    assert "| after (with the adapter, transformers) | 100.0 % | 50.0 % | 75.0 % |" in text
    shutil.rmtree(tmp_path / evaluate.STAGE)
    compared(tmp_path, {"adapter_model.safetensors": "another"})
    assert "| after" not in published.build_card(mine, REPO, tokenizer)
    assert "compared another adapter" in capsys.readouterr().out


def test_the_reason_for_a_failure_never_contains_the_token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    error = RuntimeError("Error while uploading")
    error.__cause__ = ValueError(f"Illegal header value b'Bearer {TOKEN}'")
    with pytest.raises(SaigaError) as caught, uploading(REPO):
        raise error
    assert TOKEN not in str(caught.value) and "Illegal header value" in str(caught.value)
