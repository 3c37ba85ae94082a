"""The commands as a shell runs them: exit codes, sentences, no tracebacks."""

import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import small_notebooks
from click.testing import CliRunner

from saigakit import cli, export, infer, publish, train
from saigakit.cli import chat, parameters, summary, terminal
from saigakit.cli import commands as cli_commands
from saigakit.core import launch, manifest
from saigakit.core.files import sha256
from saigakit.errors import SaigaError
from saigakit.export import model_card
from saigakit.registry import MODELS
from saigakit.weights import find

COMMANDS = sorted(cli.main.commands)


def shell(*arguments, **options):
    command = [sys.executable, "-m", "saigakit.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120, **options)


def sentence(*arguments, **options):
    """What a command that fails says."""
    done = shell(*arguments, **options)
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")
    return done.stderr.removeprefix("error: ").rstrip()


@pytest.fixture(scope="session")
def gguf_file(tiny, tmp_path_factory):
    output = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return export.to_gguf(model="saiga_tiny", adapter="released", output=output, quant_type="Q8_0")


def test_importing_the_commands_brings_in_nothing_heavy():
    code = (
        "import sys, saigakit.cli; print(*{'torch', 'transformers', 'papermill', 'llama_cpp', 'yaml'} & {*sys.modules})"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == ""


def test_the_version_is_the_packages():
    assert shell("--version").stdout == f"saigakit, version {cli_commands.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_shows_an_example_in_its_help(command):
    shown = CliRunner().invoke(cli.main, [command, "--help"])
    assert shown.exit_code == 0
    assert f"Example: saigakit {command}" in shown.output


def test_an_unknown_option_is_a_usage_error():
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
def test_a_value_is_read_as_json_or_python_write_it(text, expected):
    assert parameters.value(text) == expected
    assert type(parameters.value(text)) is type(expected)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "it holds nothing"),
        ("- a\n- b\n", "it holds a list"),
        ("a: [1\n", "is not YAML"),
        (b"\xff\xfe", "cannot be read"),
        (None, "is not there"),
    ],
)
def test_a_bad_yaml_file_is_a_sentence(tmp_path, content, said):
    file = tmp_path / "params.yaml"
    if content is not None:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    message = sentence("run", "-f", file, "--run-dir", tmp_path / "run")
    assert str(file) in message and said in message


@pytest.fixture
def notebooks(tmp_path):
    return small_notebooks.write(tmp_path / "notebooks")


