"""Install the packages that a stage needs: with pip on Kaggle; elsewhere tell the user the command."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from saigakit.core import workspace
from saigakit.errors import SaigaError

# The extras of each stage; "" stands for the dependencies of saigakit itself.
STAGES: Mapping[str, tuple[str, ...]] = {
    "01_format": ("",),
    "02_train": ("", "train"),
    "03_merge_gguf": ("", "export"),
    "04_infer": ("", "train", "infer"),
}
# What Kaggle's image lacks: the version that was tested with its torch 2.10, and the module to import.
PINS: Mapping[str, tuple[str, str]] = {
    "bitsandbytes": ("0.50.2", "bitsandbytes"),
    "gguf": ("0.19.0", "gguf"),
    "llama-cpp-python": ("0.3.35", "llama_cpp"),
    "rensa": ("0.5.0", "rensa"),
}
# Also on Kaggle, in every stage: transformers reads the demo's model, smollm2_135m, from a GGUF file.
_ON_KAGGLE = ("gguf",)
# Wheels of llama-cpp-python. There are none for CUDA 12.8, which the image has, but those for 12.5 run on it.
_LLAMA_INDEX = "https://abetlen.github.io/llama-cpp-python/whl"
WITHOUT_AMX = "-DCMAKE_C_FLAGS=-mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-int8"
_REQUIREMENT = re.compile(r"""([\w.-]+)[^;]*(?:;.*\bextra == ["']([\w-]+)["'])?""")
_OLDEST_TORCHAO = (0, 16)  # with an older one peft 0.19 refuses to load an adapter; Kaggle's image has 0.10.0


def prepare(stage: str) -> None:
    """Install what `stage` lacks, and replace nothing; off Kaggle, raise SaigaError with the command to run."""
    workspace.session_start()  # max_hours counts from here
    if stage not in STAGES:
        raise SaigaError(f"stage={stage!r} is unknown; use one of {', '.join(STAGES)}.")
    on_kaggle = workspace.on_kaggle()
    lacking = missing(needs(stage, kaggle=on_kaggle))
    if lacking and not on_kaggle:
        raise SaigaError(f"{stage} needs {', '.join(lacking)}, not installed here. Run: {pip_command(stage)}")
    if "train" in STAGES[stage]:
        if on_kaggle and (torchao := _old_torchao()):
            print(f"Removing torchao {torchao}: peft refuses to load an adapter with a version below 0.16.", flush=True)
            _pip(["uninstall", "--yes", "torchao"])
        require_no_old_torchao()
    if lacking:
        _install(lacking)


def require_no_old_torchao() -> None:
    if torchao := _old_torchao():
        raise SaigaError(
            f"torchao {torchao} is installed, and peft refuses to load an adapter with a version below 0.16. "
            "Run: pip uninstall torchao"
        )


def needs(stage: str, *, kaggle: bool = False) -> list[str]:
    """The packages that a stage needs, without duplicates."""
    names = [name for extra in STAGES[stage] for name in packages(extra)]
    if "llama-cpp-python" in names:
        names.append("diskcache")  # llama-cpp-python imports it, and pip's --no-deps leaves it out
    return list(dict.fromkeys([*names, *(_ON_KAGGLE if kaggle else ())]))


def packages(extra: str) -> list[str]:
    """The packages of an extra according to saigakit's metadata; "" stands for those that are always needed."""
    try:
        requirements = metadata.requires("saigakit") or []
    except metadata.PackageNotFoundError:
        raise SaigaError("saigakit runs from its sources and is not installed. Run: pip install -e .") from None
    found = [match for each in requirements if (match := _REQUIREMENT.match(each))]
    return [match[1].lower() for match in found if (match[2] or "") == extra]


def missing(names: Sequence[str]) -> list[str]:
    return [name for name in names if installed_version(name) is None]


def pip_command(stage: str) -> str:
    """The command that installs the packages of a stage at home."""
    extras = ",".join(extra for extra in STAGES[stage] if extra)
    if not extras:
        return "pip install saigakit"
    cmake_args = llama_cmake_args(workspace.cpu_flags(), gcc_version()) if "llama-cpp-python" in needs(stage) else ""
    pip_install = f'CMAKE_ARGS="{cmake_args}" pip install --no-cache-dir' if cmake_args else "pip install"
    return f'{pip_install} "saigakit[{extras}]"'


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


def pip_arguments(name: str, wheels: Sequence[Path], *, gpu: bool) -> list[str]:
    """Arguments that install a package from an attached wheel, or else from the registry.

    Never with dependencies, which might replace what the image has, and never by compiling.
    """
    source: list[str] = []
    if places := _places_of_wheels(name, wheels):
        source = ["--no-index", *(part for place in places for part in ("--find-links", place))]
    elif name == "llama-cpp-python":
        source = ["--index-url", f"{_LLAMA_INDEX}/{'cu125' if gpu else 'cpu'}"]
    requirement = f"{name}=={PINS[name][0]}" if name in PINS else name
    return ["install", "--quiet", "--no-deps", "--only-binary=:all:", *source, requirement]


def _places_of_wheels(name: str, wheels: Sequence[Path]) -> list[str]:
    """Directories with a wheel of this package, in its pinned version if it has one."""
    version = PINS[name][0] if name in PINS else None
    places = set()
    for wheel in wheels:
        distribution, _, rest = wheel.name.partition("-")
        if re.sub(r"[_.]+", "-", distribution).lower() == name and version in (None, re.split("[-+]", rest)[0]):
            places.add(str(wheel.parent))
    return sorted(places)


def _install(names: Sequence[str]) -> None:
    if "torch" in names:
        raise SaigaError("This image has no torch. In the notebook's settings choose the latest environment.")
    wheels = [wheel for root in workspace.input_roots() for wheel in sorted(root.rglob("*.whl"))]
    gpu = bool(workspace.gpus())
    for name in names:
        arguments = pip_arguments(name, wheels, gpu=gpu)
        origin = ", ".join(_places_of_wheels(name, wheels)) or "the registry"
        print(f"Installing {arguments[-1]} from {origin} …", flush=True)
        _pip(arguments)
    importlib.invalidate_caches()
    if absent := missing(names):
        raise SaigaError(f"pip reported success, but {', '.join(absent)} cannot be found. Restart the session.")
    # In a child process: a broken wheel should fail here, before a model is loaded.
    for module in [PINS[name][1] for name in names if name in PINS]:
        _run_python(["-c", f"import {module}"], f"{module} was installed but cannot be imported:")


def installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _old_torchao() -> str | None:
    """The version of an installed torchao that is too old for peft."""
    version = installed_version("torchao")
    numbers = re.match(r"(\d+)\.(\d+)", version or "")
    return version if numbers and (int(numbers[1]), int(numbers[2])) < _OLDEST_TORCHAO else None


def _pip(arguments: Sequence[str]) -> None:
    _run_python(
        ["-m", "pip", *arguments],
        f"pip could not {arguments[0]} {arguments[-1]}. In the notebook's settings switch Internet on, "
        "or attach a data set with its wheel. pip said:",
    )


def _run_python(arguments: Sequence[str], failure: str) -> None:
    """Run Python in a child process; if it fails, raise SaigaError with `failure` and its last lines."""
    command = [sys.executable, *arguments]
    environment = workspace.child_environment()
    result = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, check=False)
    if result.returncode != 0:
        last_lines = "\n".join(result.stderr.strip().splitlines()[-5:])
        raise SaigaError(f"{failure}\n{last_lines}")


if __name__ == "__main__":  # for the Makefile
    print(llama_cmake_args(workspace.cpu_flags(), gcc_version()))
