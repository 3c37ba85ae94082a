"""A stage's directory is complete or absent, reused when nothing changed, and never overwritten without permission."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from threading import Timer

import pytest

from saigakit.core import manifest
from saigakit.core.files import sha256
from saigakit.errors import SaigaError

ROOT = Path(__file__).parents[2]
STAGE = "02_train"
PARAMETERS = {"model": "saiga2_7b", "epochs": 2.0}
INPUTS = {"01_format": "aa11"}


def make(final: Path, text: str = "адаптер", *, parameters=PARAMETERS, inputs=INPUTS, **more) -> Path:
    with manifest.making(final, stage=STAGE, parameters=parameters, inputs=inputs, **more) as directory:
        (directory / "checkpoints").mkdir()
        (directory / "checkpoints" / "one.txt").write_text("1", encoding="utf-8")
        (directory / "adapter.txt").write_text(text, encoding="utf-8")
    return final


def is_up_to_date(final: Path, *, stage=STAGE, parameters=PARAMETERS, inputs=INPUTS) -> bool:
    return manifest.is_up_to_date(final, stage=stage, parameters=parameters, inputs=inputs)


@pytest.fixture
def final(tmp_path) -> Path:
    return tmp_path / "run" / STAGE


def test_a_manifest_lists_parameters_inputs_facts_and_outputs(final):
    content = manifest.read(make(final, facts={"golden": [1, 2]}))
    assert (content["stage"], content["parameters"], content["inputs"]) == (STAGE, PARAMETERS, INPUTS)
    assert content["golden"] == [1, 2]
    assert content["outputs"] == {
        "adapter.txt": sha256(final / "adapter.txt"),
        "checkpoints/one.txt": sha256(final / "checkpoints" / "one.txt"),
    }


def test_a_manifest_lists_package_versions(final):
    """The metadata of llama-cpp-python says llama_cpp_python."""
    versions = manifest.read(make(final))["versions"]
    assert {"torch", "transformers", "peft", "llama-cpp-python"} <= versions.keys()


def test_hashes_leave_out_the_manifest(final):
    assert set(manifest.hashes(make(final))) == {"adapter.txt", "checkpoints/one.txt"}
    assert manifest.hashes(final / "adapter.txt") == {"adapter.txt": sha256(final / "adapter.txt")}


def test_the_final_name_appears_only_when_the_stage_is_complete(final):
    with manifest.making(final, stage=STAGE, parameters={}, inputs={}) as directory:
        assert directory.is_relative_to(final.parent)
        assert not final.exists()
    assert [path.name for path in final.parent.iterdir()] == [STAGE]


def test_an_error_leaves_nothing_under_the_final_name(final):
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        manifest.making(final, stage=STAGE, parameters={}, inputs={}) as directory,
    ):
        (directory / "half").touch()
        raise RuntimeError("out of memory")
    assert not final.exists()
    assert "half" not in manifest.hashes(make(final))


KILLED = """
import sys
from pathlib import Path
from threading import Timer
from saigakit.core import manifest
with manifest.making(Path(sys.argv[1]), stage="02_train", parameters={}, inputs={}) as directory:
    (directory / "half.txt").write_text("x" * 10**6)
    print("writing", flush=True)
    sys.stdin.read()
