"""The four notebooks as files: thin, clean, and the same names with the same meaning in all of them."""

import ast
import dataclasses
import importlib
import inspect
import json
from pathlib import Path

import nbformat
import pytest
import yaml
from import_graph import PACKAGE

import saigakit
from saigakit import registry
from saigakit.cli import summary
from saigakit.config import TrainConfig

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
STAGES = summary.STAGES
PARAMS = sorted((NOTEBOOKS / "params").glob("*.yaml"))


def read(stage):
    return nbformat.read(NOTEBOOKS / f"{stage}.ipynb", as_version=4)


def code(stage):
    return [cell for cell in read(stage).cells if cell.cell_type == "code"]


def parameters(stage):
    [cell] = [cell for cell in code(stage) if "parameters" in cell.metadata.get("tags", [])]
    return {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(cell.source).body}


@pytest.mark.parametrize("stage", STAGES)
def test_it_is_valid_and_holds_nothing_of_a_run(stage):
    notebook = read(stage)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code(stage))
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)


@pytest.mark.parametrize("stage", STAGES)
def test_it_is_thin(stage):
    cells = code(stage)
    assert 18 <= sum(len(cell.source.splitlines()) for cell in cells) <= 30
    assert len(cells) <= 12
    assert all(
        len(cell.source.splitlines()) <= 6 for cell in cells if "parameters" not in cell.metadata.get("tags", [])
    )


@pytest.mark.parametrize("stage", STAGES)
def test_it_only_calls_and_shows(stage):
    for cell in code(stage):
        assert not cell.source.lstrip().startswith(("!", "%"))
        forbidden = (ast.FunctionDef, ast.ClassDef, ast.While, ast.Try, ast.Lambda)
        assert not [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, forbidden)]


@pytest.mark.parametrize("stage", STAGES)
def test_every_name_of_the_library_that_it_uses_exists_and_takes_those_arguments(stage):
    tree = ast.parse("\n".join(cell.source for cell in code(stage)))
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and "saigakit" in str(node.module)]
    names = {alias.name: importlib.import_module(node.module) for node in imported for alias in node.names}
    called = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (function := called_function(node.func, names)) is not None:
            keywords = {keyword.arg: None for keyword in node.keywords}
            inspect.signature(function).bind(*([None] * len(node.args)), **keywords)
            called += 1
    assert called >= 4


def called_function(function, names):
    """What of saigakit a call means, `verb(…)` or `room.verb(…)`; None for everything else."""
    if isinstance(function, ast.Name) and function.id in names:
        return getattr(names[function.id], function.id)
    owner = getattr(getattr(function, "value", None), "id", None)
    if owner not in names:
        return None
    is_room = (PACKAGE / owner).is_dir()
    return getattr(importlib.import_module(f"saigakit.{owner}") if is_room else getattr(saigakit, owner), function.attr)


@pytest.mark.parametrize("stage", STAGES)
def test_it_imports_verbs_of_at_most_three_rooms_from_the_package_itself(stage):
    tree = ast.parse("\n".join(cell.source for cell in code(stage)))
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and "saigakit" in str(node.module)]
    assert {node.module for node in imported} == {"saigakit"}
    assert len([alias.name for node in imported for alias in node.names if (PACKAGE / alias.name).is_dir()]) <= 3


@pytest.mark.parametrize("stage", STAGES)
def test_parameters_are_few_literals(stage):
    assert len(parameters(stage)) <= 8


def test_a_parameter_of_one_name_has_one_default_in_all_notebooks():
    found = {}
    for stage in STAGES:
        for name, value in parameters(stage).items():
            found.setdefault(name, set()).add(value)
    assert found.pop("adapter") == {"auto", "02_train"}  # what training starts from, and what it has made
    assert {name: values for name, values in found.items() if len(values) > 1} == {}
    assert found["model"] == {"saiga2_7b"} and found["run_dir"] == {"/kaggle/working"}


def test_the_defaults_of_02_begin_with_saigas_adapter_in_nf4():
    values = parameters("02_train")
    del values["run_dir"]
    config = TrainConfig(train_file="x", output_dir="y", **values)
    assert config.is_folded and config.start_adapter == registry.find("saiga2_7b").released_adapter
    assert config.weights_as == "nf4"


def test_every_setting_of_training_is_explained_in_02():
    prose = "\n".join(cell.source for cell in read("02_train").cells if cell.cell_type == "markdown")
    files = {"train_file", "eval_file", "output_dir"}  # stages, which the title tells of
    named = {field.name for kind in (TrainConfig, registry.Lora) for field in dataclasses.fields(kind)} - files
    inside_lora = {"rank": "ранг", "alpha": "alpha", "dropout": "dropout", "target_modules": "слои"}
    assert [name for name in sorted(named) if inside_lora.get(name, f"`{name}`") not in prose] == []


def test_the_defaults_that_02_tells_of_are_those_of_the_library():
    cells = {cell.id: cell.source for cell in read("02_train").cells}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in cells["every_parameter"].splitlines()]
    ours = {row[0].split(",")[0].strip("`"): row[2] for row in rows if len(row) == 5}
    config, spec = TrainConfig(model="saiga2_7b", train_file="", output_dir=""), registry.find("saiga2_7b")
    for name, value in (
        ("learning_rate", f"{spec.learning_rate:.0e}".replace("e-0", "e-")),
        ("batch_size", f"{config.batch_size}"),
        ("epochs", f"{config.epochs:g}"),
        ("max_seq_length", f"{spec.max_seq_length}"),
        ("quantization", f'"{spec.quantization}"'),
        ("lora", f"{spec.lora.rank}, {spec.lora.alpha}, {spec.lora.dropout}".replace(".", ",")),
        ("early_stopping", f"{config.early_stopping}"),
        ("save_minutes", f"{config.save_minutes:g}"),
        ("max_hours", f"{config.max_hours}".replace(".", ",")),
        ("neftune_alpha", f"{config.neftune_alpha}"),
        ("replay_file", f"{config.replay_fraction}".replace(".", ",")),
        ("seed", f"{config.seed}"),
    ):
        assert value in ours[name], name


@pytest.mark.parametrize("stage", STAGES)
def test_prose_is_russian_first_then_a_line_of_english(stage):
    for cell in read(stage).cells:
        if cell.cell_type == "markdown":
            assert "*" in cell.source
            english = cell.source.rindex("*", 0, -1)
            assert any("а" <= letter <= "я" for letter in cell.source[:english].lower()), cell.id


@pytest.mark.parametrize("stage", STAGES)
def test_the_last_cell_asserts_what_was_made(stage):
    assert code(stage)[-1].source.startswith("assert ")


@pytest.mark.parametrize("file", PARAMS, ids=lambda file: file.stem)
def test_every_name_in_a_file_of_parameters_is_one_of_a_notebook(file):
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    known = {name for stage in STAGES for name in parameters(stage)}
    assert set(values) <= known
    assert json.dumps(values)
