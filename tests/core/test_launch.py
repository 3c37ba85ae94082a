"""Child processes: their output is echoed, their failure is one error, and none outlives its parent."""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from small_children import gone_within, python, started

from saigakit.cli import execution
from saigakit.core import install, launch, workspace
from saigakit.errors import SaigaError
from saigakit.kaggle import command_line


def test_the_output_of_a_child_is_echoed_in_order(capfd):
    launch.run(python("import sys; print('раз'); print('два', file=sys.stderr); print('три')"))
    assert capfd.readouterr().out.splitlines() == ["раз", "два", "три"]


def test_a_silent_child_is_reported_as_running(capfd, monkeypatch):
    monkeypatch.setattr(launch, "HEARTBEAT_S", 0.2)
    launch.run(python("import time; time.sleep(0.7)"))
    assert "still running" in capfd.readouterr().out


def test_a_failed_child_is_reported_with_its_last_lines():
    with pytest.raises(SaigaError, match=r"exit code 3.*\nlast words$"):
        launch.run(python("print('last words'); raise SystemExit(3)"))


def test_the_saiga_error_of_a_child_is_raised_in_the_parent():
    code = "from saigakit.core import launch\nfrom saigakit.errors import SaigaError\n"
    code += "with launch.child():\n    raise SaigaError('Нет места: нужно 5 GB.')"
    with pytest.raises(SaigaError, match=r"^Нет места: нужно 5 GB\.$"):
        launch.run(python(code))


def test_a_child_without_a_parent_prints_its_error():
    code = "from saigakit.core import launch\nfrom saigakit.errors import SaigaError\n"
    code += "with launch.child():\n    raise SaigaError('no disk')"
    ended = subprocess.run(python(code), capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (1, "error: no disk\n")


def test_a_killed_child_is_reported_with_memory_as_a_possible_cause():
    with pytest.raises(SaigaError, match=r"killed by signal 9\. The system does that when memory runs out"):
        launch.run(python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))


PARENT = """
import sys
from saigakit.core import launch
child = "import os; from saigakit.core import launch\\nwith launch.child():\\n    print(os.getpid(), flush=True)\\n    import time\\n    time.sleep(600)"
launch.run([sys.executable, "-c", child])
"""  # noqa: E501


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_child_outlives_its_parent(number):
    with started(PARENT) as parent:
        child = int(parent.stdout.readline())
        parent.send_signal(number)
        assert gone_within(child, 20)


def interrupted(code, *, saving, number=signal.SIGINT, times=1, after=""):
    """(seconds to the end, exit code, output) of a parent that is interrupted when the child is ready."""
    parent = "from saigakit.core import launch\nlaunch.PATIENCE_S = 0.5\n"
    parent += f"launch.run({python(code)!r}, saving={saving}){after}"
    with started(parent) as process:
        assert process.stdout.readline() == "ready\n"
        start = time.monotonic()
        process.send_signal(number)
        if times > 1:
            assert (
                process.stdout.readline()
                == "Ending after this step, with a checkpoint. Interrupt again to end at once.\n"
            )
            process.send_signal(number)
        printed = process.stdout.read()
    return time.monotonic() - start, process.returncode, printed


STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True)\n"
STUBBORN += "while True: time.sleep(1)"
GENTLE = """
import os, time
from saigakit.core import launch
from saigakit.errors import SaigaError
from saigakit.kaggle import command_line
with launch.child(), launch.ending_gently():
    os.write(1, b"ready\\n")  # in one piece: two processes write into one pipe
    while not launch.is_asked_to_end():
        time.sleep(0.01)
    time.sleep(SAVING)
    os.write(1, b"saved\\n")
    raise SaigaError("Call it again.")
"""