def test_run_takes_the_file_and_the_options_win(tmp_path, notebooks):
    file = tmp_path / "params.yaml"
    file.write_text("learning_rate: 0.5\nrun_dir: run\ntext: a\n", encoding="utf-8")
    done = shell("run", "-f", file, "-p", "text", "b", "--notebooks", notebooks, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert manifest.read(tmp_path / "run" / "02_train")["parameters"]["learning_rate"] == 0.5
    assert manifest.read(tmp_path / "run" / "04_infer")["parameters"]["text"] == "b"
    assert "report.html" in done.stdout


def test_run_without_a_place_for_the_results_asks_for_one(notebooks):
    assert "--run-dir" in sentence("run", "--notebooks", notebooks)


def test_run_names_an_unknown_parameter(tmp_path, notebooks):
    message = sentence("run", "-p", "modle", "x", "--run-dir", tmp_path / "run", "--notebooks", notebooks)
    assert "'modle'. Did you mean 'model'?" in message


def test_a_notebooks_sentence_is_all_that_a_failed_run_says(tmp_path, notebooks):
    said = "from saigakit import SaigaError\nraise SaigaError('records.jsonl is empty; give another file.')"
    small_notebooks.insert(notebooks / "01_format.ipynb", said)
    assert sentence("run", "--run-dir", tmp_path / "run", "--notebooks", notebooks) == (
        "records.jsonl is empty; give another file."
    )


def test_the_demo_runs_with_the_parameters_of_its_file_and_again_keeps_all(tmp_path, notebooks):
    (notebooks / "params").mkdir()
    (notebooks / "params" / "demo.yaml").write_text("learning_rate: 0.25\nrun_dir: runs/demo\n", encoding="utf-8")
    arguments = ["demo", "--run-dir", str(tmp_path / "run"), "--notebooks", str(notebooks)]
    for _ in range(2):
        done = CliRunner().invoke(cli.main, arguments)
        assert done.exit_code == 0, done.output
    assert manifest.read(tmp_path / "run" / "02_train")["parameters"]["learning_rate"] == 0.25
    assert done.output.count(": kept (") == len(summary.STAGES)


def test_check_shows_the_counts_of_a_file(tiny):
    done = shell("check", tiny / "records.jsonl", "--model", "saiga_tiny")
    assert done.returncode == 0, done.stderr
    assert "conversations, each is well-formed" in done.stdout
    assert "learned" in done.stdout


def test_check_of_this_directory_reads_it_and_names_it(tiny, tmp_path, monkeypatch):
    (tmp_path / "записи").mkdir()
    shutil.copy(tiny / "records.jsonl", tmp_path / "записи")
    monkeypatch.chdir(tmp_path / "записи")
    done = shell("check", ".", "--model", "saiga_tiny")
    assert done.returncode == 0, done.stderr
    assert "записи: 60 conversations, each is well-formed" in done.stdout
    assert "█" in done.stdout


def test_check_lists_bad_records_with_their_lines(tmp_path):
    file = tmp_path / "records.jsonl"
    file.write_text('{"messages": []}\nno json\n', encoding="utf-8")
    message = sentence("check", file)
    assert "records.jsonl:1" in message and "records.jsonl:2" in message


def test_check_says_that_the_data_are_well_formed_before_it_fails_for_the_tokenizer(tiny, tmp_path):
    done = shell("check", tiny / "records.jsonl", "--base-source", tmp_path / "none")
    assert "well-formed" in done.stdout
    assert (done.returncode, "is not there" in done.stderr, "Traceback" in done.stderr) == (1, True, False)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("model: saiga_tiny", "train_file, output_dir must be given"),
        ("{model: saiga_tiny, train_file: a, output_dir: b, epoch: 1}", "'epoch' is no setting"),
        ("{model: saiga_tiny, train_file: a, output_dir: b, learning_rate: 2e-4}", "2.0e-4"),
        ("{model: saiga_tiny, train_file: a, output_dir: b, lora: {r: 8}}", "lora has no r; it has rank"),
        ("{model: saiga_tiny, train_file: none.jsonl, output_dir: b}", "'none.jsonl' is not there"),
    ],
)
def test_a_bad_training_config_is_a_sentence(tmp_path, content, said):
    (tmp_path / "train.yaml").write_text(content, encoding="utf-8")
    assert said in sentence("train", "-f", "train.yaml", cwd=tmp_path)


def test_a_training_config_takes_a_lora_of_its_own():
    values = {"model": "saiga_tiny", "train_file": "a", "output_dir": "b"}
    lora = {"rank": 8, "target_modules": ["q_proj"]}
    made = parameters.train_config(values | {"lora": lora}, "train.yaml").new_lora
    assert (made.rank, made.alpha, made.target_modules) == (8, 16, ("q_proj",))


def test_export_makes_a_file_that_chat_can_load(tiny, tmp_path):
    output = tmp_path / "model.gguf"
    done = shell("export", "--model", "saiga_tiny", "--adapter", "released", "--output", output, "--quant-type", "Q8_0")
    assert done.returncode == 0, done.stderr
    assert output.read_bytes()[:4] == b"GGUF" and f"saigakit chat {output}" in done.stdout
    beside = {"model.Modelfile", "model.README.md", "model.gguf", "model.llama-server.txt", "model.saigakit.json"}
    assert {file.name for file in tmp_path.iterdir()} == beside
    assert "together · всего" in done.stdout.split("model.gguf")[0]  # the plan comes first
    content = manifest.read_for(output)
    assert content["outputs"] == {"model.gguf": sha256(output)} and content["quant_type"] == "Q8_0"
    assert content["inputs"]["base"] == manifest.hashes(tiny / "base")
    assert "FROM ./model.gguf" in (tmp_path / "model.Modelfile").read_text(encoding="utf-8")
    again = sentence("export", "--model", "saiga_tiny", "--output", output)
    assert "nothing was overwritten" in again
    assert "ends with .gguf" in sentence("export", "--model", "saiga_tiny", "--output", tmp_path / "model")


def test_a_quant_type_that_is_given_twice_is_one_file(tiny, tmp_path):
    twice = ["--quant-type", "Q4_0", "--quant-type", "Q4_0"]
    output = str(tmp_path / "model.gguf")
    done = CliRunner().invoke(cli.main, ["export", "--model", "saiga_tiny", "--output", output, *twice])
    assert done.exit_code == 0, done.output
    assert [file.name for file in tmp_path.glob("*.gguf")] == ["model.gguf"]


