"""Install the packages that a stage needs: with pip on Kaggle; elsewhere tell the user the command."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Collection, Mapping, Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from saigakit.core import workspace
from saigakit.core.files import sha256
from saigakit.core.workspace import Gpu
from saigakit.errors import SaigaError

if TYPE_CHECKING:
    from packaging.requirements import Requirement
    from packaging.tags import Tag

# The extras of each stage; "" stands for the dependencies of saigakit itself.
STAGES: Mapping[str, tuple[str, ...]] = {
    "01_format": ("",),
    "02_train": ("", "train"),
    "03_merge_gguf": ("", "export"),
    "04_infer": ("", "train", "infer"),
}
# What may be installed on Kaggle, and nothing else.
PINS: Mapping[str, Mapping[str, Any]] = tomllib.loads(
    resources.files("saigakit.core").joinpath("pins.toml").read_text(encoding="utf-8")
)
# The Linux of Kaggle's image, and the older ones that the pinned wheels are for: pip takes each name literally.
PLATFORMS = tuple(f"manylinux{version}_x86_64" for version in ("_2_35", "_2_31", "_2_28", "_2_24", "2014"))
_THIS_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
# Also on Kaggle, in every stage: transformers reads the demo's model, smollm2_135m, from a GGUF file.
_ON_KAGGLE = ("gguf",)
# Directories from the root of the inputs to one of them, by kind; 1 in Kaggle's older layout.
_DEPTHS = {"competitions": 2, "datasets": 3, "notebooks": 3, "models": 6}
WITHOUT_AMX = "-DCMAKE_C_FLAGS=-mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-int8"
_OLDEST_TORCHAO = (0, 16)  # with an older one peft 0.19 refuses to load an adapter; Kaggle's image has 0.10.0


def prepare(stage: str) -> None:
    """Install what `stage` lacks or has too old; off Kaggle, raise SaigaError with the command to run."""
    workspace.session_start()  # max_hours counts from here
    if stage not in STAGES:
        raise SaigaError(f"stage={stage!r} is unknown; use one of {', '.join(STAGES)}.")
    on_kaggle = workspace.on_kaggle()
    lacking = missing(needs(stage, kaggle=on_kaggle))
    if lacking and not on_kaggle:
        raise SaigaError(f"{stage} needs {listed(lacking)}, not installed here. Run: {pip_command(stage)}")
    if "train" in STAGES[stage]:
        if on_kaggle and (torchao := _old_torchao()):
            print(f"Removing torchao {torchao}: peft refuses to load an adapter with a version below 0.16.", flush=True)
            _pip(["uninstall", "--yes", "torchao"], "torchao")
        require_no_old_torchao()
    if lacking:
        _install(lacking)


def require_no_old_torchao() -> None:
    if torchao := _old_torchao():
        raise SaigaError(
            f"torchao {torchao} is installed, and peft refuses to load an adapter with a version below 0.16. "
            "Run: pip uninstall torchao"
        )


def require_cuda(gpus: Sequence[Gpu]) -> None:
    """Check that torch computes on as many GPUs; in a child, because a CUDA context here would keep their memory."""
    attempt = f"[torch.ones(1, device=f'cuda:{{number}}').item() for number in range({len(gpus)})]"
    names = ", ".join(gpu.name for gpu in gpus)
    run_python(
        ["-c", f"import sys, torch\ntry: {attempt}\nexcept Exception as error: sys.exit(str(error))"],
        f"nvidia-smi lists {names}, but torch cannot compute there. On Kaggle choose the accelerator GPU T4 x2 and the "
        "latest environment, and restart the session; elsewhere install a CUDA build of torch, or set "
        "CUDA_VISIBLE_DEVICES to an empty string to use the CPU. torch said:",
    )


def needs(stage: str, *, kaggle: bool = False) -> list[str]:
    """The packages that a stage needs, without duplicates."""
    names = [name for extra in STAGES[stage] for name in packages(extra)]
    if "llama-cpp-python" in names:
        names.append("diskcache")  # llama-cpp-python imports it, and pip's --no-deps leaves it out
    return list(dict.fromkeys([*names, *(_ON_KAGGLE if kaggle else ())]))


def packages(extra: str) -> list[str]:
    """The packages of an extra according to saigakit's metadata; "" stands for those that are always needed."""
    return [
        each.name.lower()
        for each in _requirements()
        if ("extra" in str(each.marker)) == bool(extra) and (not each.marker or each.marker.evaluate({"extra": extra}))
    ]


