"""Packages that a stage lacks: chosen by plain functions, installed by the real pip into a temporary environment."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata

import import_graph
import pytest
from packaging.requirements import Requirement
from small_wheels import ROOT, install_saigakit, installed, pin, prepare, pretend_installed, unpack, wheel

from saigakit.core import install
from saigakit.errors import SaigaError

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
    with pytest.raises(SaigaError, match=re.escape(f'not installed. Run: pip install -e "{ROOT}"')):
        install.packages("")


@pytest.mark.parametrize("name", install.PINS)
def test_pyproject_allows_every_pinned_version(name):
    requirements = [declared(extra)[name] for extra in EXTRAS if name in declared(extra)]
    assert requirements or name == "diskcache"
    assert all(requirement.specifier.contains(install.PINS[name]["version"]) for requirement in requirements)


def kaggles_versions():
    """By package: what `make test-kaggle` installs."""
    lines = (ROOT / "tests" / "support" / "kaggle-constraints.txt").read_text(encoding="utf-8").splitlines()
    return {each.name: each.specifier for each in map(Requirement, filter(re.compile(r"\w").match, lines))}


@pytest.mark.parametrize("name", install.PINS)
def test_the_suite_for_kaggle_runs_on_every_pinned_version(name):
    assert str(kaggles_versions()[name]) == f"=={install.PINS[name]['version']}"


@pytest.mark.parametrize("extra", ["", *EXTRAS])
def test_pyproject_allows_the_versions_of_kaggles_image(extra):
    image = kaggles_versions()
    versions = {name: str(image[name]).removeprefix("==") for name in declared(extra) if name in image}
    assert versions
    assert [name for name, version in versions.items() if not declared(extra)[name].specifier.contains(version)] == []


def test_llama_cpp_python_is_the_pinned_version_or_a_later_one_everywhere():
    pinned = install.PINS["llama-cpp-python"]
    lowest = {str(declared(extra)["llama-cpp-python"].specifier) for extra in ("export", "infer")}
    assert lowest == {f"<0.4,>={pinned['version']}"}
    assert str(kaggles_versions()["llama-cpp-python"]) == f"=={pinned['version']}"
    assert all(f"/v{pinned['version']}" in pinned[build]["url"] for build in ("cpu", "gpu"))


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("name", install.PINS)
def test_every_pin_has_hashes(name, gpu):
    line = install.requirement(name, [], gpu=gpu)
    assert re.fullmatch(r"[a-z0-9-]+(==[\d.]+| @ https://\S+\.whl)( --hash=sha256:[0-9a-f]{64})+", line)
    assert install.PINS[name]["version"] in line


def test_every_package_that_kaggles_image_lacks_is_pinned():
    """The image of August 2026 has the other packages of the stages, in versions that are new enough."""
    assert set(install.PINS) == {
        "bitsandbytes",
        "diskcache",
        "gguf",
        "jinja2",
        "llama-cpp-python",
        "llguidance",
        "rensa",
    }


def test_the_pins_are_part_of_the_package():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert "core/pins.toml" in patterns["package-data"]["saigakit"]


def test_every_stage_on_kaggle_can_read_the_model_of_the_demo():
    assert all("gguf" in install.needs(stage, kaggle=True) for stage in install.STAGES)
    assert "gguf" not in install.needs("01_format", kaggle=False)


# Imports that a stage contains but never executes: Kaggle's own module, the conversion of the demo's model, and the
# tokenizer of a GGUF before there is one.
NOT_REACHED = {
    "saigakit.core.workspace": {"kaggle_secrets"},
    "saigakit.evaluate.by_hand": {"IPython"},  # called by a notebook, which has it
    "saigakit.demo.packages": {"torch", "transformers"},
    "saigakit.demo.tiny_model": {"torch", "safetensors"},
    "saigakit.prompt.encoding": {"llama_cpp"},
    "saigakit.prompt.backends": {"llama_cpp"},
    "saigakit.weights.adapter": {"peft"},  # only if it is installed
}


@pytest.mark.parametrize("stage", install.STAGES)
def test_the_packages_of_a_stage_cover_the_imports_of_its_notebook(stage, monkeypatch):
    cells = json.loads((ROOT / "notebooks" / f"{stage}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    modules, reached = {import_graph.name_of(file): file for file in import_graph.FILES}, set()
    # Publishing only reads what was made; see test_publishing_needs_only_the_packages_of_its_stage.
    further = {name for name in import_graph.imported_by(ast.parse(code)) if not name.startswith("saigakit.publish")}
    while further:
        reached |= further
        further = set().union(*(import_graph.imported(modules[name]) for name in further & {*modules})) - reached
    lines = PROJECT["dependencies"] + [
        f'{line}; extra == "{extra}"'
        for extra in filter(None, EXTRAS)
        for line in PROJECT["optional-dependencies"][extra]
    ]
    monkeypatch.setattr(install.metadata, "requires", {"saigakit": lines}.get)
    needed, found = set(install.needs(stage, kaggle=False)), metadata.packages_distributions()
    for name in reached & {*modules}:
        packages = import_graph.packages(modules[name]) - NOT_REACHED.get(name, set())
        lacking = {each for each in packages if not needed & {one.lower().replace("_", "-") for one in found[each]}}
        assert not lacking, f"{name} imports {lacking}"


@pytest.mark.parametrize(("name", "unsafe"), [("jinja2", "3.1.5"), ("kaggle", "2.2.4")])
def test_versions_with_a_known_hole_are_below_the_lower_bound(name, unsafe):
    bounds = (declared("") | declared("kaggle"))[name].specifier
    assert not bounds.contains(unsafe)


@pytest.mark.parametrize(
    ("version", "needed"),
    [("3.1.5", "3.1.6"), ("3.1.6", None), ("3.2.0a0+vendor1", None), ("5.0", None), ("3.1", "3.1.6")],
)
def test_a_version_below_the_lower_bound_is_too_old_and_one_above_the_upper_is_not(
    version, needed, monkeypatch, tmp_path
):
    monkeypatch.setattr(install.metadata, "requires", {"saigakit": ["Jinja2>=3.0", "jinja2<4,>=3.1.6"]}.get)
    pretend_installed(monkeypatch, tmp_path, "jinja2", version)
    assert install.newer_needed("jinja2") == needed
    assert install.missing(["jinja2", "nothing"]) == (["jinja2", "nothing"] if needed else ["nothing"])


def test_at_home_a_version_that_is_too_old_is_reported_with_the_one_that_is_needed(machine, tmp_path):
    unpack(machine, wheel(tmp_path / "image", "jinja2", "3.1.5"))
    own = install_saigakit(machine, tmp_path / "wheels", {"": ["jinja2>=3.1.6", "gguf"]})
    result = prepare(machine, "01_format", inputs=tmp_path / "input", kaggle=False)
    assert result.stderr.endswith(
        "SaigaError: 01_format needs jinja2>=3.1.6 instead of 3.1.5, gguf, not installed here. "
        f'Run: pip install "saigakit @ {own.as_uri()}"\n'
    )


def test_no_package_is_listed_twice():
    for stage in install.STAGES:
        names = install.needs(stage, kaggle=True)
        assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("stage", "command"),
    [
        ("01_format", f'pip install -e "{ROOT}"'),
        ("02_train", f'pip install -e "{ROOT}[train]"'),
        ("03_merge_gguf", f'pip install -e "{ROOT}[export]"'),
        ("04_infer", f'pip install -e "{ROOT}[train,infer]"'),
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
    assert install.pip_command("02_train") == f'pip install -e "{ROOT}[train]"'
    infer = f'CMAKE_ARGS="{install.WITHOUT_AMX}" pip install --no-cache-dir -e "{ROOT}[train,infer]"'
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


def test_on_kaggle_missing_packages_come_from_attached_wheels_and_torch_stays(machine, tmp_path):
    """The wheel requires another torch, which is attached too: a plain `pip install` would replace torch."""
    unpack(machine, wheel(tmp_path / "image", "torch", "2.10.0"))
    own = tmp_path / "input" / "wheels"
    install_saigakit(machine, own, {"train": ["torch", "bitsandbytes"]})
    attached = wheel(own, "bitsandbytes", "0.50.2", requires=["torch>=3"])
    wheel(own, "torch", "3.0")
    pins = {"bitsandbytes": pin(attached)}
    result = prepare(machine, "02_train", inputs=tmp_path / "input", _ON_KAGGLE=[], PINS=pins)
    assert result.returncode == 0, result.stderr
    assert installed(machine) == {"bitsandbytes": "0.50.2", "torch": "2.10.0"}
    assert result.stdout == f"Installing bitsandbytes @ {attached.as_uri()} …\n"


def test_on_kaggle_pip_is_not_called_when_nothing_is_missing(machine, tmp_path):
    unpack(machine, wheel(tmp_path / "image", "gguf", "0.17.0"))
    install_saigakit(machine, tmp_path / "input" / "wheels")
    result = prepare(machine, "01_format", inputs=tmp_path / "input")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert installed(machine) == {"gguf": "0.17.0"}


def test_an_old_torchao_is_removed_and_reported_in_stages_with_peft(machine, tmp_path):
    unpack(machine, wheel(tmp_path / "image", "torchao", "0.10.0"))
    install_saigakit(machine, tmp_path / "input" / "wheels")
    for stage in ("01_format", "03_merge_gguf"):
        assert prepare(machine, stage, inputs=tmp_path / "input", _ON_KAGGLE=[]).stdout == ""
    assert installed(machine) == {"torchao": "0.10.0"}
    result = prepare(machine, "04_infer", inputs=tmp_path / "input", _ON_KAGGLE=[])
    assert result.stdout.startswith("Removing torchao 0.10.0")
    assert installed(machine) == {}


def test_a_torchao_that_peft_accepts_stays(machine, tmp_path):
    unpack(machine, wheel(tmp_path / "image", "torchao", "0.16.0"))
    install_saigakit(machine, tmp_path / "input" / "wheels")
    result = prepare(machine, "02_train", inputs=tmp_path / "input", _ON_KAGGLE=[])
    assert (result.returncode, result.stdout) == (0, "")
    assert installed(machine) == {"torchao": "0.16.0"}


def test_a_failure_of_pip_is_reported_with_a_remedy_and_its_last_lines(machine, tmp_path):
    install_saigakit(machine, tmp_path / "input" / "wheels")
    result = prepare(machine, "01_format", inputs=tmp_path / "input")
    last = result.stderr.partition("SaigaError: ")[2]
    assert last.startswith("pip could not install gguf. It said:\n")
    assert "No matching distribution found for gguf==0.19.0" in last


def test_a_wheel_that_cannot_be_imported_is_refused(machine, tmp_path):
    own = tmp_path / "input" / "wheels"
    install_saigakit(machine, own, {"infer": ["llama-cpp-python"]})
    broken = wheel(own, "llama-cpp-python", "0.3.35", source="raise OSError('libcudart.so.12')")
    pins = {
        "llama-cpp-python": {"version": "0.3.35", "module": "llama_cpp", "cpu": pin(broken)},
        "diskcache": pin(wheel(own, "diskcache", "5.6.3")),
    }
    result = prepare(machine, "04_infer", inputs=tmp_path / "input", _ON_KAGGLE=[], PINS=pins)
    assert "llama_cpp was installed but cannot be imported" in result.stderr
    assert "libcudart.so.12" in result.stderr


def test_an_image_without_torch_is_refused_before_anything_is_installed(machine, tmp_path):
    own = tmp_path / "input" / "wheels"
    install_saigakit(machine, own, {"train": ["bitsandbytes", "torch"]})
    pins = {"bitsandbytes": pin(wheel(own, "bitsandbytes", "0.50.2"))}
    result = prepare(machine, "02_train", inputs=tmp_path / "input", _ON_KAGGLE=[], PINS=pins)
    assert "This image has no torch. In the notebook's settings choose the latest environment" in result.stderr
    assert installed(machine) == {}


def test_at_home_nothing_is_installed_and_the_command_is_reported(machine, tmp_path):
    own = tmp_path / "input" / "wheels"
    made = install_saigakit(machine, own, {"train": ["bitsandbytes"]})
    wheel(own, "bitsandbytes", "0.50.2")
    result = prepare(machine, "02_train", inputs=tmp_path / "input", kaggle=False)
    assert result.stderr.endswith(
        "SaigaError: 02_train needs bitsandbytes, not installed here. "
        f'Run: pip install "saigakit[train] @ {made.as_uri()}"\n'
    )
    assert installed(machine) == {}


def test_at_home_an_old_torchao_is_reported_and_left_alone(machine, tmp_path):
    unpack(machine, wheel(tmp_path / "image", "torchao", "0.10.0"))
    install_saigakit(machine, tmp_path / "input" / "wheels")
    result = prepare(machine, "02_train", inputs=tmp_path / "input", kaggle=False)
    assert "Run: pip uninstall torchao" in result.stderr
    assert installed(machine) == {"torchao": "0.10.0"}


def test_this_environment_has_the_packages_of_every_stage():
    code = "from saigakit.core import install\nfor stage in install.STAGES: install.prepare(stage)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KAGGLE")}
    result = subprocess.run([sys.executable, "-c", code], env=environment | {"PYTHONPATH": str(ROOT)}, check=False)
    assert result.returncode == 0