@pytest.mark.parametrize("there", ["m.Modelfile", "m.saigakit.json", "m-Q8_0.gguf", "m.imatrix.gguf", None])
def test_what_export_would_refuse_is_refused_before_anything_is_computed(tiny, tmp_path, monkeypatch, there):
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


def test_export_makes_the_adapter_alone_the_merged_model_and_a_matrix_of_records(tiny, tmp_path):
    def exported(name, *options):
        arguments = ["export", "--model", "saiga_tiny", "--output", str(tmp_path / name), *options]
        return CliRunner().invoke(cli.main, arguments).output

    adapter = ["--adapter", "released"]
    assert "--lora " in exported("lora.gguf", *adapter, "--format", "lora")
    assert (tmp_path / "lora.gguf").read_bytes()[:4] == b"GGUF"
    assert "which transformers loads" in exported("merged", *adapter, "--format", "safetensors")
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert "model: " in exported("m.gguf", *adapter, "--importance", str(tiny / "rec*.jsonl"))
    assert (tmp_path / "m.imatrix.gguf").is_file() and (tmp_path / "m.gguf").is_file()
    matrix = ["--importance", str(tiny / "records.jsonl"), "--merge-into", "dequantized"]
    assert "needs an adapter" in exported("d.gguf", *matrix) and not (tmp_path / "d.imatrix.gguf").exists()
    assert "does not take --quant-type" in exported("x", *adapter, "--format", "lora", "--quant-type", "Q8_0")
    assert "does not take --importance" in exported("x", *adapter, "--format", "safetensors", "--importance", "i.gguf")
    assert "takes one --adapter" in exported("x", "--format", "lora")
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
    ],
)
def test_the_options_of_export_reach_the_library(tmp_path, monkeypatch, arguments, expected):
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
    monkeypatch.setattr(model_card, "write", write)
    monkeypatch.setattr(find, "adapter_dir", lambda spec, path: path)
    done = CliRunner().invoke(cli.main, ["export", "--model", "saiga_tiny", "--output", "m.gguf", *arguments])
    assert done.exit_code == 0, done.output
    fixed = {"model": "saiga_tiny", "output": "m.gguf", "base_source": None, "with_manifest": True}
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
def test_publish_sends_what_it_is_asked_for_to_where(monkeypatch, made, options, expected):
    asked = []

    def noted(what):
        return lambda directory, name, **given: asked.append((what, directory.name, given))

    monkeypatch.setattr(publish, "push_adapter", noted("adapter"))
    monkeypatch.setattr(publish, "push_to_hub", noted("gguf"))
    monkeypatch.setattr(publish, "push_to_kaggle", noted("kaggle"))
    done = CliRunner().invoke(cli.main, ["publish", made, "me/name", *options])
    assert done.exit_code == 0, done.output
    assert asked == [expected]


def greedy(gguf_file, lines, *, system=("--system", "")):
    done = shell("chat", gguf_file, "--n-ctx", "256", "--temperature", "0", *system, input=lines)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_chat_begins_with_the_system_prompt_that_the_file_holds_and_says_so(gguf_file):
    done = greedy(gguf_file, "Привет\n", system=())
    assert f"system: {MODELS['saiga_tiny'].system_prompt}" in done.stderr
    assert done.stdout != greedy(gguf_file, "Привет\n").stdout


def test_chat_answers_each_line_of_stdin_until_an_empty_one(gguf_file):
    first, second = (greedy(gguf_file, f"{line}\n").stdout for line in ("Привет", "Да"))
    both = greedy(gguf_file, "Привет\nДа\n\nnever asked\n")
    assert first.strip() and second.strip()
    assert both.stdout == first + second  # the first answer fills the context, so the second is of a new conversation
    assert "begins anew" in both.stderr


def test_chat_remembers_what_was_said_and_the_system_message(gguf_file, monkeypatch, capsys):
    asked = []

    def answer(llm, messages, **_):
        asked.append([(message["role"], message["content"]) for message in messages])
        yield "да"

    monkeypatch.setattr(infer, "stream", answer)
    done = CliRunner().invoke(cli.main, ["chat", str(gguf_file), "--system", "S"], input="a\nb\n")
    assert done.exit_code == 0
    assert asked[1] == [("system", "S"), ("user", "a"), ("assistant", "да"), ("user", "b")]