def _requirements() -> list["Requirement"]:
    from packaging.requirements import Requirement  # not at the top: the Makefile runs this module without packages

    try:
        return [Requirement(line) for line in metadata.requires("saigakit") or []]
    except metadata.PackageNotFoundError:
        raise SaigaError(f"saigakit runs from its sources and is not installed. Run: {pip_install(())}") from None


def missing(names: Sequence[str]) -> list[str]:
    """The packages that are not installed or too old."""
    return [name for name in names if installed_version(name) is None or newer_needed(name)]


def newer_needed(name: str) -> str | None:
    """The lower bound in saigakit's metadata if the installed version is below it; upper bounds do not count."""
    from packaging.version import Version

    if (version := installed_version(name)) is None:
        return None
    bounds = [bound for each in _requirements() if each.name.lower() == name for bound in each.specifier]
    lowest = max((bound.version for bound in bounds if bound.operator == ">="), key=Version, default="0")
    # Without labels: a vendor's torch 2.10.0a0+nv25.12 counts as 2.10.
    return lowest if Version(Version(version).base_version) < Version(lowest) else None


def listed(names: Sequence[str]) -> str:
    """Packages for a message, with both versions where the installed one is too old."""
    old = {name: lowest for name in names if (lowest := newer_needed(name))}
    return ", ".join(f"{n}>={old[n]} instead of {installed_version(n)}" if n in old else n for n in names)


def pip_command(stage: str) -> str:
    """The command that installs the packages of a stage at home."""
    cmake_args = llama_cmake_args(workspace.cpu_flags(), gcc_version()) if "llama-cpp-python" in needs(stage) else ""
    compiling = f'CMAKE_ARGS="{cmake_args}" pip install --no-cache-dir' if cmake_args else "pip install"
    return pip_install(STAGES[stage]).replace("pip install", compiling, 1)


def pip_install(extras: Sequence[str]) -> str:
    """The command that installs saigakit with `extras` from where it is from, since PyPI does not have it."""
    wanted = f"[{','.join(filter(None, extras))}]" if any(extras) else ""
    place, url = origin(), _installed_from()
    if place is not None and place.is_dir():
        return f'pip install -e "{place}{wanted}"'
    if place is not None or (url.startswith("https://") and url.endswith(".whl")):
        return f'pip install "saigakit{wanted} @ {url}"'
    return f'pip install -e ".{wanted}" in a clone of saigakit, because PyPI does not have it'


def origin() -> Path | None:
    """The clone that saigakit runs from, else the clone or wheel file it was installed from; None if that is gone."""
    running, url = Path(__file__).absolute().parents[2], urlsplit(_installed_from())
    for place in (running, *([Path(unquote(url.path))] if url.scheme == "file" else [])):
        if (place / "pyproject.toml").is_file() or (place.is_file() and place.suffix == ".whl"):
            return place
    return None


def _installed_from() -> str:
    """The address that pip noted when it installed saigakit; empty if there is none."""
    notes = (found.read_text("direct_url.json") for found in metadata.distributions(name="saigakit"))
    return str(json.loads(next(notes, None) or "{}").get("url", ""))


def llama_cmake_args(cpu_flags: Collection[str], gcc: str | None) -> str:
    """CMAKE_ARGS for llama.cpp: without AMX kernels if gcc before 14 would miscompile them."""
    # Otherwise Python dies of SIGSEGV while loading a model: ggml-org/llama.cpp#20824.
    is_miscompiled = "amx_int8" in cpu_flags and gcc is not None and int(gcc.split(".")[0]) < 14
    return WITHOUT_AMX if is_miscompiled else ""


