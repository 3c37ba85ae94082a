"""What `saigakit doctor` finds on good and on broken machines."""

import os
import re
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import kaggle_stub
import pytest
from click.testing import CliRunner
from kaggle_stub import KERNELS
from packaging.requirements import Requirement
from small_wheels import ROOT, pretend_installed

from saigakit import cli
from saigakit.core import install, workspace
from saigakit.core.workspace import GB
from saigakit.errors import SaigaError

TOKEN, KEY = "hf_" + "q1W2e3R4t5" * 3, "0123456789abcdef0123456789abcdef"
QUOTA = KERNELS + "GetAcceleratorQuotaStatistics"


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path):
    """Nobody is logged in, no GPU is there, and this is not Kaggle."""
    for name in [name for name in os.environ if re.search("PROXY|KAGGLE|HF_|CUDA", name)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    with kaggle_stub.serving(monkeypatch, tmp_path / "home") as stub:
        monkeypatch.setenv("KAGGLE_KEY", KEY)
        yield stub


@pytest.fixture
def logged_out(monkeypatch):
    """Save the second that the kaggle command takes."""

    def nobody():
        raise SaigaError("Nobody is logged in.")

    monkeypatch.setattr("saigakit.kaggle.command_line.username", nobody)


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    def prints(text, status=0):
        (tmp_path / "bin").mkdir()
        file = tmp_path / "bin" / "nvidia-smi"
        file.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {status}\n", encoding="utf-8")
        file.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)

    return prints


def diagnose(status=0):
    """The lines by name, with their marks."""
    done = CliRunner().invoke(cli.main, ["doctor"])
    assert done.exit_code == status and (status or done.exception is None), done.exception
    found = [re.fullmatch("([✓✗]) (.{18})  (.+)", line) for line in done.stdout.splitlines()]
    assert all(found), done.stdout
    return {line[2].strip(): f"{line[1]} {line[3]}" for line in found}


def test_every_stage_and_command_that_is_ready_shows_its_versions(logged_out):
    lines = diagnose()
    assert lines["Python"].startswith("✓ 3.")
    assert re.search(r"^✓ click [\d.]+, .*tokenizers [\d.]+", lines["01_format"])
    assert f"✓ torch {metadata.version('torch')}, transformers " in lines["02_train"]
    assert "llama-cpp-python " in lines["03_merge_gguf"] and "llama-cpp-python " in lines["04_infer"]
    assert lines["run, demo"].startswith("✓ papermill ") and lines["push, watch, fetch"].startswith("✓ kaggle ")


def test_memory_and_disk_are_shown_with_what_is_free(logged_out, monkeypatch, tmp_path):
    monkeypatch.setattr(workspace, "available_memory", lambda: 16 * GB)
    monkeypatch.setattr(workspace.shutil, "disk_usage", lambda path: SimpleNamespace(free=50 * GB))
    lines = diagnose()
    assert lines["memory"] == "✓ 16.0 GB free"
    assert lines["run directory"] == f"✓ 50.0 GB free at {os.getcwd()}"  # noqa: PTH109
    assert lines["scratch"] == f"✓ 50.0 GB free at {workspace.scratch_dir()}"


def test_little_memory_and_disk_are_reported_with_a_remedy(logged_out, monkeypatch):
    monkeypatch.setattr(workspace, "available_memory", lambda: 2 * GB)
    monkeypatch.setattr(workspace.shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * GB))
    lines = diagnose()
    assert re.match(r"✗ saiga2_7b needs about 6.7 GB of memory, and 2.0 GB are free\. Close", lines["memory"])
    assert re.match(r"✗ A run of saiga2_7b needs 6.74 GB of disk at .*, and 3.00 GB are free", lines["run directory"])
    assert "(run_dir, --output)" in lines["run directory"]
    assert re.match("✗ Downloading TheBloke/Llama-2-7B-fp16 needs 13.48 GB", lines["scratch"])
    assert "SAIGAKIT_CACHE" in lines["scratch"]