def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(gguf_file, monkeypatch):
    pieces, asked = infer.stream, []

    def interrupted_once(llm, messages, **options):
        asked.append([message["content"] for message in messages])
        for piece in pieces(llm, messages, max_new_tokens=5, **options):
            yield piece
            if len(asked) == 1:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(infer, "stream", interrupted_once)
    done = CliRunner().invoke(cli.main, ["chat", str(gguf_file), "--system", ""], input="a\nb\n")
    assert done.exit_code == 0, done.output
    assert " …" in done.output
    assert [asked[1][0], asked[1][2]] == ["a", "b"] and asked[1][1]


def test_a_question_too_long_for_the_context_is_a_sentence_and_the_next_one_is_answered(gguf_file):
    done = greedy(gguf_file, "слово " * 100 + "\nПривет\n")
    assert "the context holds 256" in done.stderr and "anew" not in done.stderr
    assert done.stdout == greedy(gguf_file, "Привет\n").stdout


def test_ctrl_c_at_the_prompt_ends_with_130(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "talk", interrupted)
    assert CliRunner().invoke(cli.main, ["chat", "model.gguf"]).exit_code == 130


def test_chat_with_what_is_no_gguf_is_a_sentence(tmp_path):
    (tmp_path / "model.gguf").write_text("text")
    assert "is no GGUF file" in sentence("chat", tmp_path / "model.gguf")


def test_evaluate_says_which_stage_is_missing(tmp_path):
    assert "01_format" in sentence("evaluate", "--model", "saiga_tiny", "--run-dir", tmp_path)


@pytest.mark.parametrize("arguments", [("push", "02_train"), ("watch", "02_train"), ("fetch", "02_train", "there")])
def test_a_kernel_that_is_not_here_is_a_sentence(tmp_path, arguments):
    assert "kernel-metadata.json" in sentence(*arguments, cwd=tmp_path)


def test_doctor_shows_the_machine_and_each_stage():
    shown = shell("doctor").stdout
    assert "CPU" in shown and "tokenizers" in shown
    assert all(f"\n{stage}: " in shown for stage in summary.STAGES)


def test_doctor_names_what_a_stage_lacks_and_how_to_get_it(monkeypatch):
    monkeypatch.setattr("saigakit.core.install.missing", lambda names: [name for name in names if name == "peft"])
    shown = CliRunner().invoke(cli.main, ["doctor"]).output
    assert "02_train: lacks peft; pip install" in shown and "01_format: ready" in shown


def test_what_windows_lacks_is_said_and_what_it_can_do_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(terminal, "os", SimpleNamespace(name="nt"))
    done = CliRunner().invoke(cli.main, ["doctor"])
    assert done.exit_code == 1 and "doctor needs Linux or macOS. On Windows run it in WSL" in done.output
    done = CliRunner().invoke(cli.main, ["chat", "nothing.gguf"])
    assert done.exit_code == 1 and "nothing.gguf is not there" in done.output


def test_chat_and_publish_load_without_what_windows_lacks():
    lacking = "import sys; sys.modules |= dict.fromkeys(('fcntl', 'readline', 'resource', 'pwd', 'termios'))"
    code = f"{lacking}\nimport saigakit.cli.chat, saigakit.publish, saigakit.kaggle.kernels"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_missing_package_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    shown = CliRunner().invoke(cli.main, ["chat", "model.gguf"])
    assert shown.exit_code == 1 and "pip install 'saigakit[all]'" in shown.output


def test_what_the_system_refuses_is_a_sentence(tmp_path, notebooks):
    (tmp_path / "file").write_text("")
    assert "file" in sentence("run", "--run-dir", tmp_path / "file" / "run", "--notebooks", notebooks)


def test_an_error_of_ours_keeps_its_traceback(monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(chat, "talk", broken)
    assert isinstance(CliRunner().invoke(cli.main, ["chat", "model.gguf"]).exception, ZeroDivisionError)


def test_a_saiga_error_is_printed_and_ends_with_1(monkeypatch):
    def refused(*_, **__):
        raise SaigaError("no")

    monkeypatch.setattr(chat, "talk", refused)
    shown = CliRunner().invoke(cli.main, ["chat", "model.gguf"])
    assert (shown.exit_code, shown.output) == (1, "error: no\n")
