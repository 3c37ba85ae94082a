"""Write report.html: the results table, the plot, examples and the time of each stage."""

import base64
import html
import json
from pathlib import Path
from string import Template

from saigakit import evaluate
from saigakit.core import install, manifest
from saigakit.core.files import write_text
from saigakit.evaluate import results

STAGES = tuple(install.STAGES)
TIMES_FILE = ".runner/times.json"  # seconds by stage, written by the runner

_PAGE = Template("""<!doctype html>
<html lang="ru">
<meta charset="utf-8">
<title>$title</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ccc; overflow-wrap: anywhere; }
img { max-width: 100%; }
</style>
<h1>$title</h1>
$table
<p><img alt="$alt" src="data:image/png;base64,$picture"></p>
<h2>Стадии <small>stages</small></h2>
<ul>$stages</ul>
<h2>Примеры <small>examples</small></h2>
$examples
</html>
""")


def write_report(run_dir: str | Path) -> Path:
    """Write one self-contained file. Raises SaigaError if 04_infer is not finished."""
    run_dir = Path(run_dir)
    compared = run_dir / evaluate.STAGE
    parameters = manifest.require_stage(compared, evaluate.STAGE)["parameters"]
    rows = results.read(compared)
    times_file = run_dir / TIMES_FILE
    times = json.loads(times_file.read_text(encoding="utf-8")) if times_file.is_file() else {}
    page = _PAGE.substitute(
        title=html.escape(f"saigakit: {parameters['model']}"),
        table=results.show_table(rows)._repr_html_(),
        alt=html.escape(str(results.show_table(rows))),
        picture=base64.b64encode((compared / "comparison.png").read_bytes()).decode("ascii"),
        stages="".join(_stage_item(run_dir, stage, times.get(stage)) for stage in STAGES),
        examples=results.examples_table(compared / "answers.jsonl", 8)._repr_html_(),
    )
    return write_text(run_dir / "report.html", page)


def _stage_item(run_dir: Path, stage: str, seconds: float | None) -> str:
    """A list item with a link to the executed notebook, if there is one, and its duration."""
    name = f'<a href="{stage}.html">{stage}</a>' if (run_dir / f"{stage}.html").is_file() else stage
    return f"<li>{name}{'' if seconds is None else f': {seconds:.0f} s'}</li>"