def test_a_child_that_ignores_the_request_to_end_is_killed():
    seconds, code, _ = interrupted(STUBBORN, saving=False)
    assert code != 0 and 0.5 < seconds < 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_saving_child_gets_more_time_to_end(number):
    seconds, code, printed = interrupted(GENTLE.replace("SAVING", "1.5"), saving=True, number=number)
    assert code in (-signal.SIGINT, 128 + signal.SIGTERM)
    assert printed.splitlines()[1:] == ["saved", "Call it again."]
    assert seconds > 1.5


def test_a_second_interrupt_ends_a_saving_child_at_once():
    seconds, _, printed = interrupted(GENTLE.replace("SAVING", "60"), saving=True, times=2)
    assert seconds < 5
    assert "saved" not in printed


def test_a_saving_child_may_finish_after_its_parent_has_ended():
    parent = f"from saigakit.core import launch\nlaunch.run({python(GENTLE.replace('SAVING', '0.5'))!r}, saving=True)"
    with started(parent) as process:
        assert process.stdout.readline() == "ready\n"
        child = psutil.Process(process.pid).children()[0].pid
        process.kill()
        assert not gone_within(child, 0.3)
        assert gone_within(child, 10)


def test_a_child_ends_when_nobody_reads_the_output_of_its_parent():
    parent = "from saigakit.core import launch\nlaunch.HEARTBEAT_S = 0.1\n"
    parent += f"launch.run({python(GENTLE.replace('SAVING', '0'))!r}, saving=True)"
    with started(parent) as process:
        while process.stdout.readline() != "ready\n":
            assert process.poll() is None
        child = psutil.Process(process.pid).children()[0].pid
        process.stdout.close()
        process.wait(20)
    assert gone_within(child, 5)


def test_all_distributed_processes_are_asked_to_end(tmp_path, monkeypatch):
    """torch.distributed.run would kill them 30 s after a signal."""
    pytest.importorskip("torch")
    (tmp_path / "gentle.py").write_text(GENTLE.replace("SAVING", "0.1"), encoding="utf-8")
    parent = "from saigakit.core import launch\nlaunch.distributed('gentle', [], processes=2)"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    with started(parent) as process:
        for _ in range(2):
            assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        printed = process.stdout.read().splitlines()
    assert printed.count("saved") == 2
    assert printed[-1] == "Call it again."


def test_a_long_silence_prints_few_lines(monkeypatch, capfd):
    monkeypatch.setattr(launch, "HEARTBEAT_S", 0.002)
    launch.run(python("import time; time.sleep(0.7)"))
    assert capfd.readouterr().out.count("still running") < 250  # a line per fiftieth of the run time, not 350


