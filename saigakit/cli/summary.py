"""Write report.html: the results table, the plot, examples and the time of each stage."""

import base64
import json
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Template

from saigakit import evaluate
from saigakit.core import install, manifest
from saigakit.core.files import write_text
from saigakit.evaluate import results

STAGES = tuple(install.STAGES)
TIMES_FILE = ".runner/times.json"  # seconds by stage, written by the runner


def read_state(file: Path) -> dict[str, Any]:
    """What the runner has written; empty if it is missing or damaged, since it will be written again."""
    try:
        return dict(json.loads(file.read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        return {}


def write_report(run_dir: str | Path) -> Path:
    """Write one self-contained file. Raises SaigaError if 04_infer is not finished."""
    run_dir = Path(run_dir)
    compared = run_dir / evaluate.STAGE
    parameters = manifest.require_stage(compared, evaluate.STAGE)["parameters"]
    times = read_state(run_dir / TIMES_FILE)
    source = resources.files("saigakit.cli").joinpath("report.html.jinja").read_text(encoding="utf-8")
    page = Template(source, autoescape=True).render(
        title=f"saigakit: {parameters['model']}",
        table=results.show_table(results.read(compared)),
        picture=base64.b64encode((compared / "comparison.png").read_bytes()).decode("ascii"),
        stages=[(stage, (run_dir / f"{stage}.html").is_file(), times.get(stage)) for stage in STAGES],
        examples=results.examples_table(compared / "answers.jsonl", 8),
    )
    return write_text(run_dir / "report.html", page)
