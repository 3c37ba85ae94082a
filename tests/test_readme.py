"""Everything that the documents mention exists: files, headings, commands, options, variables, rooms, figures."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

import saigakit
from saigakit.registry import MODELS

ROOT = Path(__file__).parent.parent
READMES = ("README.md", "README.ru.md")
GUIDES = ("notebooks/README.md", "notebooks/README.ru.md")
BENCHMARKS = "benchmarks/README.md"
DOCUMENTS = (*READMES, BENCHMARKS, *GUIDES)
PACKAGE = ROOT / "saigakit"
ROOMS = sorted(f"{file.parent.name}/" for file in PACKAGE.glob("*/__init__.py"))
SINGLE_FILES = sorted(file.name for file in PACKAGE.glob("*.py") if file.name != "__init__.py")


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def links(name):
    """(path, heading) of every link that stays in the repository, the path relative to the document."""
    return re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", text(name))


def anchors(document):
    """The anchors of the headings in order, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", document, flags=re.DOTALL), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def target(name, link):
    """Where a link leads in either language: the file and the number of the heading."""
    path, heading = link
    file = (ROOT / name).parent / path if path else ROOT / name
    number = anchors(file.read_text(encoding="utf-8")).index(heading) if heading else None
    return path.replace(".ru.md", ".md"), number


def code(name):
    """The commands of a document: bash blocks and inline code."""
    blocks = re.findall(r"```bash\n(.*?)```", text(name), re.DOTALL)
    inline = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text(name), flags=re.DOTALL))
    return [line.split("  #")[0] for part in (*blocks, *inline) for line in part.splitlines()]


