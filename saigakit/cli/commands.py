"""Define the commands of `saigakit`."""

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from saigakit import __version__, infer
from saigakit import evaluate as evaluation
from saigakit import export as exporting
from saigakit import publish as publishing
from saigakit import train as training
from saigakit.cli import chat as terminal_chat
from saigakit.cli import doctor as diagnosis
from saigakit.cli import export_options, runner
from saigakit.cli.parameters import MODEL, NOTEBOOKS, PARAMETERS, read_yaml
from saigakit.cli.terminal import Group
from saigakit.config import TrainConfig
from saigakit.core import launch
from saigakit.core.display import count
from saigakit.core.files import scratch
from saigakit.data import length_histogram, report
from saigakit.errors import SaigaError
from saigakit.evaluate import results
from saigakit.prompt import encoding

_BASE_SOURCE = click.option("--base-source", help="Directory of the base model, instead of the Hub")
_CHAT_TEMPLATE = click.option("--chat-template", help="saiga2, chatml or a file, instead of the model's own template")

_SYSTEM = click.option("--system", help="System prompt, instead of the one stored in FILE; '' for none")
_N_CTX = click.option(
    "--n-ctx", type=click.IntRange(min=256), default=4096, show_default=True, help="Context length in tokens"
)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="saigakit")
def main() -> None:
    """Fine-tune a Saiga model on Kaggle's free GPUs and run it as a 4-bit GGUF on a laptop.

    To see all four notebooks run on a small model, without a GPU:

        saigakit demo
    """


@main.command()
@click.option(
    "--task", type=click.Choice(["terms", "tools"]), default="terms", show_default=True,
    help="Extract terms with their definitions, or call functions",
)  # fmt: skip
@click.option("--run-dir", help="Directory for all results, instead of runs/demo or runs/demo_tools")
@NOTEBOOKS
def demo(task: str, run_dir: str | None, notebooks: str | None) -> None:
    """Run the four notebooks on a small model, without a GPU.

    \b
    Examples:
      saigakit demo
      saigakit demo --task tools
    """
    notebooks_dir = Path(notebooks) if notebooks else runner.find_notebooks()
    file = {"terms": "demo.yaml", "tools": "demo_tools.yaml"}[task]
    _run(read_yaml(notebooks_dir / "params" / file), run_dir, notebooks_dir)


def _run(values: dict[str, Any], run_dir: str | None, notebooks_dir: str | Path | None) -> None:
    """Take run_dir out of `values`: it is not a parameter of a single notebook."""
    in_file = values.pop("run_dir", None)
    run_dir = run_dir or in_file
    if not isinstance(run_dir, str):
        raise SaigaError("No directory for the results: give --run-dir DIR, or run_dir in the YAML file.")
    runner.run(values, run_dir, notebooks_dir=notebooks_dir)


@main.command()
@click.option("-f", "--file", "file", help="YAML file with parameters")
@PARAMETERS
@click.option("--run-dir", help="Directory for all results, instead of run_dir in the file")
@NOTEBOOKS
def run(file: str | None, parameters: Sequence[tuple[str, Any]], run_dir: str | None, notebooks: str | None) -> None:
    """Run the four notebooks on your records.

    Stages that are up to date are reused.

    \b
    Examples:
      saigakit run -f my.yaml
      saigakit run -f my.yaml -p epochs 3 --run-dir runs/terms
    """
    _run((read_yaml(Path(file)) if file else {}) | dict(parameters), run_dir, notebooks)


@main.command()
@click.argument("files", nargs=-1, required=True)
@click.option("--model", default="saiga2_7b", show_default=True, help="Model whose tokenizer counts the tokens")
@_BASE_SOURCE
@_CHAT_TEMPLATE
@click.option("--held-out", multiple=True, help="Evaluation records, instead of a share of FILES; repeatable")
@click.option("--max-seq-length", type=int, help="Maximum tokens of a conversation")
def check(files: Sequence[str], held_out: Sequence[str], **options: Any) -> None:  # noqa: ANN401
    """Check records as 01_format does, without keeping anything. One record is enough.

    FILES are files, directories, patterns like "part-*.jsonl", or data sets on the Hub (owner/name).

    \b
    Example:
      saigakit check records.jsonl --model saiga2_7b
    """
    # "." is this directory, not the temporary one
    records = [str(Path(file).absolute()) if file and Path(file).exists() else file for file in files]
    with scratch() as directory:
        stage = report.check_records(
            records=records, held_out=held_out or None, run_dir=directory, may_lack_held_out=True, **options
        )
        of_tokenizer = (options[name] for name in ("model", "base_source", "chat_template"))
        marked = report.examples(stage, encoding.load_tokenizer(*of_tokenizer))
        found = report.read_report(stage)
        bars = length_histogram.make_table(found["lengths"], found["max_seq_length"])
        parts = (marked, bars, report.summary(stage), report.near_pairs(stage), report.advice(stage))
        click.echo("\n\n".join(filter(None, map(str, parts))))


