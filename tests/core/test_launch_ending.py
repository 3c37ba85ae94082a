"""A child that is asked to end gets the time that it needs, and only children are killed."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from small_children import gone_within, in_a_terminal, python, read_until, started

SAVED = "from pathlib import Path\nPath({file!r}).write_text('saved')\n"
# Reports how long it needs, and ends `seconds` after the request.
CHILD = """
import os, time
from saigakit.core import launch
with launch.child(), launch.ending_gently({needed}):
    os.write(1, b"ready\\n")
    while not launch.is_asked_to_end():
        time.sleep(0.01)
    time.sleep({seconds})
"""
AT_ONCE = "Ending at once: there is nothing to save yet.\n"


def parent_of(child):
    return f"from saigakit.core import launch\nlaunch.PATIENCE_S = 0.5\nlaunch.run({python(child)!r}, saving=True)"


def interrupted(child, *signals):
    """(seconds, exit code, output) of a parent that gets `signals` when the child is ready."""
    with started(parent_of(child)) as process:
        assert process.stdout.readline() == "ready\n"
        start = time.monotonic()
        for number in signals:
            process.send_signal(number)
            time.sleep(0.1)
        printed = process.stdout.read()
    return time.monotonic() - start, process.returncode, printed


@pytest.mark.parametrize("saves", [", launch.ending_gently(0)", ""])
def test_a_child_with_nothing_to_save_ends_at_once_and_says_so(saves):
    child = f"import time\nfrom saigakit.core import launch\nwith launch.child(){saves}:\n    print('ready')\n"
    seconds, _, printed = interrupted(child + "    time.sleep(600)", signal.SIGINT)
    assert printed == AT_ONCE
    assert seconds < 3


def test_the_sentence_says_how_long_the_child_needs():
    _, _, printed = interrupted(CHILD.format(needed=6.2, seconds=0), signal.SIGINT)
    assert printed == "Ending after this step, with a checkpoint: up to 7 s. Interrupt again to end at once.\n"


def test_a_child_that_takes_longer_than_it_said_is_killed():
    seconds, _, _ = interrupted(CHILD.format(needed=0.1, seconds=60), signal.SIGINT)
    assert 0.5 < seconds < 10


def test_a_child_may_take_somewhat_longer_than_it_said(tmp_path):
    child = CHILD.format(needed=1, seconds=1.5) + SAVED.format(file=str(tmp_path / "saved"))
    interrupted(child, signal.SIGINT)
    assert (tmp_path / "saved").exists()


def test_a_child_without_a_parent_ends_when_it_has_taken_longer_than_it_said():
    slow = CHILD.format(needed=0.1, seconds=60).replace("with launch", "launch.PATIENCE_S = 0.5\nwith launch")
    with started(parent_of(slow)) as process:
        assert process.stdout.readline() == "ready\n"
        child = psutil.Process(process.pid).children()[0].pid
        process.kill()
        assert gone_within(child, 10)


def test_closing_the_terminal_lets_the_child_save(tmp_path):
    child = CHILD.format(needed=2, seconds=1) + SAVED.format(file=str(tmp_path / "saved"))
    with in_a_terminal(parent_of(child)) as (process, terminal):
        read_until(terminal, "ready")
        os.close(terminal)
        process.wait(20)
    assert (tmp_path / "saved").exists()


def test_a_hangup_is_no_second_interrupt(tmp_path):
    """A closed terminal and its shell send one each."""
    child = CHILD.format(needed=2, seconds=1) + SAVED.format(file=str(tmp_path / "saved"))
    _, code, _ = interrupted(child, signal.SIGHUP, signal.SIGHUP)
    assert code == 128 + signal.SIGHUP
    assert (tmp_path / "saved").exists()


def test_a_run_under_nohup_survives_the_end_of_its_terminal(tmp_path):
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    with started(code + parent_of(CHILD.format(needed=2, seconds=0))) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(signal.SIGINT)


def test_no_process_is_killed_that_has_the_number_of_an_ended_child():
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as other:
        child = "import os; from pathlib import Path\nhere = Path(os.environ['SAIGAKIT_ERROR_FILE'])\n"
        child += f"here.with_name('{other.pid}.pid').touch()\n" + CHILD.format(needed=60, seconds=60)
        seconds, _, _ = interrupted(child, signal.SIGINT, signal.SIGINT)
        is_alive = other.poll() is None
        other.kill()
    assert is_alive
    assert seconds < 5


def test_a_child_in_a_session_of_its_own_is_killed():
    child = CHILD.format(needed=60, seconds=60).replace("with", "if os.fork() == 0: os.setsid()\nwith")
    child = child.replace('b"ready\\n"', 'f"{os.getpid()}\\n".encode()')
    with started(parent_of(child)) as process:
        children = [int(process.stdout.readline()) for _ in range(2)]
        process.send_signal(signal.SIGINT)
        assert "Ending after this step" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert all(gone_within(child, 5) for child in children)
