"""What the README says is there: files, commands, links, figures."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import saigakit

ROOT = Path(__file__).parent.parent
READMES = ("README.md", "README.ru.md")


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", READMES)
def test_every_path_that_it_links_to_exists(name):
    links = re.findall(r"\]\((?!http|#)([^)#]+)", text(name))
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("name", READMES)
def test_every_make_command_is_a_target(name):
    targets = set(re.findall(r"^(\w+):", text("Makefile"), re.MULTILINE))
    assert set(re.findall(r"`?make (\w+)", text(name))) <= targets


@pytest.mark.parametrize("name", READMES)
def test_every_saigakit_command_exists_with_its_options(name):
    commands = set(re.findall(r"saigakit (\w+)", "\n".join(re.findall(r"```bash\n(.*?)```", text(name), re.DOTALL))))
    assert {"run", "chat", "push"} <= commands
    for command in commands:
        ended = subprocess.run(
            [sys.executable, "-m", "saigakit.cli", command, "--help"], capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stderr
        for line in re.findall(rf"saigakit {command} (.*)", text(name)):
            for option in re.findall(r"(?<!\S)(--[a-z-]+|-[a-z])(?=\s|$)", line):
                assert option in ended.stdout, f"{command} {option}"


@pytest.mark.parametrize("name", READMES)
def test_the_table_says_what_the_demo_measured(name):
    for row in json.loads((ROOT / "benchmarks" / "demo" / "results.json").read_text(encoding="utf-8")):
        [line] = re.findall(rf"^\| `{row['name']}`.*$", text(name), re.MULTILINE)
        shares = [f"{100 * row[share]:.1f} %" for share in ("json_valid", "exact", "f1")]
        cells = [cell.strip() for cell in line.split("|")[2:-1]]
        assert cells == [*shares, f"{row['tokens_per_s']:.0f}", f"{row['bytes'] / 1e6:.0f} MB"]


def test_both_languages_have_the_same_commands_and_the_same_table():
    blocks = [re.findall(r"```bash\n(.*?)```", text(name), re.DOTALL) for name in READMES]
    assert [[line.split("#")[0].strip() for line in block.splitlines()] for block in blocks[0]] == [
        [line.split("#")[0].strip() for line in block.splitlines()] for block in blocks[1]
    ]
    tables = [re.findall(r"^\| `(?:before|after|Q4_K_M)`.*", text(name), re.MULTILINE) for name in READMES]
    figures = [[re.findall(r"[\d.]+", row) for row in table] for table in tables]
    assert figures[0] == figures[1] and len(figures[0]) == 3


def test_the_version_is_one():
    project = tomllib.loads(text("pyproject.toml"))["project"]
    assert project["version"] == saigakit.__version__
    assert f"## {saigakit.__version__}" in text("CHANGELOG.md")


def test_every_dependency_has_its_reason():
    lines = re.findall(r'^    "[a-z].*$', text("pyproject.toml").split("[project.scripts]")[0], re.MULTILINE)
    assert len(lines) > 20
    assert [line for line in lines if "#" not in line and "llama-cpp-python" not in line and "saf" not in line
            and "torch" not in line] == []  # fmt: skip