@main.command()
@click.option("-f", "--file", "file", required=True, help="YAML file with the fields of TrainConfig")
@PARAMETERS
@click.option("--nnodes", type=click.IntRange(min=1), default=1, show_default=True, help="Number of machines")
@click.option("--node-rank", type=click.IntRange(min=0), default=0, show_default=True, help="Number of this machine")
@click.option("--rdzv-endpoint", default="", help="HOST:PORT of the machine with rank 0")
def train(file: str, parameters: Sequence[tuple[str, Any]], nnodes: int, node_rank: int, rdzv_endpoint: str) -> None:
    """Train an adapter: the stage 02_train alone.

    On several machines, run the same command on each with its --node-rank.

    \b
    Examples:
      saigakit train -f train.yaml -p epochs 3
      saigakit train -f train.yaml --nnodes 2 --node-rank 0 --rdzv-endpoint 10.0.0.1:29500
      saigakit train -f train.yaml --nnodes 2 --node-rank 1 --rdzv-endpoint 10.0.0.1:29500
    """
    if nnodes > 1:
        launch.join_nodes(nnodes, node_rank, rdzv_endpoint)
    made = training.train_adapter(TrainConfig.from_json(read_yaml(Path(file)) | dict(parameters), file))
    click.echo(f"adapter: {made}")


@main.command()
@MODEL
@click.option(
    "--adapter", "adapters", multiple=True, metavar="PATH[:WEIGHT]",
    help='Finished 02_train, directory, Hub id or "released"; repeat it to sum adapters, omit it for the base alone',
)  # fmt: skip
@click.option("--output", required=True, help="File or directory to create")
@click.option("--quant-type", "quant_types", multiple=True, help="Quantisation type, Q4_K_M by default; repeatable")
@click.option("--merge-into", type=click.Choice(["auto", "original", "dequantized"]), help="Base weights to merge into")
@click.option("--importance", help="Importance matrix of llama.cpp, or records to compute one from")
@click.option(
    "--format", "file_format", type=click.Choice(["gguf", "lora", "safetensors"]), default="gguf", show_default=True,
    help="Merged GGUF, LoRA GGUF, or merged model for transformers",
)  # fmt: skip
@_BASE_SOURCE
@click.option("--tokenizer", metavar="DIR", help="Tokenizer and template of the training, instead of those found")
@_CHAT_TEMPLATE
def export(**options: Any) -> None:  # noqa: ANN401
    """Merge base and adapter into GGUF files.

    An Ollama Modelfile, a llama-server command and a model card are written next to them.

    \b
    Examples:
      saigakit export --model saiga2_7b --adapter runs/terms/02_train --output saiga.gguf
      saigakit export --model saiga2_7b --adapter released --output saiga.gguf --quant-type Q8_0 --quant-type Q4_K_M
      saigakit export --model saiga2_7b --adapter runs/terms/02_train --output merged --format safetensors
    """
    click.echo("\n".join(export_options.export(**options)))


@main.command()
@click.argument("file")
@_SYSTEM
@click.option("--temperature", type=click.FloatRange(min=0), help="Sampling temperature; 0 for greedy answers")
@_N_CTX
@click.option(
    "--cache-type", type=click.Choice(["f16", "q8_0"]), default="f16", show_default=True,
    help="Number format of the KV cache; q8_0 halves its memory",
)  # fmt: skip
@_CHAT_TEMPLATE
@click.option("--lines", is_flag=True, help="Every line of a pipe is a question, instead of all of it")
def chat(file: str, **options: Any) -> None:  # noqa: ANN401
    """Chat with a GGUF file. Enter sends, Alt-Enter adds a line; /help lists the commands, /bye leaves.

    \b
    Examples:
      saigakit chat runs/demo/03_merge_gguf/model.gguf
      saigakit chat saiga.gguf --system "Отвечай одним словом." --temperature 0
    """
    terminal_chat.talk(file, **options)


