"""The four notebook files are thin and clean, and a name means the same in all of them."""

import ast
import dataclasses
import importlib
import inspect
import json
import re
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
def test_it_is_valid_and_contains_no_output_of_a_run(stage):
    notebook = read(stage)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) == {"kaggle", "kernelspec", "language_info"}
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code(stage))
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)


@pytest.mark.parametrize("stage", STAGES)
def test_it_is_thin(stage):
    cells = code(stage)
    assert 18 <= sum(len(cell.source.splitlines()) for cell in cells) <= 36
    assert len(cells) <= 12
    longer = {"parameters": 8, "bootstrap": 9}
    assert all(len(cell.source.splitlines()) <= longer.get(cell.id, 6) for cell in cells)


@pytest.mark.parametrize("stage", STAGES)
def test_its_code_only_calls_and_shows(stage):
    for cell in code(stage):
        assert not cell.source.lstrip().startswith(("!", "%"))
        forbidden = (ast.FunctionDef, ast.ClassDef, ast.While, ast.Try, ast.Lambda)
        assert not [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, forbidden)]


@pytest.mark.parametrize("stage", STAGES)
def test_every_call_of_the_library_fits_its_signature(stage):
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
def test_it_imports_at_most_three_rooms_from_the_package_itself(stage):
    tree = ast.parse("\n".join(cell.source for cell in code(stage)))
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and "saigakit" in str(node.module)]
    assert {node.module for node in imported} == {"saigakit"}
    assert len([alias.name for node in imported for alias in node.names if (PACKAGE / alias.name).is_dir()]) <= 3


@pytest.mark.parametrize("stage", STAGES)
def test_there_are_at_most_eight_parameters(stage):
    assert len(parameters(stage)) <= 8


def test_a_parameter_has_the_same_default_in_all_notebooks():
    found = {}
    for stage in STAGES:
        for name, value in parameters(stage).items():
            found.setdefault(name, set()).add(value)
    assert found.pop("adapter") == {"auto", "02_train"}  # what training starts from, and what it makes
    assert {name: values for name, values in found.items() if len(values) > 1} == {}
    assert found["model"] == {"saiga2_7b"} and found["run_dir"] == {"/kaggle/working"}


def test_the_defaults_of_02_start_from_the_adapter_of_saiga_in_nf4():
    values = parameters("02_train")
    del values["run_dir"]
    config = TrainConfig(train_file="x", output_dir="y", **values)
    assert config.is_folded and config.start_adapter == registry.find("saiga2_7b").released_adapter
    assert config.weights_as == "nf4"


def test_every_setting_of_training_is_explained_in_02():
    prose = "\n".join(cell.source for cell in read("02_train").cells if cell.cell_type == "markdown")
    files = {"train_file", "eval_file", "output_dir"}  # the title explains them
    named = {field.name for kind in (TrainConfig, registry.Lora) for field in dataclasses.fields(kind)} - files
    inside_lora = {"rank": "ранг", "alpha": "alpha", "dropout": "dropout", "target_modules": "слои"}
    assert [name for name in sorted(named) if inside_lora.get(name, f"`{name}`") not in prose] == []


@pytest.mark.parametrize(
    "argument",
    [
        "max_steps",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "optim",
        "logging_steps",
        "save_total_limit",
        "load_best_model_at_end",
        "report_to",
        "torch.compile",
        "DataCollatorForSeq2Seq",
    ],
)
def test_every_argument_of_the_2023_tutorial_is_in_the_table_of_02(argument):
    [cell] = [cell for cell in read("02_train").cells if cell.id == "every_parameter"]
    rows = [line.split("|")[1:-1] for line in cell.source.splitlines() if f"`{argument}`" in line]
    assert rows and all(len(row) == 4 and all(map(str.strip, row)) for row in rows)


def test_the_defaults_in_the_table_of_02_are_those_of_the_library():
    cells = {cell.id: cell.source for cell in read("02_train").cells}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in cells["every_parameter"].splitlines()]
    ours = {re.split("[,<]", row[0])[0].strip("`"): row[1] for row in rows if len(row) == 4}
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
def test_prose_is_russian_followed_by_a_line_of_english(stage):
    for cell in read(stage).cells:
        if cell.cell_type == "markdown":
            assert "*" in cell.source
            english = cell.source.rindex("*", 0, -1)
            assert any("а" <= letter <= "я" for letter in cell.source[:english].lower()), cell.id


@pytest.mark.parametrize("stage", ["02_train", "03_merge_gguf"])
def test_what_was_made_is_published_after_it_is_asserted(stage):
    first, second = code(stage)[-1].source.splitlines()[:2]
    assert first.startswith("assert ") and second.startswith("publish.if_asked(")


@pytest.mark.parametrize("stage", STAGES)
def test_the_last_cell_asserts_what_was_made(stage):
    assert code(stage)[-1].source.startswith("assert ")


@pytest.mark.parametrize("file", PARAMS, ids=lambda file: file.stem)
def test_a_parameter_file_contains_only_parameters_of_the_notebooks(file):
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    known = {name for stage in STAGES for name in parameters(stage)}
    assert set(values) <= known
    assert json.dumps(values)
