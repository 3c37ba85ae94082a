"""Packages that a stage lacks: chosen by plain functions, installed by the real pip into a temporary environment."""

import ast
import json
import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import import_graph
import pip
import pytest
from packaging.requirements import Requirement

from saigakit.core import install
from saigakit.errors import SaigaError

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def declared(extra: str) -> dict[str, Requirement]:
    lines = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    return {requirement.name: requirement for requirement in map(Requirement, lines)}


EXTRAS = sorted({extra for extras in install.STAGES.values() for extra in extras})


def test_the_packages_of_an_extra_are_read_from_the_metadata(monkeypatch):
    lines = [
        "click>=8.1",
        "Tokenizers<0.24,>=0.22",
        'llama-cpp-python[server]<0.4,>=0.3.35; extra == "infer"',
        "torch; python_version >= '3.11' and extra == 'train'",
        'saigakit[infer,train]; extra == "all"',
    ]
    monkeypatch.setattr(install.metadata, "requires", {"saigakit": lines}.get)
    assert install.packages("") == ["click", "tokenizers"]
    assert install.packages("infer") == ["llama-cpp-python"]
    assert install.packages("train") == ["torch"]
    assert install.needs("04_infer") == ["click", "tokenizers", "torch", "llama-cpp-python", "diskcache"]


def test_every_extra_of_a_stage_is_in_the_metadata_and_in_pyproject():
    assert all(install.packages(extra) and declared(extra) for extra in EXTRAS)


