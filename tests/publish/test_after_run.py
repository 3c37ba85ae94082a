"""Publishing at the end of a notebook, asked for by secrets, and the check of these in its first minute."""

import hub_questions
import hub_writing_stub
import pytest
import small_models
from finished_stages import stage_02
from hub_writing_stub import TOKEN

from saigakit import export
from saigakit.core import manifest

ASKED = "someone/saiga_cats"
_SECRETS = """
import os, sys, time
time.sleep = lambda _: None  # the client waits between its retries
repo, has_token, stage = sys.argv[1:]
os.environ |= {"HF_REPO": repo} if repo else {}
if not has_token:
    del os.environ["HF_TOKEN"]
from saigakit.errors import SaigaError
try:
"""
IF_ASKED = f"""{_SECRETS}
    from saigakit import publish
    publish.if_asked(stage)
except SaigaError:
    print("it raised")
"""
PREPARE = f"""{_SECRETS}
    import saigakit
    saigakit.prepare(stage)
except SaigaError as error:
    print("SaigaError", error)
"""


@pytest.fixture(scope="module")
def run_dir(tiny, tmp_path_factory):
    """A finished 02_train and a finished 03_merge_gguf."""
    directory = tmp_path_factory.mktemp("run")
    stage_02(directory, tiny)
    parameters = {"model": "saiga_tiny"}
    with manifest.making(directory / "adapter", stage="02_train", parameters=parameters, inputs={}) as made:
        small_models.adapter(made, tiny / "base")
    export.merge_gguf(model="saiga_tiny", run_dir=directory, adapter=str(directory / "adapter"))
    return directory


@pytest.fixture
def run(hub, served, tmp_path):
    """Run a program with these secrets in a child process; returns what it printed."""

    def run(program, stage, *, repo=ASKED, token=TOKEN, child=served[1]):
        return child(program, repo or "", "yes" if token else "", stage, token=token or TOKEN, directory=tmp_path)

    return run


@pytest.mark.parametrize(("stage", "ending"), [("02_train", "_lora"), ("03_merge_gguf", "_gguf")])
def test_with_both_secrets_each_stage_goes_to_a_private_repository_of_its_own(run, hub, run_dir, stage, ending):
    assert f"arrived: {hub.endpoint}/{ASKED}{ending}" in run(IF_ASKED, run_dir / stage)
    largest = {"02_train": "adapter_model.safetensors", "03_merge_gguf": "model.gguf"}[stage]
    assert hub.repositories[ASKED + ending][largest] == (run_dir / stage / largest).read_bytes()
    assert hub.private == {ASKED + ending}


@pytest.mark.parametrize(
    ("stage", "ending", "absent"),
    [
        ("02_train", "_lora", ("gguf", "llama_cpp")),
        ("03_merge_gguf", "_gguf", ("transformers", "peft", "accelerate")),
    ],
)
def test_publishing_needs_only_the_packages_of_its_stage(run, hub, run_dir, stage, ending, absent):
    lacking = f"import sys\nsys.modules |= dict.fromkeys({absent})\n"
    assert f"arrived: {hub.endpoint}/{ASKED}{ending}" in run(lacking + IF_ASKED, run_dir / stage)


@pytest.mark.parametrize(
    ("token", "lacking"), [(None, "the secrets HF_TOKEN and HF_REPO (owner/name)"), (TOKEN, "the secret HF_REPO (")]
)
def test_without_a_name_one_sentence_says_how_to_publish(run, hub, run_dir, token, lacking):
    [said] = run(IF_ASKED, run_dir / "02_train", repo=None, token=token).splitlines()
    assert said.startswith(f"To publish it, set {lacking}")
    assert said.endswith(f"or later: saigakit publish {run_dir} OWNER/NAME_lora")
    assert hub.calls == []


