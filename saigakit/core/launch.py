"""A command or a training config into a running child: its output line by line, its failure as one sentence."""

import contextlib
import math
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from saigakit.core import workspace
from saigakit.errors import SaigaError

HEARTBEAT_S = 20  # of silence, after which a line says that the child still runs; later a fiftieth of its time
PATIENCE_S = 10.0  # between the request to end and the kill
SAVING_PATIENCE_S = 900.0  # the same for a child that finishes its step and saves: minutes on a slow GPU
_ERROR_FILE = "SAIGAKIT_ERROR_FILE"
_NODES = "SAIGAKIT_NODES"
_LAST_LINES = 40
# Where the user has not set them. OpenMP threads that wait for each other sleep after 0.1 ms instead of spinning.
# Measured in tokens/s of the demo's training on two cores, idle and next to two busy processes: always spinning 277 and
# 13 to 27, this 340 and 151, never spinning 214 and 190.
_DEFAULTS = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "6000"}


@dataclass(frozen=True)
class Nodes:
    """Several machines as one run: how many, which is this one (from 0), and HOST:PORT of the first."""

    count: int
    rank: int
    endpoint: str

    @classmethod
    def of_environment(cls) -> Self | None:
        """SAIGAKIT_NODES="2 0 10.0.0.1:29500" is the first of two machines; None where it is not set.

        Raises SaigaError for another form.
        """
        if not (text := os.environ.get(_NODES, "")):
            return None
        found = re.fullmatch(r"([1-9]\d*) (\d+) (\S+:\d+)", text.strip())
        if found is None or int(found[2]) >= int(found[1]):
            raise SaigaError(
                f"{_NODES}={text!r}: write the number of machines, the number of this one from 0, and HOST:PORT of the "
                'first, for example "2 0 10.0.0.1:29500".'
            )
        return cls(int(found[1]), int(found[2]), found[3])


def join_nodes(count: int, rank: int, endpoint: str) -> None:
    """This process and what it starts are one of several machines. Raises SaigaError for another form of endpoint."""
    os.environ[_NODES] = f"{count} {rank} {endpoint}"
    Nodes.of_environment()


def run(command: Sequence[str], *, environment: Mapping[str, str] | None = None, saving: bool = False) -> None:
    """Returns when the child has ended well. It is ended with this process, however that ends.

    `saving`: on Ctrl-C or SIGTERM the child is first left to finish its step and save (see `ending_gently`); a second
    Ctrl-C ends it at once. Raises SaigaError with the child's own sentence where it carried one up (see `child`), else
    with its last lines.
    """
    with tempfile.TemporaryDirectory() as scratch, _sigterm_ends_like_an_exception():
        error_file = Path(scratch) / "error.txt"
        workspace.session_start()  # children count their hours from here
        inherited = _DEFAULTS | os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", **(environment or {})}
        inherited |= {_ERROR_FILE: str(error_file)}
        with subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,  # its end tells the child, and the child's children, that this process has gone
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=inherited,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # so that a Ctrl-C reaches it through `_end` alone, with its own children
        ) as process:
            output = _Output(process)
            try:
                output.echo()
                process.wait()
            except BaseException:
                _end(process, output, Path(scratch), saving=saving)
                if error_file.is_file():
                    print(error_file.read_text(encoding="utf-8"), flush=True)
                raise
        sentence = error_file.read_text(encoding="utf-8") if error_file.is_file() else ""
        if process.returncode or sentence:
            raise SaigaError(sentence or _died(command, process.returncode, output.last))


def distributed(module: str, arguments: Sequence[str], *, processes: int, nodes: Nodes | None = None) -> None:
    """`python -m module` on that many processes, one per GPU; notebook_launcher cannot be used with bitsandbytes.

    With `nodes` that many on each machine: the same call is made on each of them.
    """
    command = [sys.executable, "-m", module, *arguments]
    environment = {"TOKENIZERS_PARALLELISM": "false"}
    if processes > 1 or nodes is not None:
        together = ["--standalone"]
        if nodes is not None:
            together = ["--nnodes", str(nodes.count), "--node_rank", str(nodes.rank)]
            # Not c10d, which deals the ranks out itself.
            together += ["--rdzv-backend", "static", "--rdzv-endpoint", nodes.endpoint]
        command[1:1] = ["-m", "torch.distributed.run", *together, "--nproc_per_node", str(processes)]
        # Peer-to-peer transfers hang on Kaggle's pair of T4; each process gets its share of the cores.
        environment |= {"NCCL_P2P_DISABLE": "1"} | ({} if nodes else {"NCCL_IB_DISABLE": "1"})
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
    # As many GPUs as processes: one process that sees two doubles the loss of a quantised model.
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, workspace.visible_gpus(processes)[:processes]))
    run(command, environment=environment, saving=True)


