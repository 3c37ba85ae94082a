"""Commands of a terminal into calls of the library."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from saigakit import __version__
from saigakit.cli.parameters import read_yaml, train_config, value
from saigakit.cli.terminal import Group
from saigakit.errors import SaigaError

_PARAMETERS = click.option(
    "-p", "--parameter", "parameters", type=(str, value), multiple=True, metavar="NAME VALUE",
    help="One parameter; may be given many times and wins over the file.",
)  # fmt: skip
_MODEL = click.option("--model", required=True, help="Name of the registry, Hub id or directory.")
_BASE_SOURCE = click.option("--base-source", help="Where the base model's weights are, if not on the Hub.")
_NOTEBOOKS = click.option("--notebooks", help="Directory of the four notebooks, if not beside the package.")


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="saigakit")
def main() -> None:
    """Fine-tune a Saiga model on Kaggle's free GPUs, run it as a 4-bit GGUF on a laptop.

    Begin with `saigakit demo`: all four notebooks on a small model, no GPU needed.
    """


@main.command()
@click.option("--run-dir", help="Where everything is written, if not in the run_dir of demo.yaml.")
@_NOTEBOOKS
def demo(run_dir: str | None, notebooks: str | None) -> None:
    """The whole way on a small model: records, training, GGUF, comparison.

    \b
    Example: saigakit demo --run-dir runs/demo
    """
    from saigakit.cli import runner

    notebooks_dir = Path(notebooks) if notebooks else runner.find_notebooks()
    _run(read_yaml(notebooks_dir / "params" / "demo.yaml"), run_dir, notebooks_dir)


def _run(values: dict[str, Any], run_dir: str | None, notebooks_dir: str | Path | None) -> None:
    """`run_dir` may stand in `values`, though it is of no single notebook."""
    from saigakit.cli import runner

    named = values.pop("run_dir", None)
    place = run_dir or named
    if not isinstance(place, str):
        raise SaigaError("Where shall the results go? Give --run-dir DIR, or run_dir in the YAML file.")
    runner.run(values, place, notebooks_dir=notebooks_dir)


@main.command()
@click.option("-f", "--file", "file", help="YAML file with the parameters.")
@_PARAMETERS
@click.option("--run-dir", help="Where everything is written; may stand in the file as run_dir.")
@_NOTEBOOKS
def run(file: str | None, parameters: Sequence[tuple[str, Any]], run_dir: str | None, notebooks: str | None) -> None:
    """The four notebooks on your records. What is finished and unchanged is not run again.

    \b
    Example: saigakit run -f my.yaml -p epochs 3 --run-dir runs/terms
    """
    _run((read_yaml(Path(file)) if file else {}) | dict(parameters), run_dir, notebooks)


@main.command()
@click.argument("file")
@click.option("--model", default="saiga2_7b", show_default=True, help="Whose tokens are counted.")
@_BASE_SOURCE
@click.option("--held-out", help="Held-out records of your own; without them a part of FILE is held out.")
@click.option("--max-seq-length", type=int, help="Tokens of the longest conversation.")
def check(file: str, **options: Any) -> None:  # noqa: ANN401
    """Looks at records as 01_format does, and keeps nothing.

    FILE is a file, a directory, a pattern like "part-*.jsonl", or a data set of the Hub (owner/name).

    \b
    Example: saigakit check records.jsonl --model saiga2_7b
    """
    from saigakit.data import length_histogram, report
    from saigakit.prompt import encoding

    is_here = bool(file) and Path(file).exists()
    records = str(Path(file).absolute()) if is_here else file  # "." is this directory, not the scratch one
    with tempfile.TemporaryDirectory() as scratch:
        stage = report.check_records(records=records, run_dir=scratch, **options)
        marked = report.examples(stage, encoding.load_tokenizer(options["model"], options["base_source"]))
        found = report.read(stage)
        bars = length_histogram.table(found["lengths"], found["max_seq_length"])
        parts = (marked, bars, report.summary(stage), report.near_pairs(stage), report.advice(stage))
        click.echo("\n\n".join(filter(None, map(str, parts))))


@main.command()
@click.option("-f", "--file", "file", required=True, help="YAML file with the fields of TrainConfig.")
@_PARAMETERS
@click.option("--nnodes", type=click.IntRange(min=1), default=1, help="Machines that train together.")
@click.option("--node-rank", type=click.IntRange(min=0), default=0, help="The number of this one, from 0.")
@click.option("--rdzv-endpoint", default="", help="HOST:PORT of the first one.")
def train(file: str, parameters: Sequence[tuple[str, Any]], nnodes: int, node_rank: int, rdzv_endpoint: str) -> None:
    """The stage 02_train alone; on several machines the same command on each, with its --node-rank.

    \b
    Example: saigakit train -f train.yaml -p epochs 3
    """
    from saigakit import train as training
    from saigakit.core import launch

    if nnodes > 1:
        launch.join_nodes(nnodes, node_rank, rdzv_endpoint)
    made = training.train_adapter(train_config(read_yaml(Path(file)) | dict(parameters), file))
    click.echo(f"adapter: {made}")


@main.command()
@_MODEL
@click.option(
    "--adapter", "adapters", multiple=True, metavar="PATH[:WEIGHT]",
    help='A finished 02_train, a directory or Hub id, or "released"; several are added up; none: the base alone.',
)  # fmt: skip
@click.option("--output", required=True, help="The file or directory to make.")
@click.option("--quant-type", "quant_types", multiple=True, help="Q4_K_M if not given; several come of one read.")
@click.option(
    "--merge-into", type=click.Choice(["auto", "original", "dequantized"]), help="Which base the adapter goes into."
)
@click.option("--importance", help="An importance matrix of llama.cpp's, or records to make one of.")
@click.option(
    "--format", "file_format", type=click.Choice(["gguf", "lora", "safetensors"]), default="gguf",
    help="gguf; lora: the adapter alone as a GGUF; safetensors: the merged model for transformers.",
)  # fmt: skip
@_BASE_SOURCE
def export(**options: Any) -> None:  # noqa: ANN401
    """Base model and adapter into quantised GGUF files; beside them Ollama's Modelfile, llama-server's command, a card.

    \b
    Example: saigakit export --model saiga2_7b --adapter runs/terms/02_train --output saiga.gguf
    """
    from saigakit.cli import export_options

    click.echo("\n".join(export_options.export(**options)))


@main.command()
@click.argument("file")
@click.option("--system", help="System prompt; left out, the one of the training records; '': none.")
@click.option("--temperature", type=click.FloatRange(min=0), help="0: always the likeliest token.")
@click.option("--n-ctx", type=click.IntRange(min=256), default=4096, show_default=True, help="Tokens of context.")
@click.option("--cache-type", type=click.Choice(["f16", "q8_0"]), default="f16", help="q8_0: half the memory for it.")
def chat(file: str, **options: Any) -> None:  # noqa: ANN401
    """Talks to a GGUF file. An empty line or Ctrl-D ends, Ctrl-C stops an answer.

    \b
    Example: saigakit chat runs/demo/03_merge_gguf/model.gguf
    """
    from saigakit.cli import chat

    chat.talk(file, **options)


@main.command()
@_MODEL
@click.option("--run-dir", required=True, help="Where 01_format, 02_train and 03_merge_gguf are.")
@click.option("--adapter", default="02_train", show_default=True)
@_BASE_SOURCE
@click.option("--max-examples", type=click.IntRange(min=1), default=240, show_default=True)
def evaluate(**options: Any) -> None:  # noqa: ANN401
    """The stage 04_infer alone: held-out texts to the base, the adapter and the GGUF.

    \b
    Example: saigakit evaluate --model saiga2_7b --run-dir runs/terms
    """
    from saigakit import evaluate as evaluation
    from saigakit.evaluate import results

    made = evaluation.compare(**options)
    click.echo(f"{results.table(results.read(made))}\n\nresults: {made}")


@main.command()
@click.argument("name")
@click.argument("files", nargs=-1)
@_PARAMETERS
def push(name: str, files: Sequence[str], parameters: Sequence[tuple[str, Any]]) -> None:
    """Starts a notebook on Kaggle, or uploads a data set: wheels with its FILES, example-data.

    \b
    Example: saigakit push wheels dist/saigakit-0.1.0-py3-none-any.whl
             saigakit push 02_train -p epochs 3
    """
    from saigakit.kaggle import kernels

    if kernels.is_dataset(name):
        kernels.push_dataset(name, [Path(file) for file in files])
    elif files:
        raise SaigaError(f"{name} is a notebook, which takes no files: {', '.join(files)}. Parameters are given by -p.")
    else:
        kernels.push(name, dict(parameters))


@main.command()
@click.argument("made", metavar="RUN_DIR")
@click.argument("name")
@click.option("--public", is_flag=True, help="Everybody can see it; private without this.")
@click.option("--replace", is_flag=True, help="Also where the repository holds something else.")
@click.option("--gguf", is_flag=True, help="The GGUF of 03_merge_gguf, not the adapter.")
@click.option("--kaggle", is_flag=True, help="The GGUF to Kaggle Models; NAME is the model's name there.")
def publish(made: str, name: str, public: bool, replace: bool, gguf: bool, kaggle: bool) -> None:
    """Puts the adapter or the GGUF of RUN_DIR on the Hugging Face Hub, or the GGUF on Kaggle, with a model card.

    RUN_DIR may be a GGUF of `saigakit export`, NAME is owner/name on the Hub. HF_TOKEN is the Hub's token.

    \b
    Example: saigakit publish runs/terms me/saiga2_7b_terms_lora
             saigakit publish runs/terms me/saiga2_7b_terms_gguf --gguf
             saigakit publish runs/terms saiga2-7b-terms --kaggle
    """
    from saigakit import publish as publishing

    model = Path(made) if (is_file := made.endswith(".gguf")) else Path(made) / "03_merge_gguf"
    if kaggle:
        where = publishing.push_to_kaggle(model, name, private=not public)
    elif gguf or is_file:
        where = publishing.push_to_hub(model, name, private=not public, replace=replace)
    else:
        where = publishing.push_adapter(Path(made) / "02_train", name, private=not public, replace=replace)
    click.echo(f"published: {where}")


@main.command()
@click.argument("kernel")
def watch(kernel: str) -> None:
    """Waits for a notebook on Kaggle and says how it ended.

    \b
    Example: saigakit watch 02_train
    """
    from saigakit.kaggle import kernels

    kernels.watch(kernel)


@main.command()
@click.argument("kernel")
@click.argument("directory")
def fetch(kernel: str, directory: str) -> None:
    """Downloads what a notebook on Kaggle has made.

    \b
    Example: saigakit fetch 03_merge_gguf runs/kaggle
    """
    from saigakit.kaggle import kernels

    click.echo(f"fetched: {kernels.fetch(kernel, directory)}")


@main.command()
def doctor() -> None:
    """This machine, the packages, and what each stage lacks.

    \b
    Example: saigakit doctor
    """
    from saigakit.core import install, manifest, workspace

    click.echo(f"{workspace.describe_machine()}\n\n{workspace.align(manifest.versions().items())}\n")
    for stage in install.STAGES:
        lacking = install.missing(install.needs(stage, kaggle=workspace.on_kaggle()))
        click.echo(f"{stage}: " + (f"lacks {', '.join(lacking)}; {install.pip_command(stage)}" if lacking else "ready"))
    lacking = install.missing(("papermill", "ipykernel", "nbconvert"))
    click.echo("run, demo: " + (f"lack {', '.join(lacking)}; pip install 'saigakit[run]'" if lacking else "ready"))
