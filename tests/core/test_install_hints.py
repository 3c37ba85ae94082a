"""The command that a hint names installs saigakit from where it is: a clone or a wheel file, with the real pip."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_wheels import ROOT, install_saigakit, note_origin, wheel

from saigakit.core import install

HINT = "from saigakit.core import install; print(install.pip_install(['train']))"


def run_hint(command: str, python: Path | str, *options: str, **environment: str) -> str:
    """Run it as a shell does, without installing anything, and return the output of pip."""
    command = command.replace("pip install", " ".join([f"{python} -m pip install --dry-run --no-index", *options]), 1)
    done = subprocess.run(
        ["sh", "-c", command], env=os.environ | environment, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True
    )
    assert done.returncode == 0, done.stdout
    assert "does not provide the extra" not in done.stdout
    return done.stdout.splitlines()[-1]


def hint_of(python: Path | str, modules: Path) -> str:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(modules)}
    return subprocess.check_output([python, "-P", "-c", HINT], env=environment, text=True).strip()


def test_in_a_clone_the_hint_installs_the_clone(tmp_path):
    clone = tmp_path / "my clone"
    clone.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    shutil.copytree(ROOT / "saigakit", clone / "saigakit", ignore=shutil.ignore_patterns("__pycache__", "tiny"))
    hint = hint_of(sys.executable, clone)
    assert hint == f'pip install -e "{clone}[train]"'
    shown = run_hint(hint, sys.executable, "--no-deps", "--no-build-isolation", PYTHONPATH="")
    assert shown == "Would install saigakit-0.1.0"


def test_from_a_wheel_the_hint_installs_the_wheel_with_its_extra(machine, tmp_path):
    made = install_saigakit(machine, tmp_path / "my wheels", {"train": ["bitsandbytes"]})
    wheel(tmp_path / "registry", "bitsandbytes", "0.50.2")
    hint = hint_of(machine, machine.parents[1] / "modules")
    assert hint == f'pip install "saigakit[train] @ {made.as_uri()}"'
    shown = run_hint(hint, machine, f"--find-links={tmp_path / 'registry'}")
    assert shown.startswith("Would install bitsandbytes-0.50.2")


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("file:///gone/saigakit-0.1.0-py3-none-any.whl", 'pip install -e ".[train]" in a clone of saigakit, because'),
        ("file:///gone/clone", 'pip install -e ".[train]" in a clone of saigakit, because'),
        ("https://example.com/saigakit.git", 'pip install -e ".[train]" in a clone of saigakit, because'),
        ("https://example.com/saigakit-1.whl", 'pip install "saigakit[train] @ https://example.com/saigakit-1.whl"'),
        (ROOT.as_uri(), f'pip install -e "{ROOT}[train]"'),
    ],
)
def test_the_hint_names_only_what_is_there(monkeypatch, tmp_path, url, hint):
    note_origin(monkeypatch, tmp_path, url)
    monkeypatch.chdir(ROOT)  # the current directory is no origin
    assert install.pip_install(["train"]).startswith(hint)


def test_without_a_note_of_pip_the_hint_names_a_clone(monkeypatch, tmp_path):
    monkeypatch.setattr(install.metadata, "distributions", lambda **_: iter(()))
    monkeypatch.setattr(install, "__file__", str(tmp_path / "saigakit" / "core" / "install.py"))
    monkeypatch.chdir(ROOT)
    assert install.pip_install(()).startswith('pip install -e "." in a clone of saigakit')


def test_no_other_file_names_a_command_that_installs_saigakit():
    """PyPI does not have it, so that `pip install saigakit` would install what a stranger puts there."""
    files = [*(ROOT / "saigakit").rglob("*.py"), *(ROOT / "saigakit").rglob("*.jinja")]
    hints = [file.name for file in files if re.search(r"pip install .?saigakit", file.read_text(encoding="utf-8"))]
    assert hints == ["install.py"]