def test_running_from_sources_is_refused_with_the_command(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(install.metadata, "requires", absent)
    with pytest.raises(SaigaError, match=r"not installed\. Run: pip install -e \."):
        install.packages("")


@pytest.mark.parametrize("name", install.PINS)
def test_pyproject_allows_every_pinned_version(name):
    requirements = [declared(extra)[name] for extra in EXTRAS if name in declared(extra)]
    assert requirements
    assert all(requirement.specifier.contains(install.PINS[name][0]) for requirement in requirements)


def test_every_stage_on_kaggle_can_read_the_model_of_the_demo():
    assert all("gguf" in install.needs(stage, kaggle=True) for stage in install.STAGES)
    assert "gguf" not in install.needs("01_format", kaggle=False)


# Imports that a stage contains but never executes: Kaggle's own module, the conversion of the demo's model, and the
# tokenizer of a GGUF before there is one.
NOT_REACHED = {
    "saigakit.core.workspace": {"kaggle_secrets"},
    "saigakit.demo.packages": {"torch", "transformers"},
    "saigakit.demo.tiny_model": {"torch", "safetensors"},
    "saigakit.prompt.encoding": {"llama_cpp"},
    "saigakit.prompt.backends": {"llama_cpp"},
    "saigakit.weights.adapter": {"peft"},  # only if it is installed
}


@pytest.mark.parametrize("stage", install.STAGES)
def test_the_packages_of_a_stage_cover_the_imports_of_its_notebook(stage):
    cells = json.loads((ROOT / "notebooks" / f"{stage}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    modules, reached = {import_graph.name_of(file): file for file in import_graph.FILES}, set()
    further = import_graph.imported_by(ast.parse(code))
    while further:
        reached |= further
        further = set().union(*(import_graph.imported(modules[name]) for name in further & {*modules})) - reached
    needed, found = set(install.needs(stage, kaggle=False)), metadata.packages_distributions()
    for name in reached & {*modules}:
        packages = import_graph.packages(modules[name]) - NOT_REACHED.get(name, set())
        lacking = {each for each in packages if not needed & {one.lower().replace("_", "-") for one in found[each]}}
        assert not lacking, f"{name} imports {lacking}"


def test_no_package_is_listed_twice():
    for stage in install.STAGES:
        names = install.needs(stage, kaggle=True)
        assert len(names) == len(set(names))


def test_bitsandbytes_is_pinned_and_installed_without_dependencies():
    arguments = install.pip_arguments("bitsandbytes", [], gpu=True)
    assert arguments == ["install", "--quiet", "--no-deps", "--only-binary=:all:", "bitsandbytes==0.50.2"]


@pytest.mark.parametrize(("gpu", "index"), [(True, "cu125"), (False, "cpu")])
def test_llama_cpp_is_installed_from_the_index_for_cpu_or_gpu(gpu, index):
    arguments = install.pip_arguments("llama-cpp-python", [], gpu=gpu)
    place = arguments[arguments.index("--index-url") + 1]
    assert place == f"https://abetlen.github.io/llama-cpp-python/whl/{index}"
    assert arguments[-1] == "llama-cpp-python==0.3.35"
    assert "--only-binary=:all:" in arguments


def test_attached_wheels_are_used_without_the_registry():
    wheels = [
        Path("/kaggle/input/datasets/me/wheels/llama_cpp_python-0.3.35-py3-none-manylinux_2_35_x86_64.whl"),
        Path("/kaggle/input/b/gguf-0.19.0-py3-none-any.whl"),
    ]
    arguments = install.pip_arguments("llama-cpp-python", wheels, gpu=True)
    assert arguments[4:] == [
        "--no-index",
        "--find-links",
        "/kaggle/input/datasets/me/wheels",
        "llama-cpp-python==0.3.35",
    ]


def test_an_attached_wheel_of_another_version_is_not_used():
    arguments = install.pip_arguments("gguf", [Path("/in/gguf-0.17.1-py3-none-any.whl")], gpu=False)
    assert "--no-index" not in arguments
    assert arguments[-1] == "gguf==0.19.0"


def test_a_local_version_label_of_an_attached_wheel_does_not_matter():
    arguments = install.pip_arguments(
        "bitsandbytes", [Path("/in/bitsandbytes-0.50.2+cu128-py3-none-any.whl")], gpu=True
    )
    assert arguments[4:7] == ["--no-index", "--find-links", "/in"]


@pytest.mark.parametrize(
    ("stage", "command"),
    [
        ("01_format", "pip install saigakit"),
        ("02_train", 'pip install "saigakit[train]"'),
        ("03_merge_gguf", 'pip install "saigakit[export]"'),
        ("04_infer", 'pip install "saigakit[train,infer]"'),
    ],
)
def test_at_home_the_command_names_the_extras(stage, command, monkeypatch):
    monkeypatch.setattr(install, "gcc_version", lambda: None)
    assert install.pip_command(stage) == command
    extras = command.partition("[")[2].rstrip(']"')
    assert set(filter(None, extras.split(","))) <= set(PROJECT["optional-dependencies"])


@pytest.mark.parametrize(
    ("flags", "gcc", "args"),
    [
        ({"avx2", "amx_int8"}, "12.2.0", install.WITHOUT_AMX),
        ({"avx2", "amx_int8"}, "13.3.0", install.WITHOUT_AMX),
        ({"avx2", "amx_int8"}, "14.1.0", ""),
        ({"avx2", "amx_int8"}, None, ""),  # clang
        ({"avx2"}, "12.2.0", ""),
        (set(), "9.4.0", ""),  # not Linux
    ],
)
def test_llama_cpp_is_compiled_without_amx_if_gcc_would_miscompile_it(flags, gcc, args):
    assert install.llama_cmake_args(flags, gcc) == args


def test_at_home_the_command_compiles_llama_cpp_again_on_such_a_machine(monkeypatch):
    monkeypatch.setattr(install.workspace, "cpu_flags", lambda: {"amx_int8"})
    monkeypatch.setattr(install, "gcc_version", lambda: "12.2.0")
    assert install.pip_command("02_train") == 'pip install "saigakit[train]"'
    infer = f'CMAKE_ARGS="{install.WITHOUT_AMX}" pip install --no-cache-dir "saigakit[train,infer]"'
    assert install.pip_command("04_infer") == infer


@pytest.mark.parametrize(
    ("script", "version"),
    [
        ('[ "$1" = -dumpfullversion ] && echo 12.2.0', "12.2.0"),
        ("echo \"clang: error: unknown argument: '$1'\" >&2; exit 1", None),
    ],
)
def test_the_gcc_version_is_that_of_the_compiler_of_cmake(script, version, tmp_path, monkeypatch):
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert install.gcc_version() == version


def test_without_a_compiler_there_is_no_gcc_version(monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert install.gcc_version() is None


def test_the_installed_llama_cpp_has_no_crashing_amx_kernels():
    """With them, llama_cpp.Llama died of SIGSEGV on a CPU with AMX."""
    import llama_cpp

    if not install.llama_cmake_args(install.workspace.cpu_flags(), install.gcc_version()):
        pytest.skip("this CPU has no AMX, or its compiler builds the kernels correctly")
    assert b"AMX_INT8 = 1" not in llama_cpp.llama_print_system_info()


def test_an_unknown_stage_is_refused_with_all_stage_names():
    with pytest.raises(SaigaError, match=r"02_trian.*02_train"):
        install.prepare("02_trian")


@pytest.fixture
def machine(tmp_path) -> Path:
    """The interpreter of a fresh environment that has only pip."""
    venv.create(tmp_path / "python", symlinks=True)
    packages = Path(
        subprocess.check_output(
            [tmp_path / "python" / "bin" / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            text=True,
        ).strip()
    )
    (packages / "pip").symlink_to(Path(pip.__file__).parent, target_is_directory=True)
    return tmp_path / "python" / "bin" / "python"


def wheel(directory: Path, name: str, version: str, *, requires: str = "", source: str = "") -> Path:
    """A real wheel with one module."""
    directory.mkdir(parents=True, exist_ok=True)
    module = {"llama-cpp-python": "llama_cpp"}.get(name, name.replace("-", "_"))
    escaped = name.replace("-", "_")
    info = f"{escaped}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    files = {
        f"{module}/__init__.py": source,
        f"{info}/METADATA": metadata + (f"Requires-Dist: {requires}\n" if requires else ""),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    made = directory / f"{escaped}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(made, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
    return made


def install_wheels(machine: Path, *wheels: Path) -> None:
    subprocess.run([machine, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", *wheels], check=True)


def installed(machine: Path) -> dict[str, str]:
    rows = json.loads(subprocess.check_output([machine, "-m", "pip", "list", "--format", "json"], text=True))
    return {row["name"]: row["version"] for row in rows if row["name"] != "pip"}


def prepare(
    machine: Path, stage: str, *, inputs: Path, kaggle: bool = True, extras: Mapping[str, list[str]], **table
) -> subprocess.CompletedProcess:
    """Run prepare(stage) in that environment, without a registry and with only the packages of `extras`.

    `table` replaces attributes of the module.
    """
    code = "import sys, json; from saigakit.core import install\n"
    code += "for name, value in json.loads(sys.argv[2]).items(): setattr(install, name, value)\n"
    code += "install.metadata.requires = lambda _: json.loads(sys.argv[3])\n"
    code += "install.prepare(sys.argv[1])"
    requirements = [f'{name}; extra == "{extra}"' for extra, names in extras.items() for name in names]
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "PIP_NO_INDEX": "1",
        "SAIGAKIT_INPUT_ROOT": str(inputs),
        **({"KAGGLE_KERNEL_RUN_TYPE": "Batch"} if kaggle else {}),
    }
    return subprocess.run(
        [machine, "-c", code, stage, json.dumps(table), json.dumps(requirements)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_on_kaggle_missing_packages_come_from_attached_wheels_and_torch_stays(machine, tmp_path):
    """The wheel requires another torch, which is attached too: a plain `pip install` would replace torch."""
    install_wheels(machine, wheel(tmp_path / "image", "torch", "2.10.0"))
    wheel(tmp_path / "input" / "wheels", "bitsandbytes", "0.50.2", requires="torch>=3")
    wheel(tmp_path / "input" / "wheels", "torch", "3.0")
    result = prepare(
        machine,
        "02_train",
        inputs=tmp_path / "input",
        extras={"train": ["torch", "bitsandbytes"]},
        _ON_KAGGLE=[],
    )
    assert result.returncode == 0, result.stderr
    assert installed(machine) == {"bitsandbytes": "0.50.2", "torch": "2.10.0"}
    assert result.stdout == f"Installing bitsandbytes==0.50.2 from {tmp_path / 'input' / 'wheels'} …\n"


def test_on_kaggle_pip_is_not_called_when_nothing_is_missing(machine, tmp_path):
    install_wheels(machine, wheel(tmp_path / "image", "gguf", "0.17.0"))
    result = prepare(machine, "01_format", inputs=tmp_path / "input", extras={})
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert installed(machine) == {"gguf": "0.17.0"}


def test_an_old_torchao_is_removed_and_reported_in_stages_with_peft(machine, tmp_path):
    install_wheels(machine, wheel(tmp_path / "image", "torchao", "0.10.0"))
    empty = {"extras": {}, "_ON_KAGGLE": []}
    for stage in ("01_format", "03_merge_gguf"):
        assert prepare(machine, stage, inputs=tmp_path / "input", **empty).stdout == ""
    assert installed(machine) == {"torchao": "0.10.0"}
    assert prepare(machine, "04_infer", inputs=tmp_path / "input", **empty).stdout.startswith("Removing torchao 0.10.0")
    assert installed(machine) == {}


def test_a_torchao_that_peft_accepts_stays(machine, tmp_path):
    install_wheels(machine, wheel(tmp_path / "image", "torchao", "0.16.0"))
    result = prepare(machine, "02_train", inputs=tmp_path / "input", extras={}, _ON_KAGGLE=[])
    assert (result.returncode, result.stdout) == (0, "")
    assert installed(machine) == {"torchao": "0.16.0"}


def test_a_failure_of_pip_is_reported_with_a_remedy_and_its_last_lines(machine, tmp_path):
    result = prepare(machine, "01_format", inputs=tmp_path / "input", extras={})
    last = result.stderr.partition("SaigaError: ")[2]
    assert last.startswith("pip could not install gguf==0.19.0. In the notebook's settings switch Internet on")
    assert "No matching distribution found for gguf==0.19.0" in last


def test_a_wheel_that_cannot_be_imported_is_refused(machine, tmp_path):
    wheel(tmp_path / "input", "llama-cpp-python", "0.3.35", source="raise OSError('libcudart.so.12')")
    wheel(tmp_path / "input", "diskcache", "5.6.3")
    result = prepare(
        machine,
        "04_infer",
        inputs=tmp_path / "input",
        _ON_KAGGLE=[],
        extras={"infer": ["llama-cpp-python"]},
    )
    assert "llama_cpp was installed but cannot be imported" in result.stderr
    assert "libcudart.so.12" in result.stderr


def test_an_image_without_torch_is_refused_before_anything_is_installed(machine, tmp_path):
    wheel(tmp_path / "input", "bitsandbytes", "0.50.2")
    result = prepare(machine, "02_train", inputs=tmp_path / "input", extras={"train": ["bitsandbytes", "torch"]})
    assert "This image has no torch" in result.stderr
    assert installed(machine) == {}


def test_at_home_nothing_is_installed_and_the_command_is_reported(machine, tmp_path):
    wheel(tmp_path / "input", "bitsandbytes", "0.50.2")
    table = {"extras": {"train": ["bitsandbytes"]}}
    result = prepare(machine, "02_train", inputs=tmp_path / "input", kaggle=False, **table)
    assert result.stderr.endswith(
        'SaigaError: 02_train needs bitsandbytes, not installed here. Run: pip install "saigakit[train]"\n'
    )
    assert installed(machine) == {}


def test_at_home_an_old_torchao_is_reported_and_left_alone(machine, tmp_path):
    install_wheels(machine, wheel(tmp_path / "image", "torchao", "0.10.0"))
    result = prepare(machine, "02_train", inputs=tmp_path / "input", kaggle=False, extras={})
    assert "Run: pip uninstall torchao" in result.stderr
    assert installed(machine) == {"torchao": "0.10.0"}


def test_this_environment_has_the_packages_of_every_stage():
    code = "from saigakit.core import install\nfor stage in install.STAGES: install.prepare(stage)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KAGGLE")}
    result = subprocess.run([sys.executable, "-c", code], env=environment | {"PYTHONPATH": str(ROOT)}, check=False)
    assert result.returncode == 0
