"""Real wheels with one module, and a fresh environment with only pip, for the real pip to install them into."""

import hashlib
import json
import os
import re
import subprocess
import sysconfig
import venv
import zipfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def wheel(directory: Path, name: str, version: str, *, requires: Sequence[str] = (), source: str = "") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    module = {"llama-cpp-python": "llama_cpp"}.get(name, name.replace("-", "_"))
    escaped = name.replace("-", "_")
    info = f"{escaped}-{version}.dist-info"
    head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    extras = {extra for each in requires for extra in re.findall(r'extra == "(\w+)"', each)}
    head += "".join(f"Provides-Extra: {extra}\n" for extra in sorted(extras))
    files = {
        f"{module}/__init__.py": source,
        f"{info}/METADATA": head + "".join(f"Requires-Dist: {each}\n" for each in requires),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    made = directory / f"{escaped}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(made, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
    return made


def malicious(directory: Path, name: str, version: str, marker: Path) -> Path:
    """A wheel that writes `marker` when Python starts, and when it is imported."""
    code = f"import pathlib; pathlib.Path({str(marker)!r}).touch()"
    made = wheel(directory, name, version, source=code)
    with zipfile.ZipFile(made, "a") as archive:
        archive.writestr(f"{name}.pth", code)
    return made


def pin(*wheels: Path, **settings: object) -> dict[str, object]:
    """A row of pins.toml that allows these wheels."""
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in wheels]
    return {"version": wheels[0].name.split("-")[1], "sha256": hashes, **settings}


def new_python(directory: Path) -> Path:
    """The interpreter of a fresh environment that has pip and packaging."""
    import packaging
    import pip

    venv.create(directory, symlinks=True)
    # Not the repository itself, where an editable installation leaves its metadata.
    (directory / "modules").mkdir()
    (directory / "modules" / "saigakit").symlink_to(ROOT / "saigakit", target_is_directory=True)
    python = directory / "bin" / "python"
    for package in (pip, packaging):
        target = _site_packages(python) / package.__name__
        target.symlink_to(Path(package.__file__).parent, target_is_directory=True)
    return python


def unpack(python: Path, file: Path) -> None:
    """Install a wheel as an image has it, faster than pip does."""
    with zipfile.ZipFile(file) as archive:
        archive.extractall(_site_packages(python))


def pretend_installed(monkeypatch: pytest.MonkeyPatch, directory: Path, name: str, version: str) -> None:
    """Let this Python find only the metadata of a package."""
    information = directory / f"{name}-{version}.dist-info"
    information.mkdir()
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (information / "METADATA").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(directory)


def note_origin(monkeypatch: pytest.MonkeyPatch, directory: Path, url: str) -> None:
    """Let saigakit run as if pip had installed it from this address."""
    pretend_installed(monkeypatch, directory, "saigakit", "0.1.0")
    noted = directory / "saigakit-0.1.0.dist-info" / "direct_url.json"
    noted.write_text(json.dumps({"url": url}), encoding="utf-8")
    monkeypatch.setattr("saigakit.core.install.__file__", str(directory / "saigakit" / "core" / "install.py"))


def install_saigakit(python: Path, directory: Path, extras: Mapping[str, Sequence[str]] | None = None) -> Path:
    """Install it from a wheel in `directory`, as the notebooks do, with these packages by extra; "" for no extra.

    The modules are those of this repository; see `prepare`.
    """
    lines = [
        name + (f'; extra == "{extra}"' if extra else "") for extra, names in (extras or {}).items() for name in names
    ]
    made = wheel(directory, "saigakit", "0.1.0", requires=lines)
    command = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", made]
    subprocess.run(command, env={"PATH": os.environ["PATH"]}, check=True)
    return made


def installed(python: Path) -> dict[str, str]:
    """Versions by package, without saigakit."""
    found = metadata.distributions(path=[str(_site_packages(python))])
    return {each.name: each.version for each in found if each.name != "saigakit"}


def _site_packages(python: Path) -> Path:
    base = str(python.parents[1])
    return Path(sysconfig.get_path("purelib", "venv", {"base": base, "platbase": base}))


def prepare(
    python: Path,
    stage: str,
    *,
    inputs: Path,
    kaggle: bool = True,
    registry: Path | None = None,
    before: str = "",
    **table: object,
) -> subprocess.CompletedProcess:
    """Run prepare(stage) in that environment; `registry` is a directory of wheels in place of PyPI.

    `before` is code to run first, and `table` replaces attributes of the module.
    """
    code = f"import sys, json; {before}\nfrom saigakit.core import install\n"
    code += "for name, value in json.loads(sys.argv[2]).items(): setattr(install, name, value)\n"
    code += "install.prepare(sys.argv[1])"
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(python.parents[1] / "modules"),
        "PIP_NO_INDEX": "1",
        "SAIGAKIT_INPUT_ROOT": str(inputs),
        **({"PIP_FIND_LINKS": str(registry)} if registry else {}),
        **({"KAGGLE_KERNEL_RUN_TYPE": "Batch"} if kaggle else {}),
    }
    command = [python, "-P", "-c", code, stage, json.dumps(table)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