"""


def kill_in_the_middle(final: Path, **environment: str) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(final)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "writing\n"
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL


def test_a_killed_run_leaves_nothing_under_the_final_name_and_the_next_run_starts_clean(final):
    kill_in_the_middle(final)
    assert not final.exists()
    assert not is_up_to_date(final)
    make(final)
    assert set(manifest.read(final)["outputs"]) == {"adapter.txt", "checkpoints/one.txt"}
    assert [path.name for path in final.parent.iterdir()] == [STAGE]
    assert is_up_to_date(final)


def test_a_run_killed_while_replacing_a_stage_leaves_the_old_one(final):
    make(final)
    kill_in_the_middle(final, SAIGAKIT_REPLACE="1")
    assert is_up_to_date(final)


def test_a_stage_of_the_same_inputs_and_parameters_is_reused_and_reported(final, capsys):
    assert not is_up_to_date(final)
    make(final)
    assert is_up_to_date(final)
    assert capsys.readouterr().out == f"{STAGE}: {final} is up to date, reusing it.\n"


@pytest.mark.parametrize("part", ["parameters", "inputs", "outputs"])
@pytest.mark.parametrize("value", [None, [], "text"])
def test_a_manifest_with_a_part_of_another_kind_is_damaged(final, part, value):
    make(final)
    file = final / manifest.NAME
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | {part: value}), encoding="utf-8")
    with pytest.raises(SaigaError, match="is damaged: it is not the manifest of a stage"):
        manifest.read(final)


def test_parameters_are_compared_as_json(final):
    parameters = {"model": "saiga2_7b", "targets": ("q_proj", "k_proj"), "file": Path("a/b")}
    make(final, parameters=parameters)
    assert is_up_to_date(final, parameters=parameters)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameters": {**PARAMETERS, "epochs": 3.0}}, "epochs: 2.0 there, 3.0 now"),
        ({"parameters": {**PARAMETERS, "seed": 1}}, "seed: nothing there, 1 now"),
        ({"parameters": {"model": "saiga2_7b"}}, "epochs: 2.0 there, nothing now"),
        ({"parameters": {**PARAMETERS, "neftune_alpha": None}}, "neftune_alpha: nothing there, None now"),
        ({"inputs": {**INPUTS, "adapter": None}}, "adapter: nothing there, None now"),
        ({"inputs": {"01_format": "bb22"}}, "01_format: 'aa11' there, 'bb22' now"),
        ({"stage": "01_format"}, "was made by 02_train, and 01_format is needed"),
    ],
)
def test_a_stage_made_differently_is_refused_with_the_difference(final, changes, message):
    make(final)
    with pytest.raises(SaigaError) as caught:
        is_up_to_date(final, **changes)
    assert message in str(caught.value)
    assert "Delete it, rename it or choose another run_dir" in str(caught.value)


def test_a_stage_with_a_changed_file_is_refused_with_its_name(final):
    make(final)
    (final / "adapter.txt").write_text("другой", encoding="utf-8")
    with pytest.raises(SaigaError, match=r"adapter\.txt changed since it was made"):
        is_up_to_date(final)


def test_a_stage_with_a_missing_file_is_refused_with_its_name(final):
    make(final)
    (final / "checkpoints" / "one.txt").unlink()
    for refuse in (lambda: is_up_to_date(final), lambda: manifest.require_stage(final, STAGE)):
        with pytest.raises(SaigaError, match=r"lost checkpoints/one\.txt; run 02_train again"):
            refuse()


def test_a_directory_that_appears_while_writing_is_not_overwritten(final):
    with (
        pytest.raises(SaigaError, match="appeared while"),
        manifest.making(final, stage=STAGE, parameters={}, inputs={}),
    ):
        final.mkdir()
        (final / "mine.txt").write_text("моё", encoding="utf-8")
    assert (final / "mine.txt").read_text(encoding="utf-8") == "моё"


def test_with_replace_a_stage_made_differently_is_replaced_and_reported(final, monkeypatch, capsys):
    make(final)
    monkeypatch.setenv("SAIGAKIT_REPLACE", "1")
    assert not is_up_to_date(final, parameters={**PARAMETERS, "epochs": 3.0})
    assert "epochs: 2.0 there, 3.0 now" in capsys.readouterr().out
    make(final, "новый", parameters={**PARAMETERS, "epochs": 3.0})
    assert (final / "adapter.txt").read_text(encoding="utf-8") == "новый"
    assert [path.name for path in final.parent.iterdir()] == [STAGE]


def test_with_replace_the_old_stage_stays_until_the_new_one_is_complete(final, monkeypatch):
    make(final)
    monkeypatch.setenv("SAIGAKIT_REPLACE", "1")
    with (
        pytest.raises(RuntimeError),
        manifest.making(final, stage=STAGE, parameters={}, inputs={}),
    ):
        assert (final / "adapter.txt").is_file()
        raise RuntimeError
    assert is_up_to_date(final)


def test_with_replace_an_up_to_date_stage_is_still_reused(final, monkeypatch):
    make(final)
    monkeypatch.setenv("SAIGAKIT_REPLACE", "1")
    assert is_up_to_date(final)


@pytest.mark.parametrize("value", ["0", "", "true"])
def test_only_the_value_1_means_replace(final, monkeypatch, value):
    make(final)
    monkeypatch.setenv("SAIGAKIT_REPLACE", value)
    with pytest.raises(SaigaError):
        is_up_to_date(final, parameters={})


def test_with_replace_a_directory_that_is_not_a_stage_is_not_deleted(final, monkeypatch):
    final.mkdir(parents=True)
    (final / "mine.txt").write_text("моё", encoding="utf-8")
    monkeypatch.setenv("SAIGAKIT_REPLACE", "1")
    with pytest.raises(SaigaError, match=r"has no saigakit\.json"):
        is_up_to_date(final)
    with pytest.raises(SaigaError, match="appeared while"):
        make(final)
    assert (final / "mine.txt").is_file()


def test_a_later_stage_reads_the_earlier_manifest(final):
    assert manifest.require_stage(make(final), STAGE, model="saiga2_7b")["parameters"] == PARAMETERS


def test_a_stage_that_has_not_run_is_named(final):
    with pytest.raises(SaigaError, match=r"is not there: run 02_train first"):
        manifest.require_stage(final, STAGE)


def test_a_stage_of_another_model_is_refused_with_both_names(final):
    make(final)
    with pytest.raises(SaigaError, match="model='saiga2_7b', but this run has model='saiga_nemo_12b'"):
        manifest.require_stage(final, STAGE, model="saiga_nemo_12b")


def test_a_directory_of_another_stage_is_refused(final):
    make(final)
    with pytest.raises(SaigaError, match="was made by 02_train, and 01_format is needed here"):
        manifest.require_stage(final, "01_format")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"stage": "02_train"}', '{"stage": "02_train", "outputs": {}}'])
def test_a_damaged_manifest_raises_saiga_error(final, text):
    make(final)
    (final / manifest.NAME).write_text(text, encoding="utf-8")
    with pytest.raises(SaigaError, match=r"saigakit\.json is damaged"):
        manifest.require_stage(final, STAGE)


def test_cyrillic_stays_readable_in_a_manifest(final):
    make(final, parameters={"model": "сайга"})
    text = (final / manifest.NAME).read_text(encoding="utf-8")
    assert "сайга" in text
    assert json.loads(text)["parameters"] == {"model": "сайга"}


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..\\secret", "C:secret"])
def test_a_manifest_that_names_a_file_outside_is_refused(final, name):
    content = manifest.read(make(final))
    (final.parent / "secret").write_text("secret", encoding="utf-8")
    content["outputs"][name] = sha256(final.parent / "secret")
    (final / manifest.NAME).write_text(json.dumps(content), encoding="utf-8")
    for read in (lambda: manifest.require_stage(final, STAGE), lambda: manifest.changed(final, content)):
        with pytest.raises(SaigaError, match=f"{re.escape(repr(name))} is outside"):
            read()


def make_in_child(final: Path) -> "subprocess.Popen[str]":
    """A process that is making a stage, and continues at the end of its input."""
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(final)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert child.stdout is not None and child.stdout.readline() == "writing\n"
    return child


def test_a_second_process_in_the_run_directory_is_refused_before_its_work(final, monkeypatch, capsys):
    monkeypatch.setattr(manifest, "lock_file", functools.partial(_impatient, manifest.lock_file))
    with make_in_child(final) as child, pytest.raises(SaigaError) as caught:
        make(final)
    assert str(caught.value) == f"Another run is using {final.parent}. Wait for it, or choose another run_dir."
    assert capsys.readouterr().out == f"Waiting for another run that is using {final.parent} …\n"
    assert child.returncode == 0 and set(manifest.read(final)["outputs"]) == {"half.txt"}
    assert [path.name for path in final.parent.iterdir()] == [STAGE]


def _impatient(lock_file, file, used, patience_s):
    return lock_file(file, used, 0.1)


def test_a_stage_that_another_run_finished_meanwhile_is_not_made_again(final):
    with make_in_child(final) as child:
        Timer(0.3, child.communicate).start()
        with pytest.raises(SaigaError, match="appeared while"):
            make(final, "never written")
    assert is_up_to_date(final, parameters={}, inputs={})


def test_a_stage_that_is_a_link_to_a_larger_disk_is_made_there(final, tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    final.parent.mkdir()
    final.symlink_to(disk / "02", target_is_directory=True)
    with manifest.making(final, stage=STAGE, parameters=PARAMETERS, inputs=INPUTS) as partial:
        assert partial.is_relative_to(disk)
    assert is_up_to_date(final) and final.is_symlink()
    monkeypatch.setenv("SAIGAKIT_REPLACE", "1")
    make(final, "new")
    assert (disk / "02" / "adapter.txt").read_text(encoding="utf-8") == "new" and final.is_symlink()
    assert [path.name for path in disk.iterdir()] == ["02"]


def test_every_file_and_directory_is_flushed_before_the_stage_gets_its_name(final, monkeypatch):
    done, fsync, replace = [], os.fsync, Path.replace

    def flush(descriptor):
        done.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Path, "replace", lambda old, new: (done.append(f"rename {new.name}"), replace(old, new))[1])
    make(final)
    at = done.index(f"rename {STAGE}")
    assert {STAGE, "adapter.txt", "checkpoints", "one.txt", manifest.NAME} <= set(done[:at])
    assert done[at + 1 :] == [final.parent.name]
