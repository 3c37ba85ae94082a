"""Children: their output, their failure as a sentence, and that none outlives its parent."""

import signal
import subprocess
import sys
import time

import psutil
import pytest

from saigakit import launch
from saigakit.errors import SaigaError


def python(code):
    return [sys.executable, "-c", code]


def gone_within(process_id, seconds):
    try:
        psutil.Process(process_id).wait(seconds)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return False
    return True


def test_what_the_child_prints_is_echoed_in_order(capfd):
    launch.run(python("import sys; print('раз'); print('два', file=sys.stderr); print('три')"))
    assert capfd.readouterr().out.splitlines() == ["раз", "два", "три"]


def test_a_silent_child_is_said_to_run(capfd, monkeypatch):
    monkeypatch.setattr(launch, "HEARTBEAT_S", 0.2)
    launch.run(python("import time; time.sleep(0.7)"))
    assert "still running" in capfd.readouterr().out


def test_a_failed_child_is_told_with_its_last_lines():
    with pytest.raises(SaigaError, match=r"exit code 3.*\nlast words$"):
        launch.run(python("print('last words'); raise SystemExit(3)"))


def test_a_childs_own_sentence_is_the_parents():
    code = "from saigakit import launch\nfrom saigakit.errors import SaigaError\n"
    code += "with launch.child():\n    raise SaigaError('Нет места: нужно 5 GB.')"
    with pytest.raises(SaigaError, match=r"^Нет места: нужно 5 GB\.$"):
        launch.run(python(code))


def test_a_child_without_a_parent_prints_its_sentence():
    code = "from saigakit import launch\nfrom saigakit.errors import SaigaError\n"
    code += "with launch.child():\n    raise SaigaError('no disk')"
    ended = subprocess.run(python(code), capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (1, "error: no disk\n")


def test_a_killed_child_is_told_as_one_and_memory_is_suspected():
    with pytest.raises(SaigaError, match=r"killed by signal 9\. That is what the system does when memory runs out"):
        launch.run(python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))


PARENT = """
import sys
from saigakit import launch
child = "import os; from saigakit import launch\\nwith launch.child():\\n    print(os.getpid(), flush=True)\\n    import time\\n    time.sleep(600)"
launch.run([sys.executable, "-c", child])
"""  # noqa: E501


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_child_outlives_its_parent(number):
    with subprocess.Popen(python(PARENT), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as parent:
        child = int(parent.stdout.readline())
        parent.send_signal(number)
        assert gone_within(child, 20)


def test_a_child_that_ignores_the_request_to_end_is_killed(monkeypatch):
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True)\n"
    code += "while True: time.sleep(1)"
    process = subprocess.Popen(python(code), stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == "ready\n"
    monkeypatch.setattr(launch, "PATIENCE_S", 0.5)
    launch._end(process)
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL


def test_two_processes_know_their_ranks(tmp_path, capfd, monkeypatch):
    pytest.importorskip("torch")
    (tmp_path / "ranks.py").write_text("import os; print('rank', os.environ['RANK'], os.environ['WORLD_SIZE'])")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    launch.distributed("ranks", [], processes=2)
    assert {line for line in capfd.readouterr().out.splitlines() if "rank" in line} == {"rank 0 2", "rank 1 2"}


def test_children_count_their_hours_from_the_sessions_start(capfd):
    launch.run(python("import os; print(os.environ['SAIGAKIT_SESSION_START'])"))
    assert float(capfd.readouterr().out) <= time.time()
