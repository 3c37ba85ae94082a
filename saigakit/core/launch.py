"""Run child processes: echo their output, turn their failures into SaigaErrors, end them with this process."""

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
from saigakit.core.display import printable
from saigakit.errors import SaigaError

HEARTBEAT_S = 20  # silence after which a line says that the child still runs; later a fiftieth of its run time
PATIENCE_S = 10.0  # between the request to end and the kill
SAVING_PATIENCE_S = 900.0  # the same for a child that finishes its step and saves, until it has measured that
ENDING = "Ending after this step, with a checkpoint"
_ERROR_FILE = "SAIGAKIT_ERROR_FILE"
_NODES = "SAIGAKIT_NODES"
_LAST_LINES = 40
# Where the user has not set them: OpenMP threads that wait for each other sleep after 0.1 ms instead of spinning.
_DEFAULTS = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "6000"}
# Training on a CPU: glibc takes huge pages and keeps freed memory, instead of getting every large tensor page by page.
_KEEP_MEMORY = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=8000000000"


@dataclass(frozen=True)
class Nodes:
    """The machines of a run: how many, the number of this one from 0, and HOST:PORT of the first."""

    count: int
    rank: int
    endpoint: str

    @classmethod
    def from_environment(cls) -> Self | None:
        """SAIGAKIT_NODES="2 0 10.0.0.1:29500" is the first of two machines; None if it is not set."""
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
    """Make this process and its children one of several machines."""
    os.environ[_NODES] = f"{count} {rank} {endpoint}"
    Nodes.from_environment()  # raises SaigaError if the endpoint is not HOST:PORT


def run(command: Sequence[str], *, environment: Mapping[str, str] | None = None, saving: bool = False) -> None:
    """Run a command to its end. It never outlives this process.

    With `saving`, Ctrl-C, SIGTERM and a closed terminal let the child finish its step and save (see `ending_gently`); a
    second Ctrl-C ends it at once. Raises SaigaError with the error of the child (see `child`) or with its last lines.
    """
    # Otherwise they would end this process without the child.
    unset = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    raising = handling_signals(lambda number: sys.exit(128 + number), *unset)
    with tempfile.TemporaryDirectory() as scratch, raising:
        error_file = Path(scratch) / "error.txt"
        workspace.session_start()  # children count their hours from here
        defaults = {} if "OMP_WAIT_POLICY" in os.environ else _DEFAULTS  # a spin count overrules the policy
        inherited = defaults | workspace.child_environment() | dict(environment or {})
        inherited |= {_ERROR_FILE: str(error_file)}
        with subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,  # closed when this process ends, which the child and its children notice
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=inherited,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches it and its children through `_end` alone
        ) as process:
            output = _Output(process)
            try:
                output.echo()
                process.wait()
            except BaseException:
                _end(process, output, Path(scratch), saving=saving)
                if error_file.is_file():
                    output.print(f"{error_file.read_text(encoding='utf-8')}\n")
                raise
        message = error_file.read_text(encoding="utf-8") if error_file.is_file() else ""
        if process.returncode or message:
            raise SaigaError(message or _how_it_ended(command, process.returncode, output.last))


def distributed(module: str, arguments: Sequence[str], *, processes: int, nodes: Nodes | None = None) -> None:
    """Run `python -m module` in one process per GPU, on each of the `nodes`, where the same call is made."""
    # accelerate's notebook_launcher cannot be used with bitsandbytes.
    command = [sys.executable, "-m", module, *arguments]
    environment = {"TOKENIZERS_PARALLELISM": "false"}
    if processes > 1 or nodes is not None:
        together = ["--standalone"]
        if nodes is not None:
            together = ["--nnodes", str(nodes.count), "--node_rank", str(nodes.rank)]
            # Not c10d, which assigns the ranks itself.
            together += ["--rdzv-backend", "static", "--rdzv-endpoint", nodes.endpoint]
        command[1:1] = ["-m", "torch.distributed.run", *together, "--nproc_per_node", str(processes)]
        # Peer-to-peer transfers hang on Kaggle's two T4s; each process gets its share of the cores.
        environment |= {"NCCL_P2P_DISABLE": "1"} | ({} if nodes else {"NCCL_IB_DISABLE": "1"})
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
    # As many GPUs as processes: a process that sees two of them doubles the loss of a quantised model.
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, workspace.visible_gpus(processes)[:processes]))
    if not workspace.gpus():
        environment["GLIBC_TUNABLES"] = os.environ.get("GLIBC_TUNABLES", _KEEP_MEMORY)
    run(command, environment=environment, saving=True)


