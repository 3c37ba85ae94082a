"""What a stage needs and the machine lacks, into installed packages: on Kaggle by pip, elsewhere into a sentence."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from importlib import metadata
from itertools import pairwise
from pathlib import Path

from saigakit.core import workspace
from saigakit.errors import SaigaError

# The extras of each stage; "" is what saigakit itself depends on.
STAGES: Mapping[str, tuple[str, ...]] = {
    "01_format": ("",),
    "02_train": ("", "train"),
    "03_merge_gguf": ("", "export"),
    "04_infer": ("", "train", "infer"),
}
# What Kaggle's image lacks, at the version that was tried beside its torch 2.10, and the module that must import.
PINS: Mapping[str, tuple[str, str]] = {
    "bitsandbytes": ("0.50.2", "bitsandbytes"),
    "gguf": ("0.19.0", "gguf"),
    "llama-cpp-python": ("0.3.35", "llama_cpp"),
    "rensa": ("0.5.0", "rensa"),
}
# llama-cpp-python imports it, and pip's --no-deps leaves it out.
_ALSO: Mapping[str, tuple[str, ...]] = {"llama-cpp-python": ("diskcache",)}
# Also on Kaggle, in every stage: transformers reads the demo's model, smollm2_135m, from a GGUF file.
_ON_KAGGLE = ("gguf",)
# Wheels of llama-cpp-python; there is none for the image's CUDA 12.8, and one for 12.5 runs on it.
_LLAMA_INDEX = "https://abetlen.github.io/llama-cpp-python/whl"
WITHOUT_AMX = "-DCMAKE_C_FLAGS=-mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-int8"
_FIRST_GOOD_GCC = 14
_REQUIREMENT = re.compile(r"""([\w.-]+)[^;]*(?:;.*\bextra == ["']([\w-]+)["'])?""")
_OLDEST_TORCHAO = (0, 16)  # peft 0.19 refuses a plain Linear beside an older one; the image has 0.10.0


def prepare(stage: str) -> None:
    """Makes sure that `stage` finds its packages; nothing that is installed is replaced.

    Raises SaigaError with pip's last lines where that fails, and off Kaggle with the command that installs.
    """
    workspace.session_start()  # max_hours counts from here
    if stage not in STAGES:
        raise SaigaError(f"stage={stage!r} is unknown; use one of {', '.join(STAGES)}.")
    lacking = missing(needs(stage, kaggle=workspace.on_kaggle()))
    if not workspace.on_kaggle():
        _refuse(stage, lacking)
        return
    if "train" in STAGES[stage] and (torchao := _old_torchao()):
        print(f"Removing torchao {torchao}: peft refuses to load an adapter beside a version below 0.16.", flush=True)
        _pip(["uninstall", "--yes", "torchao"])
        if _old_torchao():
            raise SaigaError(f"pip could not remove torchao {torchao}. Choose another environment in the settings.")
    if lacking:
        _install(lacking)


def require_no_old_torchao() -> None:
    """Raises SaigaError with the command that mends it where peft would refuse the torchao that is installed."""
    if torchao := _old_torchao():
        raise SaigaError(
            f"torchao {torchao} is installed, and peft refuses to load an adapter beside a version below 0.16. "
            "Run: pip uninstall torchao"
        )


def needs(stage: str, *, kaggle: bool = False) -> list[str]:
    """The packages of a stage, each once."""
    names = [name for extra in STAGES[stage] for name in packages(extra)]
    complete = [each for name in names for each in (name, *_ALSO.get(name, ()))]
    return list(dict.fromkeys([*complete, *(_ON_KAGGLE if kaggle else ())]))


def packages(extra: str) -> list[str]:
    """Names that the metadata of saigakit lists for an extra; for "" those that it always needs."""
    try:
        requirements = metadata.requires("saigakit") or []
    except metadata.PackageNotFoundError:
        raise SaigaError("saigakit is imported from its sources and not installed. Run: pip install -e .") from None
    found = [match for each in requirements if (match := _REQUIREMENT.match(each))]
    return [match[1].lower() for match in found if (match[2] or "") == extra]


def missing(names: Sequence[str]) -> list[str]:
    return [name for name in names if _version(name) is None]


def command(stage: str) -> str:
    """What a user types at home to get the packages of a stage."""
    extras = ",".join(extra for extra in STAGES[stage] if extra)
    if not extras:
        return "pip install saigakit"
    cmake_args = llama_cmake_args(workspace.cpu_flags(), gcc_version()) if "llama-cpp-python" in needs(stage) else ""
    how = f'CMAKE_ARGS="{cmake_args}" pip install --no-cache-dir' if cmake_args else "pip install"
    return f'{how} "saigakit[{extras}]"'


def llama_cmake_args(cpu_flags: Collection[str], gcc: str | None) -> str:
    """CMAKE_ARGS to compile llama.cpp with: without its AMX kernels where gcc before 14 would miscompile them.

    Python then dies of SIGSEGV while it loads a model: ggml-org/llama.cpp#20824.
    """
    if "amx_int8" not in cpu_flags or gcc is None or int(gcc.split(".")[0]) >= _FIRST_GOOD_GCC:
        return ""
    return WITHOUT_AMX


def gcc_version() -> str | None:
    """Of the C++ compiler that CMake takes; None where that is not gcc, or there is none."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    try:
        result = subprocess.run([*compiler, "-dumpfullversion"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return result.stdout.strip() if re.match(r"\d+\.", result.stdout) else None  # clang does not know this option


def pip_arguments(name: str, wheels: Sequence[Path], *, gpu: bool) -> list[str]:
    """How pip installs one package: from the directories that hold its wheel, else from the registry.

    Never with dependencies, which might replace what the image has; never by compiling.
    """
    requirement = f"{name}=={PINS[name][0]}" if name in PINS else name
    places = sorted({str(wheel.parent) for wheel in wheels if _is_wheel_of(wheel, name)})
    source: list[str] = []
    if places:
        source = ["--no-index", *(part for place in places for part in ("--find-links", place))]
    elif name == "llama-cpp-python":
        source = ["--index-url", f"{_LLAMA_INDEX}/{'cu125' if gpu else 'cpu'}"]
    return ["install", "--quiet", "--no-deps", "--only-binary=:all:", *source, requirement]


def _install(names: Sequence[str]) -> None:
    if "torch" in names:
        raise SaigaError("This image has no torch. In the notebook's settings choose the latest environment.")
    torch_before = _version("torch")
    wheels = [wheel for root in workspace.input_roots() for wheel in sorted(root.rglob("*.whl"))]
    gpu = bool(workspace.gpus())
    for name in names:
        arguments = pip_arguments(name, wheels, gpu=gpu)
        print(f"Installing {arguments[-1]} {_origin(arguments)} …", flush=True)
        _pip(arguments)
    importlib.invalidate_caches()
    if absent := missing(names):
        raise SaigaError(f"pip reported success, and {', '.join(absent)} cannot be found. Restart the session.")
    if (torch_after := _version("torch")) != torch_before:
        raise SaigaError(
            f"Installing {', '.join(names)} changed torch from {torch_before} to {torch_after}: restart the session."
        )
    _require_imports([PINS[name][1] for name in names if name in PINS])


def _refuse(stage: str, lacking: Sequence[str]) -> None:
    if lacking:
        raise SaigaError(f"{stage} needs {', '.join(lacking)}, not installed here. Run: {command(stage)}")
    if "train" in STAGES[stage]:
        require_no_old_torchao()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _old_torchao() -> str | None:
    """The version of a torchao that is too old for peft; None where there is none or it is new enough."""
    version = _version("torchao")
    numbers = re.match(r"(\d+)\.(\d+)", version or "")
    if numbers is None or (int(numbers[1]), int(numbers[2])) >= _OLDEST_TORCHAO:
        return None
    return version


def _is_wheel_of(wheel: Path, name: str) -> bool:
    """Whether a wheel's file name says this package, and its pinned version where it has one."""
    parts = re.match(r"([^-]+)-([^-+]+)", wheel.name)
    if parts is None or re.sub(r"[-_.]+", "-", parts[1]).lower() != name:
        return False
    return name not in PINS or parts[2] == PINS[name][0]


def _origin(arguments: Sequence[str]) -> str:
    places = [place for option, place in pairwise(arguments) if option == "--find-links"]
    return f"from {', '.join(places)}" if places else "from the registry"


def _pip(arguments: Sequence[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, encoding="utf-8", check=False
    )
    if result.returncode != 0:
        raise SaigaError(
            f"pip could not {arguments[0]} {arguments[-1]}. In the notebook's settings switch Internet on, "
            f"or attach a data set that holds its wheel. pip said:\n{_last_lines(result.stderr)}"
        )


def _require_imports(modules: Sequence[str]) -> None:
    """Tried in a child process: what a broken wheel breaks should break here, before a model is loaded."""
    for module in modules:
        result = subprocess.run(
            [sys.executable, "-c", f"import {module}"], capture_output=True, text=True, encoding="utf-8", check=False
        )
        if result.returncode != 0:
            raise SaigaError(f"{module} was installed and cannot be imported:\n{_last_lines(result.stderr)}")


def _last_lines(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-5:])


if __name__ == "__main__":  # for the Makefile
    print(llama_cmake_args(workspace.cpu_flags(), gcc_version()))