def options(line):
    return re.findall(r"(?<!\S)(--[a-z-]+|-[a-z])(?=\s|$)", line)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_path_that_it_links_to_exists(name):
    assert links(name)
    here = (ROOT / name).parent
    assert [path for path, _ in links(name) if not (here / path).exists()] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_heading_that_it_links_to_exists(name):
    here = (ROOT / name).parent
    targets = [(here / path if path else ROOT / name, heading) for path, heading in links(name) if heading]
    assert [heading for file, heading in targets if heading not in anchors(file.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_path_that_it_names_exists(name):
    paths = re.findall(r"(?<![\w/.])(?:benchmarks|notebooks|saigakit|tests|kaggle-metadata)/[\w./-]+\w", text(name))
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_make_command_is_a_target(name):
    targets = set(re.findall(r"^([\w-]+):", text("Makefile"), re.MULTILINE))
    used = {line.split()[-1] for line in code(name) if re.match(r"make \S", line)}
    assert used <= targets
    assert used >= ({"demo", "test", "test-all"} if name in READMES else set())


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_variable_of_make_is_in_the_makefile(name):
    used = {found for line in code(name) if line.startswith("make ") for found in re.findall(r"(\w+)=", line)}
    assert used <= set(re.findall(r"^(\w+) \?=", text("Makefile"), re.MULTILINE))
    assert ("TORCH_INDEX" in used) == (name in READMES)


def pip_installs(*variables, environment_dir=".venv"):
    """The lines with which make would install packages, independent of the options of a make around these tests."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "TORCH"))
    }
    dry_run = ["make", "--dry-run", "--always-make", *variables, f"{environment_dir}/ready"]
    ended = subprocess.run(dry_run, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return [line for line in ended.stdout.splitlines() if "pip install" in line]


def test_make_takes_only_torch_from_the_given_index():
    [index] = re.findall(r"TORCH_INDEX=(\S+) demo`", text("README.md"))
    torch, others = pip_installs(f"TORCH_INDEX={index}")
    assert f'--index-url "{index}" "torch==' in torch
    assert "--index-url" not in others


def test_make_uses_no_index_by_default():
    installs = pip_installs()
    assert len(installs) == 2
    assert [line for line in installs if "--index-url" in line] == []


def test_make_installs_the_versions_of_kaggle_into_an_environment_of_their_own():
    constraints = "tests/support/kaggle-constraints.txt"
    [version] = re.findall("^torch==.+", text(constraints), re.MULTILINE)
    torch, others = pip_installs("TORCH=torch==1", "TORCH_INDEX=https://x", environment_dir=".venv-kaggle")
    assert f'--index-url "https://x" "{version}"' in torch
    assert f"--constraint {constraints} --editable" in others and "--index-url" not in others
    assert all(line.split(".venv", 1)[1].startswith("-kaggle/bin/python ") for line in (torch, others))
    assert not any("--constraint" in line for line in pip_installs())


@cache
def help_of(command):
    ended = subprocess.run([sys.executable, "-m", "saigakit.cli", command, "--help"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize("name", (*READMES, *GUIDES))
def test_every_saigakit_command_exists_with_its_options(name):
    lines = [line for line in code(name) if re.match(r"saigakit [a-z]", line)]
    commands = {line.split()[1] for line in lines}
    assert {"run", "chat", "kaggle"} <= commands
    for command in sorted(commands):
        shown = help_of(command)
        for line in lines:
            for option in options(line) if line.split()[1] == command else ():
                assert option in shown, f"{command} {option}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_benchmark_that_it_calls_has_its_options(name):
    for line in code(name):
        if found := re.search(r"python (benchmarks/\w+\.py)(.*)", line):
            script = text(found[1])
            assert [option for option in options(found[2]) if f'"{option}"' not in script] == [], line


def test_every_benchmark_is_in_the_table_of_claims():
    scripts = [file.name for file in (ROOT / "benchmarks").glob("*.py")]
    assert scripts
    assert [name for name in scripts if f"python benchmarks/{name}" not in text(BENCHMARKS)] == []


def test_every_claim_has_a_command_a_result_a_machine_and_a_date():
    rows = [line.strip("| ").split(" | ") for line in text(BENCHMARKS).splitlines() if line.startswith("| ")]
    claims = [row for row in rows if row[0] != "claim"]
    assert len(claims) > 20
    for row in claims:
        assert len(row) == 5 and all(row), row
        assert re.fullmatch(r"20\d\d-\d\d-\d\d|not recorded", row[4]), row


@pytest.mark.parametrize("guide", GUIDES)
def test_every_model_of_the_registry_is_in_the_guide(guide):
    assert [name for name in saigakit.MODELS if f"`{name}`" not in text(guide)] == []


@pytest.mark.parametrize("guide", GUIDES)
def test_the_guide_lists_exactly_the_variables_of_the_package(guide):
    of_package = {
        name
        for file in PACKAGE.rglob("*.py")
        for name in re.findall(r"SAIGAKIT_[A-Z_]+", file.read_text(encoding="utf-8"))
    }
    assert set(re.findall(r"^\| `(SAIGAKIT_[A-Z_]+)`", text(guide), re.MULTILINE)) == of_package
    for name in DOCUMENTS:
        assert set(re.findall(r"SAIGAKIT_[A-Z_]+", text(name))) <= of_package


@pytest.mark.parametrize("name", READMES)
def test_every_room_and_every_single_file_is_on_the_map(name):
    assert len(ROOMS) == 13
    rows = re.findall(r"^\| \d+ \| \[([\w./]+)\]\(saigakit/([\w./]+)\)", text(name), re.MULTILINE)
    assert sorted(shown for shown, _ in rows) == sorted([*ROOMS, *SINGLE_FILES])
    assert all(shown.rstrip("/") == target for shown, target in rows)


@pytest.mark.parametrize("name", READMES)
def test_the_floors_of_the_map_are_those_that_imports_are_tested_against(name):
    rows = re.findall(r"^\| (\d+) \| \[([a-z]+)", text(name), re.MULTILINE)
    tested = re.search(r"^FLOORS = (\{.*?^\})", text("tests/test_imports.py"), re.MULTILINE | re.DOTALL)
    assert {room: int(floor) for floor, room in rows} == ast.literal_eval(tested[1])


@pytest.mark.parametrize("name", READMES)
def test_a_readme_is_short(name):
    assert len(text(name).splitlines()) <= 120


@pytest.mark.parametrize("name", READMES)
def test_the_table_says_what_the_demo_measured(name):
    for row in json.loads((ROOT / "benchmarks" / "demo" / "results.json").read_text(encoding="utf-8")):
        [line] = re.findall(rf"^\| `{row['name']}`.*$", text(name), re.MULTILINE)
        shares = [f"{100 * row[share]:.1f} %" for share in ("json_valid", "exact", "f1")]
        cells = [cell.strip() for cell in line.split("|")[2:-1]]
        assert cells == [*shares, f"{row['tokens_per_s']:.0f}", f"{row['bytes'] / 1e6:.0f} MB"]


def test_the_claims_say_what_the_demo_measured():
    for row in json.loads((ROOT / "benchmarks" / "demo" / "results.json").read_text(encoding="utf-8")):
        [line] = re.findall(rf"^\| [^|]*\(`{row['name']}`\).*$", text(BENCHMARKS), re.MULTILINE)
        shares = [f"{name} {100 * row[share]:.1f} %" for name, share in
                  (("valid JSON", "json_valid"), ("exact answers", "exact"), ("F1 of pairs", "f1"))]  # fmt: skip
        speed, size = f"{row['tokens_per_s']:.0f} tokens/s", f"{row['bytes'] / 1e6:.0f} MB"
        assert f"| {'; '.join([', '.join(shares), speed, size])} |" in line


@pytest.mark.parametrize("pair", (READMES, GUIDES), ids=("readme", "guide"))
def test_both_languages_have_the_same_code_blocks(pair):
    blocks = [re.findall(r"```(.*?)```", text(name), re.DOTALL) for name in pair]
    assert blocks[0]
    assert [[line.split("#")[0].strip() for line in block.splitlines()] for block in blocks[0]] == [
        [line.split("#")[0].strip() for line in block.splitlines()] for block in blocks[1]
    ]


def test_both_languages_have_the_same_table_of_the_demo():
    tables = [re.findall(r"^\| `(?:before|after|Q4_K_M)`.*", text(name), re.MULTILINE) for name in READMES]
    figures = [[re.findall(r"[\d.]+", row) for row in table] for table in tables]
    assert figures[0] == figures[1] and len(figures[0]) == 3


@pytest.mark.parametrize("pair", (READMES, GUIDES), ids=("readme", "guide"))
def test_both_languages_have_the_same_sections_and_links(pair):
    levels = [
        re.findall(r"^(#+) ", re.sub(r"```.*?```", "", text(name), flags=re.DOTALL), re.MULTILINE) for name in pair
    ]
    assert levels[0] == levels[1]
    targets = [[target(name, link) for link in links(name)] for name in pair]
    assert targets[0] == targets[1]


@pytest.mark.parametrize("pair", (READMES, GUIDES), ids=("readme", "guide"))
def test_both_languages_link_to_each_other(pair):
    for name, other in (pair, pair[::-1]):
        assert (Path(other).name, "") in links(name)


@pytest.mark.parametrize("name", GUIDES)
def test_the_guide_names_the_licence_of_every_base(name):
    assert [spec.name for spec in MODELS.values() if spec.licence not in text(name).lower()] == []


def test_both_guides_have_the_same_tables():
    rows = [[len(line.split("|")) for line in text(name).splitlines() if line.startswith("|")] for name in GUIDES]
    assert rows[0] == rows[1]


def test_the_version_is_one():
    project = tomllib.loads(text("pyproject.toml"))["project"]
    assert project["version"] == saigakit.__version__
    assert f"## {saigakit.__version__}" in text("CHANGELOG.md")
    wheels = [version for name in DOCUMENTS for version in re.findall(r"saigakit-([\d.]+)-py3", text(name))]
    assert set(wheels) == {saigakit.__version__}


def test_every_dependency_has_its_reason():
    lines = re.findall(r'^    "[a-z].*$', text("pyproject.toml").split("[project.scripts]")[0], re.MULTILINE)
    assert len(lines) > 20
    assert [line for line in lines if "#" not in line and "llama-cpp-python" not in line and "saf" not in line
            and "torch" not in line] == []  # fmt: skip