def test_on_kaggle_the_command_for_later_fetches_the_stage_first(run, hub, run_dir):
    hub.faults["create"] = 403
    program = IF_ASKED.replace("try:", 'os.environ["KAGGLE_KERNEL_RUN_TYPE"] = "Batch"\ntry:')
    said = run(program, run_dir / "03_merge_gguf")
    later = "saigakit fetch 03_merge_gguf runs/03_merge_gguf && saigakit publish runs/03_merge_gguf"
    assert said.splitlines()[-1].endswith(f" To publish it later: {later} {ASKED}_gguf --gguf")


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        ({"create": 403}, f"may not write to {ASKED}_lora"),
        ({"commit": 503}, "overloaded, try again later"),
        ({"drop": True}, "was interrupted: "),
    ],
)
def test_a_failure_at_the_end_is_printed_and_not_raised(run, hub, run_dir, faults, said):
    hub.faults.update(faults)
    last = run(IF_ASKED, run_dir / "02_train").splitlines()[-1]
    assert last.startswith("Not published: ") and said in last
    assert last.endswith(f" To publish it later: saigakit publish {run_dir} {ASKED}_lora")


def test_a_missing_token_at_the_end_is_named(run, hub, run_dir):
    last = run(IF_ASKED, run_dir / "02_train", token=None).splitlines()[-1]
    assert last.startswith("Not published: HF_TOKEN is not set. On Kaggle attach it to this notebook as a secret")


@pytest.mark.parametrize("stage", ["02_train", "03_merge_gguf"])
@pytest.mark.parametrize(("repo", "asked"), [(ASKED, 1), ("cats-org/saiga", 1), ("Someone/saiga", 1), (None, 0)])
def test_secrets_that_fit_are_accepted_in_the_first_minute(run, hub, stage, repo, asked):
    assert "SaigaError" not in run(PREPARE, stage, repo=repo)
    assert hub.calls.count("GET /api/whoami-v2") == asked


@pytest.mark.parametrize(
    ("secrets", "faults", "said"),
    [
        ({"repo": "saiga_cats"}, {}, "HF_REPO='saiga_cats': give owner/name, where HF_TOKEN allows"),
        ({"repo": "a/b/c"}, {}, "HF_REPO='a/b/c': give owner/name"),
        ({"token": None}, {}, "HF_TOKEN is not set. On Kaggle attach it"),
        ({"token": "hf_ExpiredAndLongGone00"}, {}, "The Hub rejects the token in HF_TOKEN"),
        (
            {"repo": "other/cats"},
            {},
            "HF_REPO='other/cats': give owner/name, where HF_TOKEN allows the owner someone or cats-org.",
        ),
        ({}, {"role": "read"}, f"The token in HF_TOKEN may not write to {ASKED}. Give it write access"),
        ({}, {"rights": {"fineGrained": {"scoped": [{"permissions": ["repo.content.read"]}]}}}, "may not write to"),
    ],
)
def test_secrets_that_will_fail_are_refused_in_the_first_minute(run, hub, secrets, faults, said):
    hub.faults.update(faults)
    [last] = [line for line in run(PREPARE, "02_train", **secrets).splitlines() if line.startswith("SaigaError")]
    assert said in last


def test_a_fine_grained_token_that_may_write_is_accepted(run, hub):
    hub.faults["rights"] = {"role": "fineGrained", "fineGrained": {"scoped": [{"permissions": ["repo.write"]}]}}
    assert "SaigaError" not in run(PREPARE, "02_train")


def test_without_a_connection_it_says_so_in_the_first_minute(run, tmp_path):
    with hub_writing_stub.pushing(hub_questions.NOWHERE, tmp_path) as offline:
        said = run(PREPARE, "02_train", child=offline)
    assert f"SaigaError Asking the Hub about {ASKED} was interrupted: " in said
    assert "switch Internet on" in said


@pytest.mark.parametrize("stage", ["01_format", "04_infer"])
def test_stages_that_publish_nothing_do_not_ask_the_hub(run, hub, stage):
    assert "SaigaError" not in run(PREPARE, stage, repo="not a name")
    assert hub.calls == []
