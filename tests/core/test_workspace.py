"""Inputs in both Kaggle layouts, directories, disk, memory, GPUs and secrets."""

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from saigakit.core import workspace
from saigakit.errors import SaigaError


def file(path: Path, text: str = "{}") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def mounted(tmp_path, monkeypatch) -> Path:
    """An empty directory in the place of /kaggle/input."""
    root = tmp_path / "kaggle-input"
    root.mkdir()
    monkeypatch.setenv("SAIGAKIT_INPUT_ROOT", str(root))
    return root


@pytest.fixture
def at_home(monkeypatch):
    if Path("/kaggle/working").is_dir():
        pytest.skip("this is Kaggle")
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)


def test_kaggle_is_recognised_by_its_run_type_alone(at_home, monkeypatch):
    monkeypatch.setenv("KAGGLE_USERNAME", "me")
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", "/home/me")
    assert not workspace.on_kaggle()
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert workspace.on_kaggle()


def test_finds_an_existing_path(tmp_path):
    assert workspace.find_input(str(file(tmp_path / "records.jsonl"))) == tmp_path / "records.jsonl"


def test_finds_the_output_of_a_stage_in_the_run_dir(tmp_path):
    made = file(tmp_path / "run" / "01_format" / "train.jsonl")
    assert workspace.find_input("01_format/train.jsonl", run_dir=tmp_path / "run") == made


def test_the_run_dir_takes_precedence_over_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file(tmp_path / "02_train" / "adapter_config.json")
    made = file(tmp_path / "run" / "02_train" / "adapter_config.json").parent
    assert workspace.find_input("02_train", run_dir="run").resolve() == made
    assert workspace.find_input("02_train").resolve() == tmp_path / "02_train"


@pytest.mark.parametrize("place", ["notebooks/me/saigakit-01-format", "saigakit-01-format"])
def test_finds_the_output_of_a_stage_in_both_kaggle_layouts(mounted, tmp_path, place):
    made = file(mounted / place / "01_format" / "train.jsonl")
    assert workspace.find_input("01_format/train.jsonl", run_dir=tmp_path / "run") == made


def test_the_run_dir_takes_precedence_over_attached_inputs(mounted, tmp_path):
    file(mounted / "old" / "01_format" / "train.jsonl")
    made = file(tmp_path / "run" / "01_format" / "train.jsonl")
    assert workspace.find_input("01_format/train.jsonl", run_dir=tmp_path / "run") == made


def test_finds_an_attached_directory_by_the_end_of_its_path(mounted):
    made = file(mounted / "models" / "me" / "llama" / "transformers" / "7b" / "1" / "config.json").parent
    assert workspace.find_input("llama/transformers/7b/1") == made


def test_only_complete_path_components_match(mounted):
    file(mounted / "data" / "my_records.jsonl")
    with pytest.raises(SaigaError, match="is not there"):
        workspace.find_input("records.jsonl")


def test_a_missing_stage_output_names_the_stage_to_run(tmp_path):
    with pytest.raises(SaigaError, match=r"is not there\. Run 01_format first\."):
        workspace.find_input("01_format/train.jsonl", run_dir=tmp_path)


def test_a_name_with_brackets_is_not_a_pattern(mounted):
    made = file(mounted / "data" / "records [1].jsonl")
    file(mounted / "data" / "records 1.jsonl")
    assert workspace.find_input("records [1].jsonl") == made
    with pytest.raises(SaigaError, match="is not there"):
        workspace.find_input("records*.jsonl")


def test_an_input_attached_twice_is_refused_with_both_paths(mounted):
    places = [file(mounted / name / "records.jsonl") for name in ("a", "b")]
    with pytest.raises(SaigaError, match=r"more than once: .*/a/records.jsonl, .*/b/records.jsonl\. Give the full"):
        workspace.find_input("records.jsonl")
    assert workspace.find_input("b/records.jsonl") == places[1]


def test_a_missing_input_is_reported_with_the_searched_places_and_the_attached_inputs(mounted, tmp_path):
    file(mounted / "datasets" / "me" / "data" / "other.jsonl")
    with pytest.raises(SaigaError) as caught:
        workspace.find_input("records.jsonl", run_dir=tmp_path / "run")
    assert str(tmp_path / "run" / "records.jsonl") in str(caught.value)
    assert str(mounted / "datasets" / "me") in str(caught.value)


