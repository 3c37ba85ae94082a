"""Build the set of wheels that Kaggle's image lacks: saigakit's own, and the pinned ones of other packages."""

import shutil
import tomllib
from collections.abc import Sequence
from pathlib import Path

from saigakit.core import install
from saigakit.core.files import temporary_dir
from saigakit.errors import SaigaError

KAGGLE_PYTHON = "3.12"
_OLDEST_DATE = "315532800"  # 1980-01-01, the first date in a zip: unchanged sources give the same bytes


def own_wheel(directory: Path) -> Path:
    """Build saigakit's wheel from the clone, or copy the wheel that it was installed from, into `directory`."""
    if (origin := install.origin()) is None:
        raise SaigaError(f"This needs a clone, or the wheel file of the installation. Run: {install.pip_install(())}")
    with temporary_dir(directory, "saigakit") as scratch:
        made = Path(shutil.copy(origin, scratch)) if origin.is_file() else _build(origin, scratch)
        if others := [str(file) for file in directory.glob("saigakit-*.whl") if file.name != made.name]:
            raise SaigaError(f"{', '.join(others)}: only {made.name} may be there. Delete the other version.")
        return made.replace(directory / made.name)


def _build(clone: Path, scratch: Path) -> Path:
    sources = scratch / "sources"  # a build in the clone would leave files there, and take those of an earlier one
    shutil.copytree(clone / "saigakit", sources / "saigakit", ignore=shutil.ignore_patterns("__pycache__"))
    project = tomllib.loads((clone / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for name in ("pyproject.toml", project["readme"], *project["license-files"]):
        shutil.copy(clone / name, sources)
    arguments = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(scratch), str(sources)]
    install.run_python(arguments, f"pip could not build the wheel of {clone}:", SOURCE_DATE_EPOCH=_OLDEST_DATE)
    return next(scratch.glob("*.whl"))


def download(directory: Path, python: str = KAGGLE_PYTHON) -> list[Path]:
    """Download the pinned wheels that `directory` lacks, for Kaggle's Linux, and return all of them."""
    for gpu in (False, True):  # llama-cpp-python has a file for each
        if lacking := [name for name, files in _fitting(directory, python, gpu).items() if not files]:
            _download(lacking, directory, python, gpu=gpu)
    found = [_fitting(directory, python, gpu) for gpu in (False, True)]
    return sorted({file for by_name in found for files in by_name.values() for file in files})


def _fitting(directory: Path, python: str, gpu: bool) -> dict[str, list[Path]]:
    wheels = list(directory.glob("*.whl"))
    found = {name: install.misfits(name, wheels, gpu=gpu, python=python) for name in install.PINS}
    return {name: [file for file, why in files.items() if not why] for name, files in found.items()}


def _download(names: Sequence[str], directory: Path, python: str, *, gpu: bool) -> None:
    with temporary_dir(directory, "wheels") as scratch:
        listed = scratch / "requirements.txt"
        listed.write_text("\n".join(install.requirement(name, [], gpu=gpu) for name in names), encoding="utf-8")
        options = ["--no-deps", "--only-binary=:all:", "--require-hashes", f"--python-version={python}"]
        options += [f"--platform={platform}" for platform in install.PLATFORMS]
        install.run_python(
            ["-m", "pip", "download", *options, f"--requirement={listed}", f"--dest={scratch}"],
            f"pip could not download all of {', '.join(names)}:",
            "Check the connection and run this again: pip keeps complete files in its cache.",
        )
        for file in scratch.glob("*.whl"):
            file.replace(directory / file.name)