def gcc_version() -> str | None:
    """The version of the C++ compiler that CMake uses; None if it is not gcc or there is none."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    try:
        result = subprocess.run([*compiler, "-dumpfullversion"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return result.stdout.strip() if re.match(r"\d+\.", result.stdout) else None  # clang does not know this option


def own_wheels() -> list[Path]:
    """The wheels in the attached data set that saigakit's own wheel is in: those of a stranger's never count."""
    by_input: dict[Path, list[Path]] = {}
    for root in workspace.input_roots():
        for wheel in sorted(root.rglob("*.whl")):
            parts = wheel.relative_to(root).parts
            by_input.setdefault(root.joinpath(*parts[: _DEPTHS.get(parts[0], 1)]), []).append(wheel)
    own = [place for place, wheels in by_input.items() if any(file.name.startswith("saigakit-") for file in wheels)]
    installed_from = Path(unquote(urlsplit(_installed_from()).path))
    if from_here := [place for place in own if installed_from.is_relative_to(place)]:
        own = from_here
    if len(own) > 1:
        raise SaigaError(
            f"More than one attached data set holds a wheel of saigakit: {', '.join(map(str, own))}. Attach only the "
            "one whose wheel files are to be installed."
        )
    return [wheel for place in own for wheel in by_input[place]]


def requirement(name: str, fitting: Sequence[Path], *, gpu: bool) -> str:
    """A line for pip: one of the `fitting` wheels, or else the registry, and the SHA-256 of the allowed files."""
    pin = _pin(name, gpu=gpu)
    place = fitting[0].absolute().as_uri() if fitting else pin.get("url")
    source = f"{name} @ {place}" if place else f"{name}=={pin['version']}"
    return " ".join([source, *(f"--hash=sha256:{digest}" for digest in pin["sha256"])])


def misfits(name: str, wheels: Sequence[Path], *, gpu: bool, python: str = _THIS_PYTHON) -> dict[Path, str]:
    """Those of `wheels` that are of a package, and why each is not the pinned one for Kaggle; "" for one that is."""
    from packaging.tags import compatible_tags, cpython_tags

    version, interpreter = [int(number) for number in python.split(".")], "cp" + python.replace(".", "")
    tags = {*cpython_tags(version, platforms=PLATFORMS), *compatible_tags(version, interpreter, PLATFORMS)}
    own = [wheel for wheel in wheels if re.sub(r"[_.]+", "-", wheel.name.partition("-")[0]).lower() == name]
    return {wheel: _misfit(wheel, _pin(name, gpu=gpu), tags) for wheel in own}


def _pin(name: str, *, gpu: bool) -> Mapping[str, Any]:
    return {**PINS[name], **PINS[name].get("gpu" if gpu else "cpu", {})}


def _misfit(wheel: Path, pin: Mapping[str, Any], tags: set["Tag"]) -> str:
    from packaging.utils import InvalidWheelFilename, parse_wheel_filename

    try:
        _, version, _, wheel_tags = parse_wheel_filename(wheel.name)
    except InvalidWheelFilename:
        return "its name is not that of a wheel"
    if version.public != pin["version"]:
        return f"its version is {version}"
    if tags.isdisjoint(wheel_tags):
        return f"it is not for Python {_THIS_PYTHON} on Linux x86_64"
    return "" if sha256(wheel) in pin["sha256"] else "its SHA-256 is not that of the tested file"


def _install(names: Sequence[str]) -> None:
    """Install pinned wheels, all or none, and never their dependencies, which might replace what the image has."""
    replaced = [name for name in names if newer_needed(name)]
    for name in names:
        if name not in PINS or (name in replaced and not PINS[name].get("pure")):
            has = f"has {name} {installed_version(name)}, which is too old" if name in replaced else f"has no {name}"
            raise SaigaError(f"This image {has}. In the notebook's settings choose the latest environment.")
    lines, remedy = _choose(names)
    print(*(f"Installing {line.partition(' --hash')[0]} …" for line in lines), sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "requirements.txt"
        file.write_text("\n".join(lines), encoding="utf-8")
        options = ["--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes", "--requirement", str(file)]
        _pip(["install", *options], ", ".join(names), remedy)
    importlib.invalidate_caches()
    if absent := missing(names):
        raise SaigaError(f"pip reported success, but {', '.join(absent)} cannot be found. Restart the session.")
    modules = {name: PINS[name].get("module", name) for name in names}
    for module in modules.values():  # in a child process: a broken wheel should fail here, before a model is loaded
        run_python(["-c", f"import {module}"], f"{module} was installed but cannot be imported:")
    if stale := [name for name in replaced if modules[name] in sys.modules]:
        raise SaigaError(
            f"{', '.join(stale)} was too old and has been replaced, but this session runs the old version. Restart it "
            "and run the notebook again, or choose the latest environment in the notebook's settings."
        )


def _choose(names: Sequence[str]) -> tuple[list[str], str]:
    """The requirements for pip, and what to do if it cannot install them."""
    attached, gpu = own_wheels(), bool(workspace.gpus())
    lines, lacking, sources = [], "", [f"--platform {platform}" for platform in PLATFORMS]
    for name in names:
        found, pin = misfits(name, attached, gpu=gpu), _pin(name, gpu=gpu)
        fitting = [wheel for wheel, why in found.items() if not why]
        lines.append(requirement(name, fitting, gpu=gpu))
        if not fitting:
            unfit = [f"{wheel}: {why}" for wheel, why in found.items()]
            print(*(f"Not using {each}.\n" for each in unfit), sep="", end="", flush=True)
            lacking += f"{name} {pin['version']}: {'; '.join(unfit) or 'not attached'}\n"
            sources.append(pin.get("url", f"{name}=={pin['version']}"))
    remedy = (
        f"These packages are missing:\n{lacking}Switch Internet on in the notebook's settings. Or put fitting wheels "
        "into the data set that holds saigakit's own: at home `saigakit wheels DIRECTORY` builds this set, or\n"
        f"pip download --no-deps --only-binary=:all: --python-version {_THIS_PYTHON} {' '.join(sources)}"
    )
    return lines, remedy if lacking else ""


def installed_version(name: str) -> str | None:
    return next((found.version for found in metadata.distributions(name=name)), None)


def _old_torchao() -> str | None:
    """The version of an installed torchao that is too old for peft."""
    version = installed_version("torchao")
    numbers = re.match(r"(\d+)\.(\d+)", version or "")
    return version if numbers and (int(numbers[1]), int(numbers[2])) < _OLDEST_TORCHAO else None


def _pip(arguments: Sequence[str], what: str, remedy: str = "") -> None:
    run_python(["-m", "pip", *arguments], f"pip could not {arguments[0]} {what}. It said:", remedy)


def run_python(arguments: Sequence[str], failure: str, remedy: str = "", **environment: str) -> None:
    """Run Python in a child process; if it fails, raise SaigaError with its last lines between these two texts."""
    command, inherited = [sys.executable, *arguments], workspace.child_environment() | environment
    result = subprocess.run(command, stderr=subprocess.PIPE, encoding="utf-8", env=inherited, check=False)
    if result.returncode != 0:
        said = re.sub(r"^Traceback .*\n(?: .*\n)*", "", result.stderr, flags=re.MULTILINE)
        last_lines = "\n".join(said.strip().splitlines()[-15:])
        raise SaigaError("\n".join(filter(None, [failure, last_lines, remedy])))


if __name__ == "__main__":  # for the Makefile
    print(llama_cmake_args(workspace.cpu_flags(), gcc_version()))
