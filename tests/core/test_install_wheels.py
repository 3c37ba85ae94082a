"""Which wheel files `prepare` accepts on Kaggle: by data set and by SHA-256, with the real pip."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_wheels import install_saigakit, installed, malicious, pin, prepare, pretend_installed, unpack, wheel

from saigakit.core import install
from saigakit.errors import SaigaError

RENSA = {"": ["rensa"]}
OWN = "datasets/me/saigakit-wheels"


@pytest.fixture
def inputs(tmp_path) -> Path:
    return tmp_path / "input"


@pytest.fixture
def marker(tmp_path) -> Path:
    """A file that only the code of a malicious wheel writes."""
    return tmp_path / "attacked"


@pytest.mark.parametrize("foreign", ["datasets/stranger/records", "records", "notebooks/stranger/wheels"])
def test_a_wheel_in_another_data_set_is_ignored(machine, inputs, marker, foreign):
    install_saigakit(machine, inputs / OWN, RENSA)
    malicious(inputs / foreign, "rensa", "0.5.0", marker)
    result = prepare(machine, "01_format", inputs=inputs, _ON_KAGGLE=[])
    assert not marker.exists() and installed(machine) == {}
    assert "No matching distribution found for rensa==0.5.0" in result.stderr
    assert "rensa 0.5.0: not attached\n" in result.stderr
    assert "Switch Internet on in the notebook's settings. Or put fitting wheels into the data set" in result.stderr


def rename(file: Path, tags: str) -> Path:
    """The same file for another Python or system."""
    return file.rename(file.with_name(file.name.replace("py3-none-any", tags)))


def test_one_message_lists_every_missing_package_and_a_command_that_gets_them(machine, inputs, tmp_path):
    own, registry = inputs / OWN, tmp_path / "registry"
    install_saigakit(machine, own, {"": ["gguf", "jinja2", "rensa"], "infer": ["llama-cpp-python"]})
    right = {
        "diskcache": wheel(own, "diskcache", "5.6.3"),
        "gguf": wheel(registry, "gguf", "0.19.0"),
        "jinja2": wheel(registry, "jinja2", "3.1.6"),
        "rensa": rename(wheel(registry, "rensa", "0.5.0"), "py3-none-manylinux_2_28_x86_64"),
    }
    llama = wheel(registry, "llama-cpp-python", "0.3.35")
    pins = {name: pin(file) for name, file in right.items()}
    pins["llama-cpp-python"] = {"module": "llama_cpp", **pin(llama, url=llama.as_uri().replace("registry", "gone"))}
    old = wheel(own, "gguf", "0.17.1")
    foreign = rename(wheel(own, "rensa", "0.5.0"), "cp27-cp27mu-manylinux2014_x86_64")
    changed = wheel(own, "jinja2", "3.1.6", source="changed = True")
    result = prepare(machine, "04_infer", inputs=inputs, _ON_KAGGLE=[], PINS=pins)
    assert installed(machine) == {}
    message = result.stderr.partition("SaigaError: ")[2]
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert message.partition("These packages are missing:\n")[2].splitlines()[:4] == [
        f"gguf 0.19.0: {old}: its version is 0.17.1",
        f"jinja2 3.1.6: {changed}: its SHA-256 is not that of the tested file",
        f"rensa 0.5.0: {foreign}: it is not for Python {version} on Linux x86_64",
        "llama-cpp-python 0.3.35: not attached",
    ]
    assert "`saigakit wheels DIRECTORY` builds this set" in message and "Switch Internet on" in message
    command = message.splitlines()[-1].replace("gone", "registry")
    assert command.startswith(f"pip download --no-deps --only-binary=:all: --python-version {version} --platform")
    environment = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(registry)}
    (home := tmp_path / "home").mkdir()
    subprocess.run([machine, "-m", *command.split()], cwd=home, env=environment, check=True, capture_output=True)
    shutil.copytree(home, own, dirs_exist_ok=True)
    result = prepare(machine, "04_infer", inputs=inputs, _ON_KAGGLE=[], PINS=pins)
    assert set(installed(machine)) == {"diskcache", "gguf", "jinja2", "rensa", "llama-cpp-python"}, result.stderr


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("bitsandbytes", "bitsandbytes-0.50.2-py3-none-manylinux_2_24_x86_64.whl"),
        ("rensa", "rensa-0.5.0-cp312-cp312-manylinux_2_28_x86_64.whl"),
        ("llama-cpp-python", Path(install.PINS["llama-cpp-python"]["cpu"]["url"]).name),
        ("llama-cpp-python", Path(install.PINS["llama-cpp-python"]["gpu"]["url"]).name),
    ],
)
def test_the_wheels_of_the_pins_are_for_the_platforms_that_pip_is_asked_for(tmp_path, name, file):
    (tmp_path / file).touch()
    [why] = install.misfits(name, [tmp_path / file], gpu=False, python="3.12").values()
    assert why == "its SHA-256 is not that of the tested file"  # and nothing else


@pytest.mark.parametrize(
    ("file", "why"),
    [
        ("rensa-0.5.0.whl", "its name is not that of a wheel"),
        ("rensa-x-py3-none-any.whl", "its name is not that of a wheel"),
        ("rensa-0.5.0-py3-none-any (1).whl", "it is not for Python"),
    ],
)
def test_a_file_that_pip_would_not_take_for_a_wheel_does_not_fit(tmp_path, file, why):
    (tmp_path / file).touch()
    [found] = install.misfits("rensa", [tmp_path / file], gpu=False).values()
    assert found.startswith(why)


def test_with_internet_the_tested_wheel_replaces_an_attached_one_that_does_not_fit(machine, inputs, marker, tmp_path):
    install_saigakit(machine, inputs / OWN, RENSA)
    bad = malicious(inputs / OWN, "rensa", "0.5.0", marker)
    pins = {"rensa": pin(wheel(tmp_path / "registry", "rensa", "0.5.0"))}
    result = prepare(machine, "01_format", inputs=inputs, registry=tmp_path / "registry", _ON_KAGGLE=[], PINS=pins)
    assert installed(machine) == {"rensa": "0.5.0"} and not marker.exists(), result.stderr
    assert result.stdout.startswith(f"Not using {bad}: its SHA-256 is not that of the tested file.\nInstalling rensa==")


def test_of_two_attached_builds_the_one_for_this_python_is_installed(machine, inputs):
    install_saigakit(machine, inputs / OWN, RENSA)
    foreign = rename(wheel(inputs / OWN, "rensa", "0.5.0", source="foreign = 1"), "cp27-cp27mu-manylinux2014_x86_64")
    pins = {"rensa": pin(foreign, wheel(inputs / OWN, "rensa", "0.5.0"))}
    result = prepare(machine, "01_format", inputs=inputs, _ON_KAGGLE=[], PINS=pins)
    assert installed(machine) == {"rensa": "0.5.0"}, result.stderr


def test_the_registry_is_used_although_another_data_set_has_the_wheel(machine, inputs, marker, tmp_path):
    install_saigakit(machine, inputs / OWN, RENSA)
    malicious(inputs / "datasets/stranger/records", "rensa", "0.5.0", marker)
    pins = {"rensa": pin(wheel(tmp_path / "registry", "rensa", "0.5.0"))}
    result = prepare(machine, "01_format", inputs=inputs, registry=tmp_path / "registry", _ON_KAGGLE=[], PINS=pins)
    assert (result.returncode, result.stdout) == (0, "Installing rensa==0.5.0 …\n"), result.stderr
    assert installed(machine) == {"rensa": "0.5.0"} and not marker.exists()


def test_other_bytes_in_the_own_data_set_are_refused_with_the_name_of_the_file(machine, inputs, marker):
    install_saigakit(machine, inputs / OWN, {"": ["gguf", "rensa"]})
    pins = {"gguf": pin(wheel(inputs / OWN, "gguf", "0.19.0")), "rensa": install.PINS["rensa"]}
    bad = malicious(inputs / OWN, "rensa", "0.5.0", marker)
    result = prepare(machine, "01_format", inputs=inputs, _ON_KAGGLE=[], PINS=pins)
    assert not marker.exists() and installed(machine) == {}
    assert f"Not using {bad}: its SHA-256 is not that of the tested file.\n" in result.stdout
    assert f"\nrensa 0.5.0: {bad}: its SHA-256 is not that of the tested file\n" in result.stderr
    assert "gguf 0.19.0" not in result.stderr


def test_other_bytes_from_the_registry_are_refused_by_pip(machine, inputs, marker, tmp_path):
    install_saigakit(machine, inputs / OWN, {"": ["gguf", "rensa"]})
    malicious(tmp_path / "registry", "rensa", "0.5.0", marker)
    pins = {"gguf": pin(wheel(tmp_path / "registry", "gguf", "0.19.0")), "rensa": install.PINS["rensa"]}
    result = prepare(machine, "01_format", inputs=inputs, registry=tmp_path / "registry", _ON_KAGGLE=[], PINS=pins)
    assert not marker.exists() and installed(machine) == {}
    assert "pip could not install gguf, rensa." in result.stderr
    assert "Expected" in result.stderr and install.PINS["rensa"]["sha256"][0] in result.stderr


def test_a_wheel_without_a_pin_is_refused(machine, inputs, marker):
    install_saigakit(machine, inputs / OWN, {"": ["click"]})
    malicious(inputs / OWN, "click", "8.1", marker)
    result = prepare(machine, "01_format", inputs=inputs, _ON_KAGGLE=[])
    assert "SaigaError: This image has no click. In the notebook's settings choose the latest" in result.stderr
    assert not marker.exists() and installed(machine) == {}


@pytest.fixture
def attached(inputs, tmp_path, monkeypatch):
    """Attach empty files, and let saigakit come from one of them or from somewhere else."""

    def attach(*files: str, origin: str | None = None) -> None:
        for file in files:
            (inputs / file).parent.mkdir(parents=True, exist_ok=True)
            (inputs / file).touch()
        monkeypatch.setenv("SAIGAKIT_INPUT_ROOT", str(inputs))
        pretend_installed(monkeypatch, tmp_path, "saigakit", "0.1.0")
        if origin is not None:
            url = origin if "://" in origin else (inputs / origin).as_uri()
            file = tmp_path / "saigakit-0.1.0.dist-info" / "direct_url.json"
            file.write_text(json.dumps({"url": url}), encoding="utf-8")

    return attach


MINE = "datasets/me/my wheels/saigakit-0.1.0-py3-none-any.whl"
THEIRS = "datasets/me2/wheels/saigakit-0.1.0-py3-none-any.whl"


@pytest.mark.parametrize(
    ("own", "others"),
    [
        ("datasets/me/wheels", ["datasets/me/other", "datasets/you/wheels", "wheels", "notebooks/me/wheels"]),
        ("wheels", ["other", "datasets/me/wheels", "wheels2"]),
        ("notebooks/me/wheels", ["notebooks/me/other", "datasets/me/wheels"]),
        ("models/me/m/other/v/1", ["models/me/m/other/v/2", "models/me/m/other/w/1"]),
    ],
)
def test_only_the_input_that_holds_saigakits_wheel_counts(inputs, attached, own, others):
    files = [f"{own}/below/{name}-py3-none-any.whl" for name in ("rensa-0.5.0", "saigakit-0.1.0")]
    attached(*files, *(f"{other}/rensa-0.5.0-py3-none-any.whl" for other in others))
    assert install.own_wheels() == [inputs / file for file in files]


def test_of_two_data_sets_with_a_wheel_of_saigakit_that_of_the_installation_counts(inputs, attached):
    attached(MINE, THEIRS, origin=MINE)
    assert install.own_wheels() == [inputs / MINE]


@pytest.mark.parametrize("origin", [None, "https://example.com/saigakit-0.1.0-py3-none-any.whl"])
def test_two_data_sets_with_a_wheel_of_saigakit_are_refused_if_it_came_from_elsewhere(inputs, attached, origin):
    attached(MINE, THEIRS, origin=origin)
    with pytest.raises(SaigaError, match="More than one attached data set holds a wheel of saigakit") as caught:
        install.own_wheels()
    assert all(str((inputs / file).parent) in str(caught.value) for file in (MINE, THEIRS))


def test_without_attached_wheels_the_registry_is_used(attached):
    attached()
    assert install.own_wheels() == []


def test_of_several_attached_wheels_the_one_with_the_right_hash_is_taken(tmp_path, monkeypatch):
    """llama-cpp-python has the same version for CPU and GPU, and a local label does not matter."""
    cpu = wheel(tmp_path / "cpu", "llama-cpp-python", "0.3.35", source="cpu = 1")
    gpu = wheel(tmp_path / "gpu", "llama-cpp-python", "0.3.35+cu125", source="gpu = 1")
    pins = {"version": "0.3.35", "cpu": pin(cpu) | {"version": "0.3.35"}, "gpu": pin(gpu) | {"version": "0.3.35"}}
    monkeypatch.setattr(install, "PINS", {"llama-cpp-python": pins})
    for chosen, is_gpu in ((cpu, False), (gpu, True)):
        found = install.misfits("llama-cpp-python", [cpu, gpu], gpu=is_gpu)
        assert [file for file, why in found.items() if not why] == [chosen]


@pytest.mark.parametrize(("gpu", "build"), [(True, "v0.3.35-cu125"), (False, "v0.3.35")])
def test_llama_cpp_is_the_build_for_cpu_or_gpu(gpu, build):
    line = install.requirement("llama-cpp-python", [], gpu=gpu)
    assert f"https://github.com/abetlen/llama-cpp-python/releases/download/{build}/llama_cpp_python-0.3.35-" in line


def test_an_attached_wheel_of_another_version_is_not_used(tmp_path):
    old = wheel(tmp_path, "gguf", "0.17.1")
    assert install.misfits("gguf", [old], gpu=False) == {old: "its version is 0.17.1"}


def test_a_package_that_is_too_old_is_replaced_if_it_is_pure_python(machine, inputs, tmp_path):
    unpack(machine, wheel(tmp_path / "image", "jinja2", "3.1.5"))
    install_saigakit(machine, inputs / OWN, {"": ["jinja2>=3.1.6"]})
    pins = {"jinja2": pin(wheel(inputs / OWN, "jinja2", "3.1.6"), pure=True)}
    result = prepare(machine, "01_format", inputs=inputs, _ON_KAGGLE=[], PINS=pins)
    assert result.returncode == 0, result.stderr
    assert installed(machine) == {"jinja2": "3.1.6"}


def test_a_session_that_has_imported_the_old_version_must_be_restarted(machine, inputs, tmp_path):
    unpack(machine, wheel(tmp_path / "image", "jinja2", "3.1.5"))
    install_saigakit(machine, inputs / OWN, {"": ["jinja2>=3.1.6"]})
    pins = {"jinja2": pin(wheel(inputs / OWN, "jinja2", "3.1.6"), pure=True)}
    result = prepare(machine, "01_format", inputs=inputs, before="import jinja2", _ON_KAGGLE=[], PINS=pins)
    assert "jinja2 was too old and has been replaced, but this session runs the old version" in result.stderr
    assert prepare(machine, "01_format", inputs=inputs, before="import jinja2", _ON_KAGGLE=[]).returncode == 0


def test_a_compiled_package_that_is_too_old_is_refused(machine, inputs, tmp_path):
    unpack(machine, wheel(tmp_path / "image", "rensa", "0.4.1"))
    install_saigakit(machine, inputs / OWN, {"": ["rensa>=0.5,<0.6"]})
    result = prepare(machine, "01_format", inputs=inputs, _ON_KAGGLE=[])
    assert "This image has rensa 0.4.1, which is too old. In the notebook's settings choose" in result.stderr
    assert installed(machine) == {"rensa": "0.4.1"}
