"""The log of a training run."""

import json
import re

import pytest

from saigakit.train import run_state
from saigakit.train.run_state import Log

HOURS_12 = 12 * 3600


@pytest.mark.parametrize("step_s", [0.5, 30, 300])
def test_twelve_hours_print_at_most_300_progress_lines(monkeypatch, tmp_path, capsys, step_s):
    clock = [0.0]
    monkeypatch.setattr(run_state.time, "monotonic", lambda: clock[0])
    log, steps = Log(tmp_path / "log.jsonl", quiet=False), int(HOURS_12 / step_s)
    for step in range(1, steps + 1):
        clock[0] += step_s
        log.seconds += step_s
        log.report_progress(step, steps, 1.234, tokens=step * 1000, of=steps * 1000, more_s=0)
    lines = capsys.readouterr().out.splitlines()
    assert min(100, steps) <= len(lines) <= 300
    assert all(
        re.search(r"step \d+ of \d+: loss 1\.234, [\d,]+ tokens/s, .* left, ends at \d\d:\d\d$", line) for line in lines
    )
    assert lines[-1].startswith(f"step {steps} of {steps}")


def test_log_continues_after_the_entries_of_a_checkpoint(tmp_path):
    entries = [{"step": 0, "held_out_loss": 5.0}, {"step": 1, "loss": 4.0, "tokens": 9, "seconds": 2.5}]
    earlier = tmp_path / "checkpoint"
    earlier.mkdir()
    (earlier / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    log = Log(tmp_path / "log.jsonl", quiet=False, resumed_from=earlier)
    assert (log.seconds, log.held_out) == (2.5, entries[:1])
    log.write(step=2, held_out_loss=3.0)
    lines = (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [*entries, {"step": 2, "held_out_loss": 3.0}]
    assert [entry["step"] for entry in log.held_out] == [0, 2]


def test_quiet_log_neither_writes_nor_prints(tmp_path, capsys):
    log = Log(tmp_path / "log.jsonl", quiet=True)
    log.write(step=1, held_out_loss=3.0)
    log.print("aloud")
    assert not (tmp_path / "log.jsonl").exists()
    assert capsys.readouterr().out == ""
    assert len(log.held_out) == 1