def test_a_missing_input_is_reported_when_nothing_is_attached(mounted):
    with pytest.raises(SaigaError, match="attached inputs: none"):
        workspace.find_input("records.jsonl")


def test_the_scratch_directory_of_saigakit_cache_is_created(tmp_path, monkeypatch):
    monkeypatch.setenv("SAIGAKIT_CACHE", str(tmp_path / "a" / "b"))
    assert workspace.scratch_dir() == tmp_path / "a" / "b"
    assert (tmp_path / "a" / "b").is_dir()


def test_the_scratch_directory_at_home_is_in_the_users_cache(at_home, tmp_path, monkeypatch):
    monkeypatch.delenv("SAIGAKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert workspace.scratch_dir() == tmp_path / "saigakit"


def test_on_kaggle_the_scratch_directory_is_outside_the_kept_output(tmp_path, monkeypatch):
    monkeypatch.delenv("SAIGAKIT_CACHE")
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert workspace.scratch_dir() == tmp_path / "saigakit"


def secrets(answers: list[object]) -> types.ModuleType:
    """A stand-in for Kaggle's module that returns the next of `answers`, or raises it if it is an exception."""
    module = types.ModuleType("kaggle_secrets")

    class UserSecretsClient:
        def get_secret(self, name: str) -> object:
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

    module.UserSecretsClient = UserSecretsClient  # type: ignore[attr-defined]
    return module


@pytest.fixture
def kaggle_secrets(monkeypatch):
    """A function that sets the answers of Kaggle's secrets; waiting between attempts takes no time."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setattr("time.sleep", lambda _: None)
    return lambda *answers: monkeypatch.setitem(sys.modules, "kaggle_secrets", secrets(list(answers)))


def test_a_secret_in_the_environment_takes_precedence(kaggle_secrets, monkeypatch):
    kaggle_secrets("from Kaggle")
    monkeypatch.setenv("HF_TOKEN", "from here")
    assert workspace.secret("HF_TOKEN") == "from here"


def test_a_secret_is_requested_again_after_a_connection_error(kaggle_secrets):
    kaggle_secrets(ConnectionError(), ConnectionError(), "token")
    assert workspace.secret("HF_TOKEN") == "token"


@pytest.mark.parametrize("answers", [[RuntimeError("no such secret")], [ConnectionError()] * 4])
def test_an_unavailable_secret_is_reported_and_is_none(kaggle_secrets, capsys, answers):
    kaggle_secrets(*answers)
    assert workspace.secret("HF_TOKEN") is None
    assert capsys.readouterr().out.startswith("Secret HF_TOKEN")


def test_at_home_a_missing_secret_is_none(at_home, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert workspace.secret("HF_TOKEN") is None


def test_too_little_disk_is_reported_with_both_numbers(tmp_path):
    workspace.require_disk(tmp_path / "not" / "yet", 1, "The merge")
    with pytest.raises(SaigaError, match=r"The merge needs 1000000\.00 GB of disk at .*, and \d+\.\d\d GB are free"):
        workspace.require_disk(tmp_path / "not" / "yet", 10**15, "The merge")


def test_on_kaggle_the_notebook_itself_keeps_room_to_be_saved(at_home, tmp_path, monkeypatch):
    monkeypatch.setattr(workspace, "free_disk", lambda _: 100 * 10**6)
    workspace.require_disk(tmp_path, 90 * 10**6, "The merge")
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    with pytest.raises(SaigaError, match=r"The merge needs 0\.14 GB of disk at .*, and 0\.10 GB are free"):
        workspace.require_disk(tmp_path, 90 * 10**6, "The merge")


def test_a_directory_named_in_place_of_kaggle_working_shows_that_this_is_kaggle(at_home, tmp_path, monkeypatch):
    monkeypatch.setenv("SAIGAKIT_WORKING", str(tmp_path / "working"))
    assert not workspace.on_kaggle()
    (tmp_path / "working").mkdir()
    assert workspace.on_kaggle()


def test_too_little_memory_is_reported_with_both_numbers():
    workspace.require_memory(1, "The merge", "Close something.")
    with pytest.raises(SaigaError, match=r"about 1000000\.0 GB of memory, and \d+\.\d GB are free\. Close something"):
        workspace.require_memory(10**15, "The merge", "Close something.")


def test_the_file_cache_of_a_container_does_not_count_as_used(tmp_path):
    file(tmp_path / "memory.max", "1000\n")
    file(tmp_path / "memory.current", "900\n")
    file(tmp_path / "memory.stat", "anon 300\nfile 600\ninactive_file 400\nactive_file 150\nshmem 50\n")
    assert workspace._left_in_cgroup(tmp_path, 5000) == 650


@pytest.mark.parametrize("limit", ["max\n", None])
def test_without_a_container_limit_the_machine_is_the_limit(tmp_path, limit):
    if limit is not None:
        file(tmp_path / "memory.max", limit)
    assert workspace._left_in_cgroup(tmp_path, 5000) == 5000


def nvidia_smi(directory: Path, text: str, code: int = 0) -> None:
    tool = file(directory / "nvidia-smi", f"#!/bin/sh\nprintf '{text}'\nexit {code}\n")
    tool.chmod(0o755)


def test_gpus_are_read_from_nvidia_smi(tmp_path, monkeypatch):
    nvidia_smi(tmp_path, "Tesla T4, 7.5, 15360, 15101\\nTesla T4, 7.5, 15360, 14000\\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    first, second = workspace.gpus()
    assert (first.name, first.capability, first.memory) == ("Tesla T4", (7, 5), 15360 * 1024**2)
    assert second.free == 14000 * 1024**2


@pytest.mark.parametrize(("visible", "free"), [("1", [14000]), ("1,0", [14000, 15101]), ("", []), ("7", [])])
def test_only_visible_gpus_count(tmp_path, monkeypatch, visible, free):
    nvidia_smi(tmp_path, "Tesla T4, 7.5, 15360, 15101\\nTesla T4, 7.5, 15360, 14000\\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.free // 1024**2 for gpu in workspace.gpus()] == free


@pytest.mark.parametrize("named", ["GPU-5ed2a0f4-8b0c", "0,MIG-1f2e3d4c"])
def test_gpus_named_by_uuid_are_refused_instead_of_ignored(tmp_path, monkeypatch, named):
    nvidia_smi(tmp_path, "Tesla T4, 7.5, 15360, 15101\\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    with pytest.raises(SaigaError, match=rf"CUDA_VISIBLE_DEVICES='{named}': give the numbers"):
        workspace.gpus()


@pytest.mark.parametrize("printed", ["NVIDIA GB10, 12.1, [N/A], [N/A]", "Unable to determine the device handle: Lost"])
def test_a_gpu_without_capability_or_memory_is_refused_unless_it_is_hidden(tmp_path, monkeypatch, printed):
    nvidia_smi(tmp_path, f"Tesla T4, 7.5, 15360, 15101\\n{printed}\\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(SaigaError, match=re.escape(printed)):
        workspace.gpus()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert workspace.gpus() == []


def test_a_driver_without_a_gpu_means_no_gpu(tmp_path, monkeypatch):
    nvidia_smi(tmp_path, "No devices were found", code=6)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert workspace.gpus() == []


def test_no_driver_means_no_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert workspace.gpus() == []


def test_a_child_process_inherits_the_start_of_the_session_on_kaggle(monkeypatch):
    monkeypatch.setenv("SAIGAKIT_SESSION_START", "")
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    began = workspace.session_start()
    code = "from saigakit.core import workspace; print(workspace.session_start())"
    child = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=Path(__file__).parents[2])
    assert float(child) == began == workspace.session_start()


def test_a_session_at_home_begins_with_each_training(at_home, monkeypatch):
    monkeypatch.setenv("SAIGAKIT_SESSION_START", "")
    first = workspace.session_start()
    assert first < workspace.session_start() <= workspace.uptime()
    assert not os.environ["SAIGAKIT_SESSION_START"]


def test_uptime_is_one_clock_in_all_processes(monkeypatch):
    code = "from saigakit.core import workspace; print(workspace.uptime())"
    before = workspace.uptime()
    child = float(subprocess.check_output([sys.executable, "-c", code], text=True, cwd=Path(__file__).parents[2]))
    assert before < child < workspace.uptime()


def test_rows_are_aligned():
    assert workspace.align([("GPU", "none"), ("memory", "3 GB")]) == "GPU     none\nmemory  3 GB"


def test_the_description_lists_place_cpu_memory_and_disk(at_home):
    lines = dict(line.split(None, 1) for line in workspace.describe_machine().splitlines())
    assert lines["where"] == "local"
    assert {"CPU", "memory", "disk"} <= lines.keys()