def test_a_scratch_directory_that_cannot_be_made_is_reported(logged_out, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SAIGAKIT_CACHE", str(tmp_path / "file" / "cache"))
    assert re.match("✗ .*file/cache could not be created: .*SAIGAKIT_CACHE", diagnose()["scratch"])


@pytest.mark.slow
def test_two_t4_on_which_torch_cannot_compute_are_reported(logged_out, nvidia_smi):
    nvidia_smi("Tesla T4, 7.5, 15360, 15101\nTesla T4, 7.5, 15360, 15101")
    lines = diagnose()
    assert lines["GPU"] == "✓ " + "; ".join(2 * ["Tesla T4, sm_75, 15.0 GiB, 14.7 GiB free"])
    assert re.match("✗ nvidia-smi lists Tesla T4, Tesla T4, but torch cannot compute there", lines["torch on GPU"])
    assert "T4 x2" in lines["torch on GPU"] and "torch said: " in lines["torch on GPU"]


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("Tesla P100-PCIE-16GB, 6.0, 16384, 16276", r"Tesla P100-PCIE-16GB \(sm_60\) is too old: .*T4 x2"),
        ("Tesla T4, 7.5, 15360, 1024", r"saiga2_7b needs .* on Tesla T4, and 1.1 GB of 16.1 GB are free\. nvidia-smi"),
        ("NVIDIA GB10, 12.1, [N/A], [N/A]", r"nvidia-smi does not state .*: \['NVIDIA GB10, .*CUDA_VISIBLE_DEVICES"),
        ("Unable to determine the device handle for GPU0: Unknown Error", "nvidia-smi does not state .* Unknown Error"),
    ],
    ids=["old", "occupied", "shared memory", "lost"],
)
def test_a_gpu_that_cannot_be_used_is_reported(logged_out, nvidia_smi, printed, expected):
    nvidia_smi(printed)
    lines = diagnose()
    assert re.match(f"✗ {expected}", lines["GPU"]), lines["GPU"]
    assert "torch on GPU" not in lines


@pytest.mark.parametrize("has_driver", [True, False])
def test_no_gpu_is_reported_with_where_to_train(logged_out, nvidia_smi, has_driver):
    if has_driver:
        nvidia_smi("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", 9)
    assert re.match("✗ none visible.* accelerator GPU T4 x2", diagnose()["GPU"])


def test_the_quota_is_shown_to_who_is_logged_in(kaggle):
    used = {"timeUsed": "45000s", "totalTimeAllowed": "108000s"}
    kaggle.answer(QUOTA, {"gpuQuota": used, "tpuQuota": {"timeUsed": "0s", "totalTimeAllowed": "72000s"}})
    lines = diagnose()
    assert lines["Kaggle login"] == "✓ alice"
    assert lines["Kaggle quota"] == "✓ GPU 12.50h used, 17.50h left, TPU 0.00h used, 20.00h left"


@pytest.mark.slow
def test_a_key_that_kaggle_rejects_is_reported(kaggle):
    kaggle.answer(QUOTA, {"code": 401, "message": "Unauthorized"}, code=401)
    assert re.match("✗ .*kaggle auth login", diagnose()["Kaggle quota"])


