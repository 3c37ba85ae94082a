"""The four notebooks as Kaggle runs them: pushed, in its tree, without parameters; and how they end there."""

import json
import os
import time

import hub_writing_stub
import pytest
from kaggle_machine import NOTEBOOK, PAGE, ROOT, Ended, Machine, can_mount, pushed
from kaggle_stub import KaggleStub

from saigakit.core import manifest
from saigakit.train import checkpoints, curve

T4, P100 = "Tesla T4, 7.5, 15360, 15101", "Tesla P100-PCIE-16GB, 6.0, 16280, 15900"
MIB = 1024**2


def slow_and_real(test):
    """At /kaggle itself, in mounts of its own; see kaggle_machine."""
    return pytest.mark.slow(pytest.mark.skipif(not can_mount(), reason="no mounts of one's own here")(test))


@pytest.fixture(scope="module")
def push(tmp_path_factory):
    """A function that returns a notebook as it arrives on Kaggle."""
    pytest.importorskip("kagglesdk")
    stub = KaggleStub()
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(ROOT)
        for name in [name for name in os.environ if "PROXY" in name.upper() or "KAGGLE" in name]:
            patched.delenv(name)
        for name, value in stub.environment(tmp_path_factory.mktemp("home")).items():
            patched.setenv(name, value)
        yield lambda stage, **parameters: pushed(stub, stage, **{"model": "saiga_tiny", **parameters})
    stub.shutdown()
    stub.server_close()


@pytest.fixture(scope="module")
def records(tiny, tmp_path_factory):
    """The data set of the records."""
    directory = tmp_path_factory.mktemp("records")
    (directory / "records.jsonl").write_bytes((tiny / "records.jsonl").read_bytes())
    return directory


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A new session with these outputs attached; each notebook has its own."""

    def machine(attached=(), **options):
        made = Machine(tmp_path_factory.mktemp("session"), **{"real": True, **options})
        for stage, ended in dict(attached).items():
            made.attach(ended.output, f"notebooks/alice/saigakit-{stage.replace('_', '-')}")
        return made

    return machine


def edited(text, old, new):
    """As a user changes a value in Kaggle's editor."""
    assert text.count(old) == 1
    return text.replace(old, new)


def is_red(ended, *said):
    """A failed kernel whose log ends with a sentence, and whose notebook and page show it too."""
    assert ended.status == 1, ended.printed
    for part in said:
        assert part in ended.last_lines, ended.printed
    assert "Traceback" not in ended.last_lines
    cells = json.loads((ended.output / NOTEBOOK).read_text(encoding="utf-8"))["cells"]
    assert [output["ename"] for cell in cells for output in cell.get("outputs", []) if "ename" in output]
    assert (ended.output / PAGE).stat().st_size


@pytest.mark.slow
def test_at_home_in_a_tree_like_kaggles_the_first_notebook_runs_and_the_second_misses_its_output(
    push, records, machine
):
    session = machine(real=False)
    session.attach(records, "datasets/alice/saigakit-example-data")
    ended = session.run(push("01_format", run_dir=session.working))
    assert ended.status == 0, ended.printed
    assert manifest.require_stage(ended.output / "01_format", "01_format", model="saiga_tiny")
    assert (ended.output / PAGE).stat().st_size
    alone = machine(real=False)
    ended = alone.run(push("02_train", run_dir=alone.working))
    is_red(ended, "'01_format/train.jsonl' is not there. Run 01_format first.", "attached inputs: none")


EPOCHS = 12  # about 40 steps, so that a kill does not come too late


@pytest.fixture(scope="module")
def formatted(push, records, machine):
    session = machine()
    session.attach(records, "datasets/alice/saigakit-example-data")
    return session.run(push("01_format"))


@pytest.fixture(scope="module")
def killed(push, formatted, machine):
    """A training that saves after each step, killed with everything in its session after the first checkpoint."""
    text = edited(push("02_train", epochs=EPOCHS), "max_hours=max_hours,", "max_hours=max_hours, save_steps=1,")
    session = machine({"01_format": formatted})
    with session.running(text) as (process, log):
        while not list((session.tree / "working").glob(f"02_train.checkpoints/step-*/{checkpoints.MARK}")):
            assert process.poll() is None, log.read_text(encoding="utf-8")
            time.sleep(0.02)
    return Ended(process.returncode, log.read_text(encoding="utf-8"), session.tree / "working")


@pytest.fixture(scope="module")
def out_of_time(push, formatted, killed, machine):
    """A training that has time for one more step."""
    session = machine({"01_format": formatted, "02_train": killed})
    return session.run(push("02_train", epochs=EPOCHS, max_hours=0.001))


@pytest.fixture(scope="module")
def trained(push, formatted, out_of_time, machine):
    return machine({"01_format": formatted, "02_train": out_of_time}).run(push("02_train", epochs=EPOCHS))


@pytest.fixture(scope="module")
def merged(push, formatted, trained, machine):
    """A GGUF made with both secrets attached, and what arrived on the Hub."""
    attached = {"01_format": formatted, "02_train": trained}
    with hub_writing_stub.serving("hf_TokenOfTheTests") as hub:
        secrets = {"HF_TOKEN": f"{hub.token}\n", "HF_REPO": "someone/terms"}
        session = machine(attached, secrets=secrets, settings={"HF_ENDPOINT": hub.endpoint})
        return session.run(push("03_merge_gguf", quality_tokens=20)), hub