class _Output:
    """What a child prints, line by line; `last` are its last lines."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.last: deque[str] = deque(maxlen=_LAST_LINES)
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._start = time.monotonic()
        threading.Thread(target=self._read, args=(process,), daemon=True).start()

    def _read(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def echo(self, patience_s: float = math.inf) -> None:
        """Prints it, and a heartbeat when there is none, until it ends or `patience_s` is over."""
        until = time.monotonic() + patience_s
        while (left := until - time.monotonic()) > 0:
            silence_s = max(HEARTBEAT_S, (time.monotonic() - self._start) / 50)
            try:
                line = self._lines.get(timeout=min(left, silence_s))
            except queue.Empty:
                if left > silence_s:
                    print(f"… still running, {time.monotonic() - self._start:.0f} s so far", flush=True)
                continue
            if line is None:
                return
            self.last.append(line)
            print(line, end="", flush=True)


@contextlib.contextmanager
def _sigterm_ends_like_an_exception() -> Iterator[None]:
    """So that a parent that is asked to end can end its child well; in a thread or under another handler as it is."""
    is_ours = threading.current_thread() is threading.main_thread() and (
        signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if not is_ours:
        yield
        return

    def leave(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end(process: "subprocess.Popen[str]", output: _Output, scratch: Path, *, saving: bool) -> None:
    """Asks the child and its children to end, then makes them; a second Ctrl-C meanwhile makes them at once."""
    with signals_call(lambda: _kill(process, scratch)):
        if saving:
            print("Ending after this step, with a checkpoint. Interrupt again to end at once.", flush=True)
            assert process.stdin is not None
            process.stdin.close()
            output.echo(SAVING_PATIENCE_S)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1.0 if saving else 0.0)
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
                process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            _kill(process, scratch)
            process.wait()


def _kill(process: "subprocess.Popen[str]", scratch: Path) -> None:
    # torch.distributed.run gives its processes sessions of their own.
    for number in [int(file.stem) for file in scratch.glob("*.pid")]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def signals_call(act: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM call `act`: an exception of theirs may be lost where Python ignores it, as in a destructor."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: act()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # of another language, and cannot be put back
                signal.signal(number, handler)


def _died(command: Sequence[str], code: int, last: Sequence[str]) -> str:
    name = " ".join(Path(part).name for part in command[:3])
    why = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    memory = " That is what the system does when memory runs out." if code == -signal.SIGKILL else ""
    return f"{name} {why}.{memory} Its last lines:\n" + "".join(last).rstrip()


@contextlib.contextmanager
def child() -> Iterator[None]:
    """Around the main of a child: its SaigaError becomes the parent's, and it ends when the parent has gone."""
    if _ERROR_FILE in os.environ:
        Path(os.environ[_ERROR_FILE]).with_name(f"{os.getpid()}.pid").touch()
        threading.Thread(target=_follow, daemon=True).start()
    try:
        yield
    except SaigaError as error:
        if _ERROR_FILE not in os.environ:
            sys.exit(f"error: {error}")
        with contextlib.suppress(FileNotFoundError):  # it has gone with the parent
            Path(os.environ[_ERROR_FILE]).write_text(str(error), encoding="utf-8")
        sys.exit(0 if _ASKED.is_set() else 1)  # torch.distributed.run makes a long report of 1


_ASKED = threading.Event()  # this child is to end
_GENTLE = threading.Event()  # and will do so by itself


@contextlib.contextmanager
def ending_gently() -> Iterator[None]:
    """Inside it a child that is asked to end goes on, and finds that in `is_asked_to_end`.

    Asked is who gets SIGTERM, or whose parent has closed its standard input or has gone.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: _ASKED.set())
    _GENTLE.set()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if not _ASKED.is_set():
            _GENTLE.clear()


def is_asked_to_end() -> bool:
    return _ASKED.is_set()


def _follow() -> None:
    os.read(0, 1)  # nobody writes: it returns when the parent's end is closed
    _ASKED.set()
    if _GENTLE.is_set():
        time.sleep(SAVING_PATIENCE_S)
    os._exit(1)


if __name__ == "__main__":  # `python -m saigakit.core.launch COMMAND …`: with a heartbeat
    with child():
        run(sys.argv[1:])
