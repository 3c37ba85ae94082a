"""A base without a chat template: what 01_format is given holds for training, export, evaluation and publishing."""

import json
import shutil
from pathlib import Path

import gguf
import pytest
import small_models
import small_trainings
from click.testing import CliRunner

from saigakit import data, evaluate, export, train
from saigakit.cli.commands import main
from saigakit.core import launch, manifest
from saigakit.core.files import sha256_of_text
from saigakit.errors import SaigaError
from saigakit.export.merge_plan import MergePlan
from saigakit.prompt import encoding
from saigakit.train import worker

TEMPLATE = small_models.SAIGA2.replace("bot", "assistant")


@pytest.fixture(scope="module")
def bare(tiny, tmp_path_factory):
    """The tiny Saiga's base, of which the registry knows nothing, without a template."""
    directory = tmp_path_factory.mktemp("bare") / "base"
    shutil.copytree(tiny / "base", directory)
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings.pop("chat_template", None)
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return str(directory)


@pytest.fixture(scope="module")
def template_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("template") / "own.jinja"
    file.write_text(TEMPLATE, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def records(tiny, tmp_path_factory):
    lines = (tiny / "records.jsonl").read_text(encoding="utf-8").splitlines()[:8]
    file = tmp_path_factory.mktemp("records") / "records.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    return str(file)


@pytest.fixture(scope="module")
def run_dir(records, bare, template_file, tmp_path_factory):
    """01_format with the template and the other stages without it; the file is gone by then."""
    directory = tmp_path_factory.mktemp("run")
    copied = shutil.copy(template_file, directory / "copied.jinja")
    data.check_records(model=bare, records=records, run_dir=directory, chat_template=str(copied))
    (directory / "copied.jinja").unlink()
    formatted = directory / "01_format"
    config = small_trainings.config_for(formatted / "train.jsonl", directory, model=bare, adapter=None)
    with pytest.MonkeyPatch.context() as patch:  # starting a child would take longer than this training
        patch.setattr(launch, "distributed", lambda _, arguments, **__: worker.main(Path(arguments[0])))
        train.train_adapter(config)
    export.merge_gguf(model=bare, run_dir=directory, quant_type="Q8_0")
    evaluate.compare(model=bare, run_dir=directory, max_examples=1)
    return directory


def test_a_base_without_a_template_needs_one(bare, records, tmp_path):
    with pytest.raises(SaigaError, match=r"has no chat template.*give a chat_template: saiga2, chatml or a file"):
        data.check_records(model=bare, records=records, run_dir=tmp_path)


def test_the_context_of_a_local_base_limits_the_length(bare, records, template_file, run_dir):
    assert manifest.read(run_dir / "01_format")["parameters"]["max_seq_length"] == 1024
    with pytest.raises(SaigaError, match=r"max_seq_length=1025 is over the context length of .*, 1024 tokens; use"):
        data.check_records(model=bare, records=records, run_dir=run_dir, max_seq_length=1025)


def test_the_manifest_of_01_format_has_the_template_and_its_hash(run_dir):
    made = manifest.read(run_dir / "01_format")
    assert TEMPLATE in made["chat_template"]
    assert made["chat_template_sha256"] == sha256_of_text(made["chat_template"]) == made["inputs"]["chat_template"]


def test_the_gguf_has_the_chosen_template(run_dir):
    reader = gguf.GGUFReader(run_dir / "03_merge_gguf" / "model.gguf")
    assert "<s>assistant" in reader.fields["tokenizer.chat_template"].contents()


def test_training_and_evaluation_use_the_chosen_template(run_dir, bare, template_file):
    chosen = encoding.load_tokenizer(bare, None, str(template_file))
    lines = (run_dir / "01_format" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    tokens = sum(len(encoding.encode(json.loads(line)["messages"], chosen)["input_ids"]) for line in lines)
    logged = [entry for entry in train.read_log(run_dir / "02_train") if "tokens" in entry]
    assert logged[-1]["tokens"] == tokens
    assert manifest.read(run_dir / "02_train")["inputs"]["chat_template"] == sha256_of_text(chosen.chat_template)
    assert {row["name"] for row in evaluate.read(run_dir / "04_infer")} == {"before", "after", "Q8_0"}


def test_a_base_without_an_adapter_gets_the_template_of_01_format(run_dir, bare):
    plan = MergePlan.of(bare, None, run_dir=run_dir)
    assert "<s>assistant" in plan.read_tokenizer().chat_template
    with pytest.raises(SaigaError, match="has no chat template"):
        MergePlan.of(bare, None).read_tokenizer()


def test_the_template_lies_next_to_the_adapter(run_dir):
    assert TEMPLATE in (run_dir / "02_train" / "chat_template.jinja").read_text(encoding="utf-8")


def test_another_template_makes_training_again(run_dir, bare, records, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "01_format")
    other = small_models.SAIGA2
    data.check_records(model=bare, records=records, run_dir=copy, chat_template=other)
    config = small_trainings.config_for(copy / "01_format" / "train.jsonl", copy, model=bare, adapter=None)
    with pytest.raises(SaigaError, match=r"made differently.*chat_template"):
        train.train_adapter(config)


def test_check_and_export_take_a_template(bare, records, template_file, tmp_path):
    option = ["--model", bare, "--chat-template", str(template_file)]
    said = CliRunner().invoke(main, ["check", records, *option])
    assert said.exit_code == 0 and "assistant" in said.output, said.output
    output = tmp_path / "x.gguf"
    said = CliRunner().invoke(main, ["export", *option, "--output", str(output), "--quant-type", "Q8_0"])
    assert said.exit_code == 0, said.output
    assert "<s>assistant" in gguf.GGUFReader(output).fields["tokenizer.chat_template"].contents()


def test_an_unknown_template_is_named_before_the_records_are_read(bare, tmp_path):
    (tmp_path / "records.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(SaigaError, match=r"chat_template='saiga9' is unknown. Give saiga2 or chatml, or an existing"):
        data.check_records(
            model=bare, records=str(tmp_path / "records.jsonl"), run_dir=tmp_path, chat_template="saiga9"
        )


def test_a_broken_template_is_named_with_its_file(bare, tmp_path):
    file = tmp_path / "broken.jinja"
    file.write_text("{{ broken }", encoding="utf-8")
    with pytest.raises(SaigaError, match=rf"The chat template in {file} is broken: unexpected"):
        encoding.load_tokenizer(bare, None, str(file))