def test_two_machines_form_one_run(tmp_path, capfd, monkeypatch):
    pytest.importorskip("torch")
    code = "import os, torch; torch.distributed.init_process_group('gloo'); one = torch.ones(1)\n"
    code += "torch.distributed.all_reduce(one); print('rank', os.environ['RANK'], 'sum', int(one))\n"
    code += (
        "torch.distributed.barrier(); torch.distributed.destroy_process_group()"  # or the first to end would abort both
    )
    (tmp_path / "reduces.py").write_text(code, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    with ThreadPoolExecutor() as pool:
        machines = [launch.Nodes(2, rank, endpoint) for rank in range(2)]
        list(pool.map(lambda nodes: launch.distributed("reduces", [], processes=1, nodes=nodes), machines))
    said = capfd.readouterr().out.splitlines()
    assert {line for line in said if line.startswith("rank")} == {"rank 0 sum 2", "rank 1 sum 2"}


def test_machines_are_read_from_the_environment(monkeypatch):
    assert launch.Nodes.from_environment() is None
    monkeypatch.setenv("SAIGAKIT_NODES", "2 1 10.0.0.1:29500")
    assert launch.Nodes.from_environment() == launch.Nodes(2, 1, "10.0.0.1:29500")


@pytest.mark.parametrize("text", ["2", "2 2 10.0.0.1:29500", "0 0 host:1", "2 0 host"])
def test_a_malformed_saigakit_nodes_is_refused_with_an_example(monkeypatch, text):
    monkeypatch.setenv("SAIGAKIT_NODES", text)
    with pytest.raises(SaigaError, match='for example "2 0 10'):
        launch.Nodes.from_environment()


def test_each_of_two_processes_knows_its_rank(tmp_path, capfd, monkeypatch):
    pytest.importorskip("torch")
    code = "import os; os.write(1, 'rank {RANK} {WORLD_SIZE}\\n'.format(**os.environ).encode())"
    (tmp_path / "ranks.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    launch.distributed("ranks", [], processes=2)
    assert {line for line in capfd.readouterr().out.splitlines() if line.startswith("rank")} == {"rank 0 2", "rank 1 2"}


def test_children_inherit_the_start_of_the_session_on_kaggle(capfd, monkeypatch):
    monkeypatch.setenv("SAIGAKIT_SESSION_START", "")
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    launch.run(python("import os; print(os.environ['SAIGAKIT_SESSION_START'])"))
    assert float(capfd.readouterr().out) == workspace.session_start() <= workspace.uptime()


@pytest.mark.parametrize("set_by_user", [None, "glibc.malloc.arena_max=1"])
def test_training_on_a_cpu_keeps_freed_memory_unless_the_user_sets_otherwise(set_by_user, tmp_path, capfd, monkeypatch):
    if set_by_user is None:
        monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    else:
        monkeypatch.setenv("GLIBC_TUNABLES", set_by_user)
    monkeypatch.setattr(workspace, "gpus", list)
    (tmp_path / "tunables.py").write_text("import os; print(os.environ['GLIBC_TUNABLES'])")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    launch.distributed("tunables", [], processes=1)
    assert capfd.readouterr().out.strip() == (set_by_user or launch._KEEP_MEMORY)


@pytest.mark.parametrize(("set_by_user", "seen"), [(None, "passive 6000"), ("active", "active None")])
def test_threads_of_a_child_wait_passively_unless_the_user_sets_otherwise(set_by_user, seen, capfd, monkeypatch):
    if set_by_user is None:
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    else:
        monkeypatch.setenv("OMP_WAIT_POLICY", set_by_user)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)  # it would overrule the policy of the user
    launch.run(python("import os; print(os.environ['OMP_WAIT_POLICY'], os.environ.get('GOMP_SPINCOUNT'))"))
    assert capfd.readouterr().out == f"{seen}\n"


@pytest.fixture
def strangers_directory(tmp_path, monkeypatch):
    """The current directory has modules with the names of others; they leave a mark when they are imported."""
    for name in ("this", "random", "kaggle", "pip"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_no_child_imports_modules_of_the_current_directory(strangers_directory, capfd):
    pytest.importorskip("kaggle")
    launch.run([sys.executable, "-m", "this"])
    assert "The Zen of Python" in capfd.readouterr().out
    install.run_python(["-m", "pip", "--version"], "pip failed")
    assert "Kaggle CLI" in command_line.run("--version")
    assert not (strangers_directory / "ran").exists()
    subprocess.run([sys.executable, "-m", "this"], check=True)  # as it was
    assert (strangers_directory / "ran").exists()


def test_the_kernel_of_a_notebook_imports_no_modules_of_the_current_directory(strangers_directory):
    code = "import nbformat, random; random.Random(1)"
    manager = execution._kernel_class(0, sys.stderr, strangers_directory, execution.Screen())()
    environment = os.environ | manager.kernel_spec.env
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert not (strangers_directory / "ran").exists()


def test_the_output_of_a_child_is_echoed_without_control_characters(capsys):
    with pytest.raises(SaigaError, match="ended with exit code 3"):
        launch.run(python("print('\\x1b]0;evil\\x07loss \\x1b[1m0.5\\x1b[0m'); exit(3)"))
    assert capsys.readouterr().out == "]0;evilloss 0.5\n"