def is_green(ended, stage):
    assert ended.status == 0, ended.printed
    assert (ended.output / PAGE).stat().st_size
    return manifest.require_stage(ended.output / stage, stage, model="saiga_tiny")


@slow_and_real
def test_the_first_notebook_leaves_its_stage_in_kaggle_working(formatted):
    is_green(formatted, "01_format")


@slow_and_real
def test_a_killed_session_leaves_a_checkpoint_that_the_next_one_resumes(killed, out_of_time):
    assert killed.status == -9 and not (killed.output / "02_train").exists()
    place = "/kaggle/input/notebooks/alice/saigakit-02-train/02_train.checkpoints"
    assert f"Resuming {place}, whose session was killed." in out_of_time.printed
    assert "Resuming from step" in out_of_time.printed


@slow_and_real
def test_a_training_without_time_ends_green_with_a_checkpoint_that_the_next_session_resumes(out_of_time, trained):
    assert is_green(out_of_time, "02_train")["training"]["ended"] == "max_hours"
    assert (out_of_time.output / "02_train" / "checkpoint" / checkpoints.MARK).is_file()
    assert "saigakit-02-train/02_train, which ended by max_hours." in trained.printed
    content = is_green(trained, "02_train")
    assert content["training"]["ended"] == "finished"
    assert {entry["step"] for entry in curve.read_log(trained.output / "02_train")} >= {1, 2, 3}


@slow_and_real
def test_without_secrets_the_last_line_says_how_to_publish(trained):
    assert "To publish it, set the secrets HF_TOKEN and HF_REPO (owner/name)" in trained.last_lines
    command = "saigakit fetch 02_train runs/02_train && saigakit publish runs/02_train OWNER/NAME_lora"
    assert command in trained.last_lines


@slow_and_real
def test_with_secrets_the_gguf_is_published(merged):
    ended, hub = merged
    is_green(ended, "03_merge_gguf")
    made = (ended.output / "03_merge_gguf" / "model.gguf").read_bytes()
    assert hub.repositories["someone/terms_gguf"]["model.gguf"] == made
    assert hub.private == {"someone/terms_gguf"}
    assert hub.token not in ended.printed + (ended.output / NOTEBOOK).read_text(encoding="utf-8")


@slow_and_real
def test_the_last_notebook_compares_what_the_others_made(push, formatted, trained, merged, machine):
    session = machine({"01_format": formatted, "02_train": trained, "03_merge_gguf": merged[0]})
    is_green(session.run(push("04_infer", max_examples=2)), "04_infer")


@slow_and_real
@pytest.mark.parametrize(
    ("gpus", "model", "said"),
    [
        ((), "saiga2_7b", ("saiga2_7b has 6.7 billion parameters, and this session has no GPU", "GPU T4 x2")),
        ((T4, T4), "saiga_tiny", ("nvidia-smi lists Tesla T4, Tesla T4, but torch cannot compute", "T4 x2")),
        ((P100,), "saiga_tiny", ("Tesla P100-PCIE-16GB (sm_60) is too old: torch has no kernels", "GPU T4 x2")),
    ],
    ids=["no GPU", "dead CUDA", "P100"],
)
def test_an_accelerator_that_cannot_train_ends_red(push, formatted, machine, gpus, model, said):
    session = machine({"01_format": formatted}, gpus=gpus)
    is_red(session.run(push("02_train", model=model)), *said)


@slow_and_real
@pytest.mark.parametrize("stage", ["02_train", "03_merge_gguf"])
def test_an_expired_token_ends_red_in_the_first_minute(push, machine, stage):
    with hub_writing_stub.serving("hf_AnotherTokenOfTheTests") as hub:
        secrets = {"HF_TOKEN": "hf_ExpiredTokenOfTheTests", "HF_REPO": "someone/terms"}
        session = machine(secrets=secrets, settings={"HF_ENDPOINT": hub.endpoint})
        ended = session.run(push(stage))
    is_red(ended, "The Hub rejects the token in HF_TOKEN: it is mistyped, expired or deleted.")
    assert secrets["HF_TOKEN"] not in ended.printed


@slow_and_real
def test_an_expired_token_for_a_download_ends_red(push, records, machine):
    with hub_writing_stub.serving("hf_AnotherTokenOfTheTests") as hub:
        session = machine(secrets={"HF_TOKEN": "hf_Expired"}, settings={"HF_ENDPOINT": hub.endpoint})
        session.attach(records, "datasets/alice/saigakit-example-data")
        ended = session.run(push("01_format", model="someone/model"))
    is_red(ended, "HF_TOKEN")


@slow_and_real
def test_without_internet_a_base_of_the_hub_ends_red(push, records, machine):
    session = machine()
    session.attach(records, "datasets/alice/saigakit-example-data")
    ended = session.run(push("01_format", model="someone/model"))
    is_red(ended, "someone/model could not be fetched from the Hub", "switch Internet on", "attach a copy")


@slow_and_real
@pytest.mark.parametrize(
    ("stage", "size", "said"),
    [
        ("02_train", 2 * MIB, "The adapter with its checkpoints needs "),
        ("03_merge_gguf", 20 * MIB, "needs "),  # the file alone would fit
    ],
)
def test_a_full_disk_ends_red_before_the_work(push, formatted, trained, machine, stage, size, said):
    attached = {"01_format": formatted} | ({"02_train": trained} if stage == "03_merge_gguf" else {})
    ended = machine(attached, working_bytes=size).run(push(stage))
    is_red(ended, said, f"of disk at /kaggle/working/{stage}", "are free")