@pytest.mark.slow
def test_kaggle_without_a_connection_is_reported(kaggle, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert diagnose()["Kaggle quota"].startswith("✗ ")


def test_nobody_is_logged_in():
    lines = diagnose()
    assert re.match("✗ Nobody is logged in to Kaggle.*Run `kaggle auth login`", lines["Kaggle login"])
    assert "Kaggle quota" not in lines
    assert re.match("✗ HF_TOKEN is not set", lines["Hub token"])


@pytest.mark.slow
@pytest.mark.parametrize("token", [TOKEN, f"{TOKEN} and more"])
def test_no_value_of_a_credential_is_shown(kaggle, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    kaggle.answer(QUOTA, {"code": 500, "message": f"no {KEY}"}, code=500)
    done = subprocess.run([sys.executable, "-m", "saigakit.cli", "doctor"], capture_output=True, text=True, check=True)
    mark = "✗" if " " in token else "✓"
    assert re.search(f"^{mark} Hub token", done.stdout, re.MULTILINE)
    assert "✓ Kaggle login        alice" in done.stdout
    assert TOKEN not in done.stdout + done.stderr and KEY not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("hours", "expected"), [(3, "✓ 3.0 h of 12 are used; training stops at 10.5 h"), (11, "✗ 11.0 h of 12 are used")]
)
def test_a_session_of_kaggle_shows_its_hours(monkeypatch, hours, expected):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("SAIGAKIT_SESSION_START", str(workspace.uptime() - hours * 3600))
    lines = diagnose()
    assert lines["session"].startswith(expected)
    assert "Kaggle login" not in lines and "run, demo" not in lines


def test_missing_packages_are_named_with_the_command_that_installs_them(logged_out, monkeypatch):
    lacking = ("peft", "jupyter")
    monkeypatch.setattr("saigakit.core.install.missing", lambda names: [name for name in names if name in lacking])
    lines = diagnose()
    assert lines["run, demo"] == f"✗ lacks jupyter; {install.pip_install(['run'])}"
    assert lines["02_train"].startswith("✗ lacks peft; pip install")
    assert lines["01_format"].startswith("✓")


def test_on_kaggle_only_what_the_notebook_cannot_install_is_a_fault(monkeypatch):
    lacking = ("rensa", "bitsandbytes", "peft")
    monkeypatch.setattr("saigakit.core.install.missing", lambda names: [name for name in names if name in lacking])
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    lines = diagnose()
    assert lines["01_format"] == "✓ ready when the notebook has installed rensa"
    assert lines["03_merge_gguf"] == "✓ ready when the notebook has installed rensa, bitsandbytes"
    assert lines["02_train"].startswith("✗ lacks rensa, peft, bitsandbytes; choose the latest environment")


def test_versions_that_are_too_old_are_named(logged_out, monkeypatch, tmp_path):
    lines = ["jinja2>=3.1.6", 'psutil; extra == "run"', 'kaggle>=2.2.5; extra == "kaggle"']
    monkeypatch.setattr("saigakit.core.install.metadata.requires", {"saigakit": lines}.get)
    for name, version in (("jinja2", "3.1.5"), ("kaggle", "2.2.4")):
        pretend_installed(monkeypatch, tmp_path, name, version)
    found = diagnose(status=1)
    assert found["01_format"] == f"✗ lacks jinja2>=3.1.6 instead of 3.1.5; {install.pip_install(())}"
    remedy = install.pip_install(["kaggle"])
    assert found["push, watch, fetch"] == f"✗ lacks kaggle>=2.2.5 instead of 2.2.4; {remedy}"


def test_the_status_is_1_where_no_stage_can_run(logged_out, monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr("saigakit.core.install.metadata.requires", absent)
    assert {line for name, line in diagnose(status=1).items() if name[0] == "0"} == {
        f"✗ saigakit runs from its sources and is not installed. Run: {install.pip_install(())}"
    }


def required(name, found):
    """The distributions that one without extras needs, with all that these need."""
    found[name] = metadata.distribution(name)
    for each in map(Requirement, found[name].requires or ()):
        if each.name not in found and (each.marker is None or each.marker.evaluate({"extra": ""})):
            required(each.name, found)
    return found


def test_a_machine_with_few_packages_is_diagnosed(tmp_path, monkeypatch):
    for each in required("saigakit", {}).values():
        for top in {file.parts[0] for file in each.files} - {"..", "__pycache__"}:
            if not (link := tmp_path / top).exists():
                link.symlink_to(each.locate_file(top))
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    done = subprocess.run(
        [sys.executable, "-S", "-m", "saigakit.cli", "doctor"], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search("^✗ 02_train .* lacks torch, transformers, peft, .*; pip install", done.stdout, re.MULTILINE)
    assert re.search("^✗ push, watch, fetch  lacks kaggle, six; pip install", done.stdout, re.MULTILINE)
    assert re.search("^✗ Kaggle login .* This needs kaggle", done.stdout, re.MULTILINE)
    assert re.search("^✓ 01_format ", done.stdout, re.MULTILINE)
