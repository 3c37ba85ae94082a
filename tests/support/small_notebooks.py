"""Write four notebooks that run in seconds: each makes its stage from a text and the previous stage."""

import json
from pathlib import Path

import psutil

RUN = "import sys; from saigakit.cli import runner; runner.run({}, sys.argv[1], notebooks_dir=sys.argv[2])"
# Signals that it has started, and waits until it may continue.
WAIT = """\
import os, time
from pathlib import Path
(Path(run_dir) / ".02_train.partial").mkdir(exist_ok=True)
(Path(run_dir) / "started").write_text(str(os.getpid()))
while not (Path(run_dir) / "go").exists():
    time.sleep(0.05)"""
STAGES = ("01_format", "02_train", "03_merge_gguf", "04_infer")
_MAKE = """\
import json
from pathlib import Path
from saigakit.core import manifest

final = Path(run_dir) / {stage!r}
earlier = [manifest.read(Path(run_dir) / name)["outputs"] for name in {earlier!r}]
made_of = dict(stage=final.name, parameters=dict(model="saiga_tiny", **{values}), inputs=dict(earlier=earlier))
print("cell of", final.name)
if not manifest.is_up_to_date(final, **made_of):
    with manifest.making(final, **made_of) as made:
        (made / "out.txt").write_text(repr(made_of))
        {more}
"""
_ROW = dict.fromkeys(("exact", "json_valid", "f1"), 0.5) | {"name": "before", "n": 1, "tokens_per_s": 9.0, "bytes": 1}
_LINE = {"prompt": "?", "reference": "[]", "answers": {"before": "[]"}, "exact": {"before": True}}
_RESULTS = f"""\
(made / "results.json").write_text({json.dumps([_ROW])!r})
        (made / "answers.jsonl").write_text({json.dumps(_LINE)!r})
        (made / "comparison.png").write_bytes(b"png")"""
_PARAMETERS = {"01_format": {"records": "none.jsonl"}, "02_train": {"learning_rate": 1e-3}, "04_infer": {"text": "a"}}


def write(directory: Path) -> Path:
    directory.mkdir(parents=True)
    for stage in STAGES:
        values = _PARAMETERS.get(stage, {})
        assigned = [f"{name} = {value!r}" for name, value in values.items()]
        make = _MAKE.format(
            stage=stage,
            earlier=list(STAGES[: STAGES.index(stage)][-1:]),
            values=f"dict({', '.join(f'{name}={name}' for name in values)})",
            more=_RESULTS if stage == "04_infer" else "pass",
        )
        save(directory / f"{stage}.ipynb", ["\n".join(['run_dir = "."', 'model = "saiga_tiny"', *assigned]), make])
    return directory


def save(file: Path, sources: list[str]) -> None:
    """The first cell holds the parameters."""
    cells = [
        {
            "cell_type": "code",
            "id": f"cell{index}",
            "source": source,
            "outputs": [],
            "execution_count": None,
            "metadata": {} if index else {"tags": ["parameters"]},
        }
        for index, source in enumerate(sources)
    ]
    kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    content = {"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": kernelspec}, "cells": cells}
    file.write_text(json.dumps(content), encoding="utf-8")


def sources(file: Path) -> list[str]:
    return [cell["source"] for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]]


def insert(file: Path, source: str, place: int = 1) -> None:
    """Add a cell, by default after the parameters."""
    cells = sources(file)
    save(file, [*cells[:place], source, *cells[place:]])


def has_ended(process):
    psutil.wait_procs([process], timeout=20)
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