class _Output:
    """The output of a child; `last` holds its last lines."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.last: deque[str] = deque(maxlen=_LAST_LINES)
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._start = time.monotonic()
        self.ignored: tuple[type[OSError], ...] = ()  # of a closed terminal or pipe, at the end
        threading.Thread(target=self._read, args=(process,), daemon=True).start()

    def _read(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def echo(self, patience_s: float = math.inf) -> None:
        """Print it until it ends or `patience_s` have passed, with a heartbeat during silence."""
        until = time.monotonic() + patience_s
        while (left := until - time.monotonic()) > 0:
            silence_s = max(HEARTBEAT_S, (time.monotonic() - self._start) / 50)
            try:
                line = self._lines.get(timeout=min(left, silence_s))
            except queue.Empty:
                if left > silence_s:
                    self.print(f"… still running, {time.monotonic() - self._start:.0f} s so far\n")
                continue
            if line is None:
                return
            self.last.append(line)
            self.print(line)

    def print(self, text: str) -> None:
        with contextlib.suppress(*self.ignored):
            print(printable(text), end="", flush=True)


def _end(process: "subprocess.Popen[str]", output: _Output, scratch: Path, *, saving: bool) -> None:
    """Ask the child and its children to end, and kill them if they do not or at a second Ctrl-C."""
    output.ignored = (OSError,)
    hangups = handling_signals(lambda _: None, signal.SIGHUP)  # a closed terminal and its shell send one each
    with hangups, handling_signals(lambda _: _kill(process, scratch), signal.SIGINT, signal.SIGTERM):
        if saving:
            assert process.stdin is not None
            process.stdin.close()
            needed_s = max([0.0, *(float(file.read_text() or 0) for file in scratch.glob("*.pid"))])
            length = f": up to {math.ceil(needed_s)} s" if needed_s < math.inf else ""
            asked = f"{ENDING}{length}. Interrupt again to end at once."
            output.print(f"{asked if needed_s else 'Ending at once: there is nothing to save yet.'}\n")
            output.echo(_patience(needed_s))
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


def _patience(needed_s: float) -> float:
    return PATIENCE_S + 5 * needed_s if needed_s < math.inf else SAVING_PATIENCE_S  # 5: a busy disk or GPU


def _kill(process: "subprocess.Popen[str]", scratch: Path) -> None:
    import fcntl  # not on Windows

    # torch.distributed.run gives its processes sessions of their own.
    for file in scratch.glob("*.pid"):
        with file.open("r+") as stream, contextlib.suppress(ProcessLookupError):
            try:
                fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:  # its process lives; else another one may have got the number
                os.kill(int(file.stem), signal.SIGKILL)
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def handling_signals(act: Callable[[int], object], *numbers: signal.Signals) -> Iterator[None]:
    """Call `act` on these signals; in a thread other than the main one do nothing. Those that nohup ignores stay so.

    It is safer than to catch KeyboardInterrupt, which Python ignores when it is raised in a destructor.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
    before = {number: signal.signal(number, lambda number, _: act(number)) for number in {*numbers} - ignored}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: not set by Python, so it cannot be put back
                signal.signal(number, handler)


def _how_it_ended(command: Sequence[str], code: int, last: Sequence[str]) -> str:
    name = " ".join(Path(part).name for part in command[:3])
    why = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    memory = " The system does that when memory runs out." if code == -signal.SIGKILL else ""
    return f"{name} {why}.{memory} Its last lines:\n" + "".join(last).rstrip()


@contextlib.contextmanager
def child() -> Iterator[None]:
    """Around the main function of a child: pass its SaigaError on to the parent, and end when the parent does."""
    error_file = os.environ.get(_ERROR_FILE)
    if error_file:
        import fcntl

        file = os.open(Path(error_file).with_name(f"{os.getpid()}.pid"), os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.lockf(file, fcntl.LOCK_EX)  # as long as this process lives
        _REPORT.append(file)
        threading.Thread(target=_end_with_parent, args=(file,), daemon=True).start()
    try:
        yield
    except SaigaError as error:
        if not error_file:
            sys.exit(f"error: {error}")
        with contextlib.suppress(FileNotFoundError):  # the parent has gone and taken the directory along
            Path(error_file).write_text(str(error), encoding="utf-8")
        sys.exit(0 if _ASKED.is_set() else 1)  # torch.distributed.run prints a long report on 1


_ASKED = threading.Event()
is_asked_to_end = _ASKED.is_set  # whether this child has been
_REPORT: list[int] = []  # the open file that tells its parent how many seconds it needs for that


@contextlib.contextmanager
def ending_gently(needed_s: float = math.inf) -> Iterator[None]:
    """Let a child that is asked to end continue, and check `is_asked_to_end` itself; see `report_needed` for the time.

    The request is SIGTERM, or the end of its standard input, which the parent closes or takes along when it dies.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: _ASKED.set())
    report_needed(needed_s)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if not _ASKED.is_set():
            report_needed(0.0)


def report_needed(seconds: float) -> None:
    """Tell the parent how long this child needs to save and end: 0 for nothing to save, infinity if it is unknown."""
    for file in _REPORT:
        os.pwrite(file, f"{seconds:12.2f}".encode(), 0)  # always 12 bytes, so never a part of the number


def _end_with_parent(file: int) -> None:
    os.read(0, 1)  # nobody writes, so this returns when the parent closes its end
    _ASKED.set()
    if needed_s := float(os.pread(file, 12, 0) or 0):
        time.sleep(_patience(needed_s))
    os._exit(1)


if __name__ == "__main__":  # `python -m saigakit.core.launch COMMAND …`: with a heartbeat
    with child():
        run(sys.argv[1:])
