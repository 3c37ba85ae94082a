"""`saigakit wheels`: its own wheel and the pinned ones, built and downloaded by the real pip."""

import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from small_wheels import ROOT, note_origin, wheel

from saigakit import cli
from saigakit.core import install
from saigakit.errors import SaigaError
from saigakit.kaggle import wheels

CPU, GPU = "llama_cpp_python-0.3.35-py3-none-any.whl", "llama_cpp_python-0.3.35+cu125-py3-none-any.whl"
THIRD_PARTY = sorted([CPU, GPU, "gguf-0.19.0-py3-none-any.whl", "rensa-0.5.0-cp312-cp312-manylinux_2_28_x86_64.whl"])


def names(directory: Path) -> list[str]:
    return sorted(file.name for file in directory.iterdir())


@pytest.fixture
def dist(tmp_path) -> Path:
    return tmp_path / "my dist"


def build(directory: Path) -> Path:
    """The wheel of this clone, built with the setuptools of this environment."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PIP_NO_BUILD_ISOLATION", "0")
        return wheels.own_wheel(directory)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("built"))


@pytest.fixture
def installed_from(monkeypatch, tmp_path) -> Path:
    """The wheel file that saigakit seems to be installed from."""
    source = wheel(tmp_path / "down loads", "saigakit", "0.1.0")
    note_origin(monkeypatch, tmp_path, source.as_uri())
    return source


def test_the_pinned_wheels_are_downloaded_for_kaggles_python_in_both_builds(registry, dist):
    assert [file.name for file in wheels.download(dist)] == THIRD_PARTY == names(dist)


def test_the_wheels_of_another_python_can_be_asked_for(registry, dist):
    wheels.download(dist, "3.11")
    assert "rensa-0.5.0-cp311-cp311-manylinux_2_28_x86_64.whl" in names(dist)
    assert wheels.download(dist, "3.12") != wheels.download(dist, "3.11")


def test_what_is_there_is_not_downloaded_again(registry, dist, monkeypatch):
    wheels.download(dist)
    (dist / "gguf-0.19.0-py3-none-any.whl").write_bytes(b"damaged")
    before = {name: (dist / name).stat() for name in THIRD_PARTY}
    wheels.download(dist)
    assert [name for name in THIRD_PARTY if (dist / name).stat() != before[name]] == ["gguf-0.19.0-py3-none-any.whl"]
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert [file.name for file in wheels.download(dist)] == THIRD_PARTY


def test_a_wheel_with_other_bytes_is_refused_and_nothing_of_it_stays(registry, dist):
    wheel(registry, "gguf", "0.19.0", source="changed = True")
    with pytest.raises(SaigaError, match="pip could not download all of gguf, rensa, llama-cpp-python") as caught:
        wheels.download(dist)
    assert "HASH" in str(caught.value).upper() and install.PINS["gguf"]["sha256"][0] in str(caught.value)
    assert names(dist) == []


def test_without_a_connection_it_says_what_to_do(registry, dist, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    with pytest.raises(SaigaError, match=r"No matching distribution found for gguf==0\.19\.0") as caught:
        wheels.download(dist)
    assert "Check the connection and run this again" in str(caught.value)
    assert names(dist) == []


def test_the_own_wheel_has_every_file_of_the_package_and_the_clone_stays_clean(built):
    assert names(built.parent) == ["saigakit-0.1.0-py3-none-any.whl"]
    packed = {name for name in zipfile.ZipFile(built).namelist() if name.startswith("saigakit/")}
    on_disk = [file for file in (ROOT / "saigakit").rglob("*") if file.is_file() and file.parent.name != "__pycache__"]
    assert packed == {file.relative_to(ROOT).as_posix() for file in on_disk}
    assert not (ROOT / "build").exists()


def test_the_own_wheel_of_unchanged_sources_has_the_same_bytes(built, dist):
    assert build(dist).read_bytes() == built.read_bytes()


def test_an_own_wheel_of_another_version_is_not_left_next_to_it(installed_from, dist):
    old = wheel(dist, "saigakit", "0.0.9")
    with pytest.raises(SaigaError, match=r"saigakit-0\.0\.9.*: only saigakit-0\.1\.0-py3-none-any\.whl may be there"):
        wheels.own_wheel(dist)
    assert names(dist) == [old.name]


def test_the_wheel_of_the_installation_is_copied(installed_from, dist):
    assert wheels.own_wheel(dist).read_bytes() == installed_from.read_bytes()
    assert wheels.own_wheel(installed_from.parent) == installed_from and installed_from.is_file()


def test_without_clone_and_wheel_it_says_what_is_needed(monkeypatch, tmp_path, dist):
    note_origin(monkeypatch, tmp_path, "file:///gone/saigakit-0.1.0-py3-none-any.whl")
    with pytest.raises(SaigaError, match=r'This needs a clone.*Run: pip install -e "." in a clone of saigakit'):
        wheels.own_wheel(dist)
    assert not dist.exists()


def test_a_build_that_fails_is_reported(monkeypatch, dist):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")  # so that there is no setuptools
    with pytest.raises(SaigaError, match="pip could not build the wheel of") as caught:
        wheels.own_wheel(dist)
    assert "setuptools" in str(caught.value)
    assert names(dist) == []


def test_the_command_lists_all_files_and_the_next_command(installed_from, registry, dist):
    done = CliRunner().invoke(cli.main, ["wheels", str(dist)], catch_exceptions=False)
    assert done.exit_code == 0
    lines = done.output.splitlines()
    assert [line.split()[0] for line in lines[:-2]] == ["saigakit-0.1.0-py3-none-any.whl", *THIRD_PARTY]
    assert all(line.endswith(" GB") for line in lines[:-2])
    assert lines[-1] == f"next: saigakit push wheels '{dist}'/*.whl"


def test_a_python_without_pinned_wheels_is_refused(dist):
    done = CliRunner().invoke(cli.main, ["wheels", str(dist), "--python", "3.9"])
    assert done.exit_code == 2 and "'3.9' is not one of '3.11', '3.12', '3.13'" in done.output