@main.command()
@click.argument("file")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; this machine's own")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="Port; 0 takes a free one")
@_N_CTX
@click.option(
    "--parallel", type=click.IntRange(1, 64), default=2, show_default=True,
    help="Answers at once, each with its own --n-ctx; others wait",
)  # fmt: skip
def serve(file: str, **options: Any) -> None:  # noqa: ANN401
    """Serve a GGUF file to programs that use OpenAI's API: chat completions, streams, JSON schemas, function calls.

    \b
    Example:
      saigakit serve saiga.gguf --parallel 4
    """
    from saigakit.infer import server  # needs xllamacpp, starlette and uvicorn

    server.serve(file, **options)


@main.command()
@click.argument("file")
@click.option("--schema", "schema_file", required=True, type=_FILE, help="JSON schema of an answer")
@click.option(
    "--input", "texts", required=True, type=_FILE, help="Texts: a JSON string, or an object with text, a line"
)
@click.option("--output", required=True, type=click.Path(path_type=Path), help="File to append the answers to")
@click.option("--quote", "quotes", multiple=True, metavar="NAME", help="Property that can only be words of the text")
@_SYSTEM
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Longest answer; twice the text by default")
@_N_CTX
def extract(file: str, schema_file: Path, texts: Path, output: Path, n_ctx: int, **options: Any) -> None:  # noqa: ANN401
    """Answer every text of a file with a value that fits a JSON schema.

    A property with "x-quote": true in the schema is a literal quotation of the text, as with --quote. The same command
    goes on where an earlier one was stopped. An output line is {"index", "value", "quotes"} or {"index", "error"}.

    \b
    Example:
      saigakit extract saiga.gguf --schema terms.json --input texts.jsonl --output answers.jsonl --quote term
    """
    try:
        schema = json.loads(schema_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SaigaError(f"{schema_file} is not JSON: {error}.") from None
    with closing(infer.load(file, n_ctx=n_ctx)) as llm:
        counts = infer.extract_file(llm, schema, texts, output, **options)
    click.echo(f"{count(counts['value'], 'answer')} and {count(counts['error'], 'error')}: {output}")


@main.command()
@MODEL
@click.option("--run-dir", required=True, help="Directory with 01_format, 02_train and 03_merge_gguf")
@click.option("--adapter", default=training.STAGE, show_default=True, help="Adapter, in --run-dir or elsewhere")
@_BASE_SOURCE
@click.option(
    "--max-examples", type=click.IntRange(min=1), default=240, show_default=True, help="Maximum number of questions"
)
def evaluate(**options: Any) -> None:  # noqa: ANN401
    """Compare base, adapter and GGUF: the stage 04_infer alone.

    \b
    Example:
      saigakit evaluate --model saiga2_7b --run-dir runs/terms
    """
    made = evaluation.compare(**options)
    click.echo(f"{results.show_table(results.read(made))}\n\nresults: {made}")


@main.command()
@click.argument("made", metavar="RUN_DIR")
@click.argument("name")
@click.option("--public", is_flag=True, help="Make it public instead of private")
@click.option("--replace", is_flag=True, help="Replace the contents of an existing repository on the Hub")
@click.option("--gguf", is_flag=True, help="Publish the GGUF of 03_merge_gguf instead of the adapter")
@click.option("--kaggle", is_flag=True, help="Publish the GGUF on Kaggle Models under this NAME")
def publish(made: str, name: str, public: bool, replace: bool, gguf: bool, kaggle: bool) -> None:
    """Publish an adapter or a GGUF on the Hub or on Kaggle.

    RUN_DIR may also be a GGUF file of `saigakit export`. NAME on the Hub is owner/name, and the token is HF_TOKEN.
    A model card is written for it.

    \b
    Examples:
      saigakit publish runs/terms me/saiga2_7b_terms_lora
      saigakit publish runs/terms me/saiga2_7b_terms_gguf --gguf
      saigakit publish runs/terms saiga2-7b-terms --kaggle
    """
    model = Path(made) if (is_file := made.endswith(".gguf")) else Path(made) / exporting.STAGE
    if kaggle and replace:
        raise SaigaError("--replace is for the Hub: on Kaggle Models a new version is added, and old ones stay.")
    if kaggle:
        address = publishing.push_to_kaggle(model, name, private=not public)
    elif gguf or is_file:
        address = publishing.push_to_hub(model, name, private=not public, replace=replace)
    else:
        address = publishing.push_adapter(Path(made) / training.STAGE, name, private=not public, replace=replace)
    click.echo(f"published: {address}")


@main.command()
def doctor() -> None:
    """Check this machine, its packages and credentials: what is missing, and what to do about it.

    \b
    Example:
      saigakit doctor
    """
    diagnosis.report()
