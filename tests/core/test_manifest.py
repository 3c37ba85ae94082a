"""A stage's directory: whole or absent, kept when nothing changed, never overwritten unasked."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

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


def is_kept(final: Path, *, stage=STAGE, parameters=PARAMETERS, inputs=INPUTS) -> bool:
    return manifest.is_kept(final, stage=stage, parameters=parameters, inputs=inputs)


@pytest.fixture
def final(tmp_path) -> Path:
    return tmp_path / "run" / STAGE


def test_a_finished_stage_says_what_it_was_made_of_and_what_it_holds(final):
    content = manifest.read(make(final, facts={"golden": [1, 2]}))
    assert (content["stage"], content["parameters"], content["inputs"]) == (STAGE, PARAMETERS, INPUTS)
    assert content["golden"] == [1, 2]
    assert content["outputs"] == {
        "adapter.txt": sha256(final / "adapter.txt"),
        "checkpoints/one.txt": sha256(final / "checkpoints" / "one.txt"),
    }


def test_the_versions_of_what_made_it_are_written_down(final):
    """llama-cpp-python calls itself llama_cpp_python."""
    versions = manifest.read(make(final))["versions"]
    assert {"torch", "transformers", "peft", "llama-cpp-python"} <= versions.keys()


def test_a_directory_is_hashed_without_its_manifest(final):
    assert set(manifest.hashes(make(final))) == {"adapter.txt", "checkpoints/one.txt"}
    assert manifest.hashes(final / "adapter.txt") == {"adapter.txt": sha256(final / "adapter.txt")}


def test_nothing_is_there_before_it_is_complete_and_nothing_else_after(final):
    with manifest.making(final, stage=STAGE, parameters={}, inputs={}) as directory:
        assert directory.parent == final.parent
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


def test_a_killed_run_leaves_nothing_under_the_final_name_and_the_next_one_starts_clean(final):
    kill_in_the_middle(final)
    assert not final.exists()
    assert not is_kept(final)
    make(final)
    assert set(manifest.read(final)["outputs"]) == {"adapter.txt", "checkpoints/one.txt"}
    assert [path.name for path in final.parent.iterdir()] == [STAGE]
    assert is_kept(final)


def test_a_run_killed_while_it_replaces_leaves_the_finished_stage(final):
    make(final)
    kill_in_the_middle(final, SAIGAKIT_REPLACE="1")
    assert is_kept(final)


def test_a_stage_of_the_same_things_is_kept_and_that_is_said(final, capsys):
    assert not is_kept(final)
    make(final)
    assert is_kept(final)
    assert capsys.readouterr().out == (
        f"{STAGE}: {final} is complete and made of the same inputs and parameters: kept.\n"
    )


def test_parameters_are_the_same_after_json(final):
    parameters = {"model": "saiga2_7b", "targets": ("q_proj", "k_proj"), "file": Path("a/b")}
    make(final, parameters=parameters)
    assert is_kept(final, parameters=parameters)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parameters": {**PARAMETERS, "epochs": 3.0}}, "epochs: 2.0 there, 3.0 now"),
        ({"parameters": {**PARAMETERS, "seed": 1}}, "seed: None there, 1 now"),
        ({"parameters": {"model": "saiga2_7b"}}, "epochs: 2.0 there, None now"),
        ({"inputs": {"01_format": "bb22"}}, "01_format: 'aa11' there, 'bb22' now"),
        ({"stage": "01_format"}, "was made by 02_train, and 01_format is needed"),
    ],
)
def test_a_stage_of_other_things_is_refused_with_the_difference(final, changes, said):
    make(final)
    with pytest.raises(SaigaError) as caught:
        is_kept(final, **changes)
    assert said in str(caught.value)
    assert "Delete it, rename it or choose another run_dir" in str(caught.value)


def test_a_stage_that_was_changed_since_is_refused_with_the_file(final):
    make(final)
    (final / "adapter.txt").write_text("другой", encoding="utf-8")
    with pytest.raises(SaigaError, match=r"adapter\.txt changed since it was made"):
        is_kept(final)


def test_a_stage_that_lost_a_file_is_refused_with_its_name(final):
    make(final)
    (final / "checkpoints" / "one.txt").unlink()
    for refuse in (lambda: is_kept(final), lambda: manifest.require_stage(final, STAGE)):
        with pytest.raises(SaigaError, match=r"lost checkpoints/one\.txt; run 02_train again"):
            refuse()


def test_a_directory_that_appears_meanwhile_is_not_overwritten(final):
    with (
        pytest.raises(SaigaError, match="appeared while"),
        manifest.making(final, stage=STAGE, parameters={}, inputs={}),
    ):
        final.mkdir()
        (final / "mine.txt").write_text("моё", encoding="utf-8")
    assert (final / "mine.txt").read_text(encoding="utf-8") == "моё"


def test_with_replace_a_stage_of_other_things_is_made_afresh_aloud(final, monkeypatch, capsys):
    make(final)
    monkeypatch.setenv("SAIGAKIT_REPLACE", "1")
    assert not is_kept(final, parameters={**PARAMETERS, "epochs": 3.0})
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
    assert is_kept(final)


def test_with_replace_a_stage_of_the_same_things_is_kept_all_the_same(final, monkeypatch):
    make(final)
    monkeypatch.setenv("SAIGAKIT_REPLACE", "1")
    assert is_kept(final)


@pytest.mark.parametrize("value", ["0", "", "true"])
def test_only_1_means_replace(final, monkeypatch, value):
    make(final)
    monkeypatch.setenv("SAIGAKIT_REPLACE", value)
    with pytest.raises(SaigaError):
        is_kept(final, parameters={})


def test_with_replace_a_directory_that_is_no_stage_is_not_thrown_away(final, monkeypatch):
    final.mkdir(parents=True)
    (final / "mine.txt").write_text("моё", encoding="utf-8")
    monkeypatch.setenv("SAIGAKIT_REPLACE", "1")
    with pytest.raises(SaigaError, match=r"has no saigakit\.json"):
        is_kept(final)
    with pytest.raises(SaigaError, match="appeared while"):
        make(final)
    assert (final / "mine.txt").is_file()


def test_a_later_stage_reads_the_earlier_one(final):
    assert manifest.require_stage(make(final), STAGE, model="saiga2_7b")["parameters"] == PARAMETERS


def test_a_stage_that_was_not_run_is_named(final):
    with pytest.raises(SaigaError, match=r"is not there: run 02_train first"):
        manifest.require_stage(final, STAGE)


def test_a_stage_of_another_model_is_refused_with_both_names(final):
    make(final)
    with pytest.raises(SaigaError, match="model='saiga2_7b', and this run is of model='saiga_nemo_12b'"):
        manifest.require_stage(final, STAGE, model="saiga_nemo_12b")


def test_another_stages_directory_is_refused(final):
    make(final)
    with pytest.raises(SaigaError, match="was made by 02_train, and 01_format is needed here"):
        manifest.require_stage(final, "01_format")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"stage": "02_train"}', '{"stage": "02_train", "outputs": {}}'])
def test_a_damaged_manifest_is_a_sentence_and_not_a_crash(final, text):
    make(final)
    (final / manifest.NAME).write_text(text, encoding="utf-8")
    with pytest.raises(SaigaError, match=r"saigakit\.json is damaged"):
        manifest.require_stage(final, STAGE)


def test_the_manifest_is_readable_text(final):
    make(final, parameters={"model": "сайга"})
    text = (final / manifest.NAME).read_text(encoding="utf-8")
    assert "сайга" in text
    assert json.loads(text)["parameters"] == {"model": "сайга"}
