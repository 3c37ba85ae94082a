"""Define the commands of `saigakit` that work on Kaggle."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from saigakit.cli import runner, summary
from saigakit.cli.commands import main
from saigakit.cli.parameters import MODEL, NOTEBOOKS, PARAMETERS
from saigakit.core import workspace
from saigakit.errors import SaigaError
from saigakit.kaggle import command_line, datasets, kernels, notebook, whole_run
from saigakit.kaggle import wheels as wheel_set

_PYTHONS = click.Choice(["3.11", "3.12", "3.13"])  # of the wheels in pins.toml
_ACCELERATOR = click.option(
    "--accelerator", metavar="NAME", help="Accelerator of 02 and 04 instead of NvidiaTeslaT4, which is T4 x2"
)


@main.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@MODEL
@PARAMETERS
@click.option("--name", default="my-saiga", show_default=True, help="What data sets and notebooks are called on Kaggle")
@click.option("--run-dir", help="Directory for the results, runs/NAME by default")
@click.option("--sessions", type=click.IntRange(min=1), default=3, show_default=True, help="Sessions for the training")
@_ACCELERATOR
@click.option(
    "--offline",
    metavar="MODEL",
    help="Kaggle model, owner/model/framework/variation/version, for a run without internet",
)
@click.option("--dry-run", is_flag=True, help="Show quota and plan, and send nothing")
@NOTEBOOKS
def kaggle(
    files: Sequence[Path], model: str, parameters: Sequence[tuple[str, Any]], name: str, run_dir: str | None,
    dry_run: bool, notebooks: str | None, **options: Any,  # noqa: ANN401
) -> None:  # fmt: skip
    """Train on Kaggle and bring the GGUF file home.

    FILES are your records. Everything stays private. The same command goes on where an earlier one was stopped.

    \b
    Examples:
      saigakit kaggle records.jsonl --model saiga2_7b --dry-run
      saigakit kaggle records.jsonl --model saiga2_7b -p epochs 3 --name terms
    """
    directory = Path(run_dir or f"runs/{name}").absolute()
    found = Path(notebooks) if notebooks else runner.find_notebooks()
    stages = runner.read_stages(found, {"model": model, **dict(parameters)})
    whole = whole_run.WholeRun(
        files, directory, name, {stage.name: (stage.notebook, stage.given) for stage in stages}, **options
    )
    click.echo(f"{command_line.quota()}\n\n{whole.plan()}\n")
    if dry_run:
        return
    try:
        model_file = whole.run()
    except KeyboardInterrupt:
        click.echo(whole.describe_interruption(), err=True)
        raise
    report = summary.write_report(directory)
    talk = shlex.join(["saigakit", "chat", str(model_file)])
    click.echo(f"report: {report}\ncard:   {model_file.parent / 'README.md'}\nmodel:  {model_file}\ntalk:   {talk}")


@main.command()
@click.argument("name")
@click.argument("files", nargs=-1)
@PARAMETERS
@_ACCELERATOR
@click.option("--public", is_flag=True, help="Make it public instead of private")
def push(
    name: str, files: Sequence[str], parameters: Sequence[tuple[str, Any]], accelerator: str | None, public: bool
) -> None:
    """Start a notebook or upload a data set on Kaggle.

    NAME is a notebook, one of the data sets "wheels", which takes FILES, and "example-data", or "all" for everything
    in kaggle-metadata, in order.

    \b
    Examples:
      saigakit push wheels dist/saigakit-0.1.0-py3-none-any.whl
      saigakit push 02_train -p epochs 3
      saigakit push all --public
    """
    is_notebook = name != "all" and not notebook.is_dataset(name)
    if not is_notebook and (parameters or accelerator):
        raise SaigaError(f"{name} is not a notebook and has no parameters. Leave out -p and --accelerator.")
    if files and (is_notebook or name == "all"):
        raise SaigaError(f"{name} takes no files ({', '.join(files)}). Set parameters with -p.")
    if name == "all":
        whole_run.push_everything(public=public)
    elif is_notebook:
        kernels.push(name, dict(parameters), accelerator=accelerator, public=public)
    else:
        datasets.push_dataset(name, [Path(file) for file in files], public=public)


@main.command()
@click.argument("kernel")
def watch(kernel: str) -> None:
    """Wait for a notebook on Kaggle and report how it ended.

    \b
    Example:
      saigakit watch 02_train
    """
    kernels.watch(kernel)


@main.command()
@click.argument("kernel")
@click.argument("directory")
def fetch(kernel: str, directory: str) -> None:
    """Download the output of a notebook on Kaggle.

    \b
    Example:
      saigakit fetch 03_merge_gguf runs/kaggle
    """
    click.echo(f"fetched: {kernels.fetch(kernel, directory)}")


@main.command()
@click.argument("kernel")
def stop(kernel: str) -> None:
    """Stop the run of a notebook on Kaggle.

    \b
    Example:
      saigakit stop 02_train
    """
    kernels.stop(kernel)


@main.command()
def quota() -> None:
    """Show the hours of accelerators that are left on Kaggle this week.

    \b
    Example:
      saigakit quota
    """
    click.echo(command_line.quota())


@main.command()
@click.argument("directory")
@click.option("--python", type=_PYTHONS, default=wheel_set.KAGGLE_PYTHON, show_default=True, help="Python of Kaggle")
def wheels(directory: str, python: str) -> None:
    """Build saigakit's wheel and download those that Kaggle's image lacks.

    With all of them in the data set "wheels", the notebooks need no internet on Kaggle.

    \b
    Example:
      saigakit wheels dist
    """
    files = [wheel_set.own_wheel(Path(directory)), *wheel_set.download(Path(directory), python)]
    click.echo(workspace.align((file.name, f"{file.stat().st_size / workspace.GB:.3f} GB") for file in files))
    click.echo(f"\nnext: saigakit push wheels {shlex.quote(directory)}/*.whl")
