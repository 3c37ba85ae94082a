"""The commands as a shell runs them."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import small_notebooks
from click.testing import CliRunner

from saigakit import cli, export, publish, train
from saigakit.cli import chat, parameters, summary, terminal
from saigakit.cli import commands as cli_commands
from saigakit.config import TrainConfig
from saigakit.core import install, launch, manifest
from saigakit.core.files import sha256
from saigakit.errors import SaigaError
from saigakit.export import model_card
from saigakit.weights import find

COMMANDS = sorted(cli.main.commands)


def shell(*arguments, **options):
    command = [sys.executable, "-m", "saigakit.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120, **options)


def called(*arguments):
    """Run a command without the seconds that a process takes."""
    return CliRunner().invoke(cli.main, [*map(str, arguments)])


def error_of(*arguments, cwd=None):
    """Run a command that must fail, and return its error message."""
    with contextlib.chdir(cwd or Path.cwd()):
        done = called(*arguments)
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit), done.exception
    assert done.stderr.startswith("error: ")
    return done.stderr.removeprefix("error: ").rstrip()


def test_importing_the_commands_imports_nothing_heavy():
    code = (
        "import sys, saigakit.cli; print(*{'torch', 'transformers', 'papermill', 'llama_cpp', 'yaml'} & {*sys.modules})"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == ""


def test_version_is_that_of_the_package():
    assert shell("--version").stdout == f"saigakit, version {cli_commands.__version__}\n"


def test_a_closed_pipe_ends_a_command_without_a_message():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "saigakit.cli", "doctor"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_shows_an_example(command):
    shown = CliRunner().invoke(cli.main, [command, "--help"])
    assert shown.exit_code == 0
    assert re.search(rf"\n +Examples?:\n +saigakit {command}\b", shown.output)


def test_an_error_is_one_message_in_a_shell_too(tmp_path):
    done = shell("evaluate", "--model", "saiga_tiny", "--run-dir", tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert done.stderr.startswith("error: ") and "01_format" in done.stderr


def test_unknown_option_is_a_usage_error():
    done = shell("chat", "model.gguf", "--tempreature", "1")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert "--temperature" in done.stderr


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3", 3), ("2e-4", 2e-4), ("null", None), ("None", None), ("True", True), ("false", False),
        ("007", "007"), ("Q4_K_M", "Q4_K_M"), ('"3"', "3"), ("a b", "a b"),
    ],
)  # fmt: skip
def test_parses_a_value_as_json_or_python(text, expected):
    assert parameters.parse_value(text) == expected
    assert type(parameters.parse_value(text)) is type(expected)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty"),
        ("- a\n- b\n", "holds a list"),
        ("a: [1\n", "is not valid YAML"),
        (b"\xff\xfe", "cannot be read"),
        (None, "does not exist"),
    ],
)
def test_bad_yaml_file_is_one_message(tmp_path, content, said):
    file = tmp_path / "params.yaml"
    if content is not None:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    message = error_of("run", "-f", file, "--run-dir", tmp_path / "run")
    assert str(file) in message and said in message


@pytest.fixture
def notebooks(tmp_path):
    return small_notebooks.write(tmp_path / "notebooks")


@pytest.mark.slow
def test_run_options_override_the_file(tmp_path, notebooks):
    file = tmp_path / "params.yaml"
    file.write_text("learning_rate: 0.5\nrun_dir: run\ntext: a\n", encoding="utf-8")
    done = shell("run", "-f", file, "-p", "text", "b", "--notebooks", notebooks, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert manifest.read(tmp_path / "run" / "02_train")["parameters"]["learning_rate"] == 0.5
    assert manifest.read(tmp_path / "run" / "04_infer")["parameters"]["text"] == "b"
    assert "report.html" in done.stdout


def test_run_requires_a_run_dir(notebooks):
    assert "--run-dir" in error_of("run", "--notebooks", notebooks)


def test_run_names_an_unknown_parameter(tmp_path, notebooks):
    message = error_of("run", "-p", "modle", "x", "--run-dir", tmp_path / "run", "--notebooks", notebooks)
    assert "'modle'. Did you mean 'model'?" in message


def test_failed_run_prints_only_the_message_of_the_notebook(tmp_path, notebooks):
    said = "from saigakit import SaigaError\nraise SaigaError('records.jsonl is empty; give another file.')"
    small_notebooks.insert(notebooks / "01_format.ipynb", said)
    assert error_of("run", "--run-dir", tmp_path / "run", "--notebooks", notebooks) == (
        "records.jsonl is empty; give another file."
    )


@pytest.mark.slow
@pytest.mark.parametrize(("task", "file"), [((), "demo.yaml"), (("--task", "tools"), "demo_tools.yaml")])
def test_demo_uses_its_parameter_file_and_reuses_all_stages(tmp_path, notebooks, task, file):
    (notebooks / "params").mkdir()
    (notebooks / "params" / file).write_text("learning_rate: 0.25\nrun_dir: runs/demo\n", encoding="utf-8")
    arguments = ["demo", *task, "--run-dir", str(tmp_path / "run"), "--notebooks", str(notebooks)]
    for _ in range(2):
        done = CliRunner().invoke(cli.main, arguments)
        assert done.exit_code == 0, done.output
    assert manifest.read(tmp_path / "run" / "02_train")["parameters"]["learning_rate"] == 0.25
    assert done.output.count(": up to date, reusing it") == len(summary.STAGES)


def test_check_shows_the_counts_of_a_file(tiny):
    done = called("check", tiny / "records.jsonl", "--model", "saiga_tiny")
    assert done.exit_code == 0, done.stderr
    assert "conversations, each is well-formed" in done.stdout
    assert "trained" in done.stdout


@pytest.mark.slow
def test_check_reads_and_names_the_current_directory(tiny, tmp_path, monkeypatch):
    (tmp_path / "записи").mkdir()
    shutil.copy(tiny / "records.jsonl", tmp_path / "записи")
    monkeypatch.chdir(tmp_path / "записи")
    done = shell("check", ".", "--model", "saiga_tiny")
    assert done.returncode == 0, done.stderr
    assert "записи: 60 conversations, each is well-formed" in done.stdout
    assert "█" in done.stdout


def test_check_reads_several_files(tiny, tmp_path):
    for name in ("a", "b", "c"):
        shutil.copy(tiny / "records.jsonl", tmp_path / f"{name}.jsonl")
    files = [tmp_path / f"{name}.jsonl" for name in ("a", "b")]
    done = called("check", *files, "--held-out", tmp_path / "c.jsonl", "--model", "saiga_tiny")
    assert "a.jsonl, b.jsonl: 120 conversations" in done.stdout
    assert "c.jsonl: 60 conversations" in done.stdout


def test_check_of_a_single_record_reports_it(tmp_path):
    (tmp_path / "one.jsonl").write_text('{"user": "Кто ты?", "bot": "Я Сайга."}', encoding="utf-8")
    done = called("check", tmp_path / "one.jsonl", "--model", "saiga_tiny")
    assert done.exit_code == 0, done.stderr
    assert "one.jsonl: 1 conversation, each is well-formed" in done.stdout and "no evaluation set" in done.stdout


def test_check_lists_bad_records_with_their_lines(tmp_path):
    file = tmp_path / "records.jsonl"
    file.write_text('{"messages": []}\nno json\n', encoding="utf-8")
    message = error_of("check", file)
    assert "records.jsonl:1" in message and "records.jsonl:2" in message


def test_check_reports_on_the_records_before_the_tokenizer_fails(tiny, tmp_path):
    done = called("check", tiny / "records.jsonl", "--base-source", tmp_path / "none")
    assert "well-formed" in done.stdout
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit)
    assert "is not there" in done.stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("model: saiga_tiny", "train_file and output_dir must be set"),
        (
            "{model: saiga_tiny, train_file: a, output_dir: b, epoch: 1}",
            "unknown setting 'epoch'. Did you mean 'epochs'?",
        ),
        ("{model: saiga_tiny, train_file: a, output_dir: b, learning_rate: 2e-4}", "2.0e-4"),
        ("{model: saiga_tiny, train_file: a, output_dir: b, lora: {r: 8}}", "unknown lora settings r. Known: rank"),
        ("{model: saiga_tiny, train_file: none.jsonl, output_dir: b}", "'none.jsonl' is not there"),
    ],
)
def test_bad_training_config_is_one_message(tmp_path, content, said):
    (tmp_path / "train.yaml").write_text(content, encoding="utf-8")
    assert said in error_of("train", "-f", "train.yaml", cwd=tmp_path)


def test_training_config_accepts_lora():
    values = {"model": "saiga_tiny", "train_file": "a", "output_dir": "b"}
    lora = {"rank": 8, "target_modules": ["q_proj"]}
    made = TrainConfig.from_json(values | {"lora": lora}, "train.yaml").new_lora
    assert (made.rank, made.alpha, made.target_modules) == (8, 16, ("q_proj",))


@pytest.mark.slow
def test_export_writes_a_gguf_with_its_companion_files(tiny, tmp_path):
    output = tmp_path / "model.gguf"
    done = shell("export", "--model", "saiga_tiny", "--adapter", "released", "--output", output, "--quant-type", "Q8_0")
    assert done.returncode == 0, done.stderr
    assert output.read_bytes()[:4] == b"GGUF" and f"saigakit chat {output}" in done.stdout
    beside = {"model.Modelfile", "model.README.md", "model.gguf", "model.llama-server.txt", "model.saigakit.json"}
    assert {file.name for file in tmp_path.iterdir()} == beside
    assert "всего · total" in done.stdout.split("model.gguf")[0]  # the plan comes first
    content = manifest.read(output)
    assert content["outputs"] == {"model.gguf": sha256(output)} and content["quant_type"] == "Q8_0"
    assert content["inputs"]["base"] == manifest.hashes(tiny / "base")
    assert "FROM ./model.gguf" in (tmp_path / "model.Modelfile").read_text(encoding="utf-8")
    again = error_of("export", "--model", "saiga_tiny", "--output", output)
    assert "nothing was overwritten" in again
    assert "ends with .gguf" in error_of("export", "--model", "saiga_tiny", "--output", tmp_path / "model")


def test_export_completes_the_companions_of_a_finished_gguf(tiny, tmp_path, monkeypatch):
    def exported(*options):
        arguments = ["--model", "saiga_tiny", "--output", str(tmp_path / "m.gguf"), "--quant-type", "Q8_0", *options]
        return CliRunner().invoke(cli.main, ["export", *arguments])

    def full(file, text):
        raise SaigaError(f"{file} could not be written: No space left on device.")

    with monkeypatch.context() as patched:
        patched.setattr(model_card, "write_text", full)
        assert exported().exit_code == 1
    (tmp_path / "m.Modelfile").write_text("written before the disk was full")
    before = (tmp_path / "m.gguf").stat()
    assert "already exists" in exported("--adapter", "released").output
    done = exported()
    assert done.exit_code == 0 and "is there and intact" in done.output
    names = {"m.Modelfile", "m.README.md", "m.gguf", "m.llama-server.txt", "m.saigakit.json"}
    assert {file.name for file in tmp_path.iterdir()} == names
    assert (tmp_path / "m.gguf").stat() == before
    assert (tmp_path / "m.Modelfile").read_text() == "written before the disk was full"
    (tmp_path / "m.README.md").unlink()
    with (tmp_path / "m.gguf").open("ab") as stream:
        stream.write(b"x")
    assert "already exists" in exported().output


@pytest.mark.slow
def test_export_completes_the_companions_of_a_gguf_with_an_importance_matrix(tiny, tmp_path):
    arguments = ["--model", "saiga_tiny", "--output", str(tmp_path / "m.gguf"), "--quant-type", "Q4_0"]
    arguments += ["--importance", str(tiny / "records.jsonl")]
    assert CliRunner().invoke(cli.main, ["export", *arguments]).exit_code == 0
    before = {file.name: file.stat() for file in tmp_path.glob("*.gguf")}
    (tmp_path / "m.Modelfile").unlink()
    done = CliRunner().invoke(cli.main, ["export", *arguments])
    assert done.exit_code == 0 and (tmp_path / "m.Modelfile").is_file(), done.output
    assert {file.name: file.stat() for file in tmp_path.glob("*.gguf")} == before


def test_repeated_quant_type_gives_one_file(tiny, tmp_path):
    twice = ["--quant-type", "Q4_0", "--quant-type", "Q4_0"]
    output = str(tmp_path / "model.gguf")
    done = CliRunner().invoke(cli.main, ["export", "--model", "saiga_tiny", "--output", output, *twice])
    assert done.exit_code == 0, done.output
    assert [file.name for file in tmp_path.glob("*.gguf")] == ["model.gguf"]


@pytest.mark.parametrize("there", ["m.Modelfile", "m.saigakit.json", "m-Q8_0.gguf", "m.imatrix.gguf", None])
def test_export_checks_everything_before_computing(tiny, tmp_path, monkeypatch, there):
    monkeypatch.setattr("saigakit.export.gguf_export.Export.of", lambda *_: pytest.fail("it is computed"))
    quant_type = "Q8_0" if there else "Q9"
    if there:
        (tmp_path / there).write_text("mine")
    arguments = ["--model", "saiga_tiny", "--output", str(tmp_path / "m.gguf"), "--quant-type", "Q4_0"]
    arguments += ["--quant-type", quant_type, "--importance", str(tiny / "records.jsonl")]
    done = CliRunner().invoke(cli.main, ["export", *arguments])
    said = f"{there} already exists" if there else "quant_type='Q9' is unknown"
    assert done.exit_code == 1 and said in done.output
    assert [file.name for file in tmp_path.iterdir()] == ([there] if there else [])


def test_train_joins_several_machines(tmp_path, monkeypatch):
    joined = []
    monkeypatch.setenv("SAIGAKIT_NODES", "")
    monkeypatch.setattr(train, "train_adapter", lambda _: joined.append(launch.Nodes.from_environment()))
    (tmp_path / "train.yaml").write_text("{model: saiga_tiny, train_file: a, output_dir: b}", encoding="utf-8")

    def output(*options):
        return CliRunner().invoke(cli.main, ["train", "-f", str(tmp_path / "train.yaml"), *options]).output

    output()
    output("--nnodes", "2", "--node-rank", "1", "--rdzv-endpoint", "10.0.0.1:29500")
    assert joined == [None, launch.Nodes(2, 1, "10.0.0.1:29500")]
    assert "HOST:PORT of the first" in output("--nnodes", "2") and len(joined) == 2


@pytest.mark.slow
def test_export_writes_lora_safetensors_and_an_importance_matrix(tiny, tmp_path):
    def exported(name, *options):
        arguments = ["export", "--model", "saiga_tiny", "--output", str(tmp_path / name), *options]
        return CliRunner().invoke(cli.main, arguments).output

    adapter = ["--adapter", "released"]
    assert "--lora " in exported("lora.gguf", *adapter, "--format", "lora")
    assert (tmp_path / "lora.gguf").read_bytes()[:4] == b"GGUF"
    assert "(for transformers)" in exported("merged", *adapter, "--format", "safetensors")
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert "model: " in exported("m.gguf", *adapter, "--importance", str(tiny / "rec*.jsonl"))
    assert (tmp_path / "m.imatrix.gguf").is_file() and (tmp_path / "m.gguf").is_file()
    matrix = ["--importance", str(tiny / "records.jsonl"), "--merge-into", "dequantized"]
    assert "needs an adapter" in exported("d.gguf", *matrix) and not (tmp_path / "d.imatrix.gguf").exists()
    assert "does not take --quant-type" in exported("x", *adapter, "--format", "lora", "--quant-type", "Q8_0")
    assert "does not take --importance" in exported("x", *adapter, "--format", "safetensors", "--importance", "i.gguf")
    assert "takes one --adapter" in exported("x", "--format", "lora")
    assert "does not take --tokenizer" in exported("x", *adapter, "--format", "lora", "--tokenizer", "t")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {"adapter": None, "quant_type": "Q4_K_M"}),
        (["--adapter", "released"], {"adapter": "released", "quant_type": "Q4_K_M"}),
        (["--adapter", "a:0.5", "--adapter", "b"], {"adapter": [("a", 0.5), ("b", 1.0)], "quant_type": "Q4_K_M"}),
        (["--adapter", "a:2"], {"adapter": [("a", 2.0)], "quant_type": "Q4_K_M"}),
        (["--adapter", "C:here"], {"adapter": "C:here", "quant_type": "Q4_K_M"}),
        (
            ["--quant-type", "Q8_0", "--quant-type", "Q4_0"],
            {"adapter": None, "quant_type": "Q8_0", "quant_types": ["Q4_0"]},
        ),
        (
            ["--merge-into", "dequantized", "--importance", "i.gguf"],
            {"adapter": None, "quant_type": "Q4_K_M", "merge_into": "dequantized", "importance": "i.gguf"},
        ),
        (["--tokenizer", "t"], {"adapter": None, "quant_type": "Q4_K_M", "tokenizer": "t"}),
    ],
)
def test_export_passes_its_options_on(tmp_path, monkeypatch, arguments, expected):
    asked = {}

    def to_gguf(**given):
        asked.update(given)
        for name in ("m.gguf", "m-Q4_0.gguf"):
            (tmp_path / name).write_bytes(b"GGUF")
        manifest.write(tmp_path / "m.saigakit.json", stage="", parameters={}, inputs={}, facts={}, outputs={})
        return tmp_path / "m.gguf"

    def write(files, **given):
        assert [file.name for file in files.values()] == ["m.gguf", "m-Q4_0.gguf"][: len(files)]
        return []

    monkeypatch.setattr(export, "to_gguf", to_gguf)
    monkeypatch.setattr(model_card, "write_companions", write)
    monkeypatch.setattr(find, "adapter_dir", lambda spec, path: path)
    done = CliRunner().invoke(cli.main, ["export", "--model", "saiga_tiny", "--output", "m.gguf", *arguments])
    assert done.exit_code == 0, done.output
    fixed = {"model": "saiga_tiny", "output": "m.gguf", "with_manifest": True}
    assert asked == {**fixed, **expected}


@pytest.mark.parametrize(
    ("made", "options", "expected"),
    [
        ("run", [], ("adapter", "02_train", {"private": True, "replace": False})),
        ("run", ["--gguf", "--public"], ("gguf", "03_merge_gguf", {"private": False, "replace": False})),
        ("run", ["--kaggle"], ("kaggle", "03_merge_gguf", {"private": True})),
        ("x.gguf", [], ("gguf", "x.gguf", {"private": True, "replace": False})),
        ("x.gguf", ["--kaggle"], ("kaggle", "x.gguf", {"private": True})),
    ],
)
def test_publish_chooses_what_to_send_and_where(monkeypatch, made, options, expected):
    asked = []

    def noted(what):
        return lambda directory, name, **given: asked.append((what, directory.name, given))

    monkeypatch.setattr(publish, "push_adapter", noted("adapter"))
    monkeypatch.setattr(publish, "push_to_hub", noted("gguf"))
    monkeypatch.setattr(publish, "push_to_kaggle", noted("kaggle"))
    done = CliRunner().invoke(cli.main, ["publish", made, "me/name", *options])
    assert done.exit_code == 0, done.output
    assert asked == [expected]


def test_ctrl_c_while_the_model_is_loaded_exits_with_130(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "talk", interrupted)
    assert CliRunner().invoke(cli.main, ["chat", "model.gguf"]).exit_code == 130


def test_chat_reports_a_file_that_is_not_gguf(tmp_path):
    (tmp_path / "model.gguf").write_text("text")
    assert "is not a GGUF file" in error_of("chat", tmp_path / "model.gguf")


@pytest.mark.parametrize("arguments", [("push", "05_sell"), ("watch", "05_sell"), ("fetch", "05_sell", "there")])
def test_missing_kernel_is_one_message(tmp_path, arguments):
    assert "kernel-metadata.json" in error_of(*arguments, cwd=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["push", "wheels", "a.whl", "-p", "epochs", "3"], "wheels is not a notebook and has no parameters."),
        (["publish", "runs/terms", "me/name", "--kaggle", "--replace"], "--replace is for the Hub"),
    ],
)
def test_an_option_that_would_have_no_effect_is_refused(arguments, message):
    assert error_of(*arguments).startswith(message)


def test_windows_runs_some_commands_and_refuses_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(terminal, "os", SimpleNamespace(**vars(os) | {"name": "nt"}))
    done = CliRunner().invoke(cli.main, ["doctor"])
    assert done.exit_code == 1 and "doctor needs Linux or macOS. On Windows run it in WSL" in done.output
    done = CliRunner().invoke(cli.main, ["chat", "nothing.gguf"])
    assert done.exit_code == 1 and "nothing.gguf does not exist" in done.output


def test_chat_and_publish_import_without_posix_modules():
    lacking = "import sys; sys.modules |= dict.fromkeys(('fcntl', 'readline', 'resource', 'pwd', 'termios'))"
    code = f"{lacking}\nimport saigakit.cli.chat, saigakit.publish, saigakit.kaggle.kernels"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_missing_package_is_one_message(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    shown = CliRunner().invoke(cli.main, ["chat", "model.gguf"])
    assert shown.exit_code == 1 and f"Run: {install.pip_install(['all'])}\n" in shown.output


def test_os_error_is_one_message(tmp_path, notebooks):
    (tmp_path / "file").write_text("")
    assert "file" in error_of("run", "--run-dir", tmp_path / "file" / "run", "--notebooks", notebooks)


def test_bug_keeps_its_traceback(monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(chat, "talk", broken)
    assert isinstance(CliRunner().invoke(cli.main, ["chat", "model.gguf"]).exception, ZeroDivisionError)


def test_saiga_error_is_printed_with_status_1(monkeypatch):
    def refused(*_, **__):
        raise SaigaError("no")

    monkeypatch.setattr(chat, "talk", refused)
    shown = CliRunner().invoke(cli.main, ["chat", "model.gguf"])
    assert (shown.exit_code, shown.output) == (1, "error: no\n")
