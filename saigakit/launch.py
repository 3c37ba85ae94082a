"""A command or a training config into a running child: its output line by line, its failure as one sentence."""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from saigakit import workspace
from saigakit.errors import SaigaError

HEARTBEAT_S = 20  # of silence, after which a line says that the child still runs
PATIENCE_S = 10.0  # between the request to end and the kill
_ERROR_FILE = "SAIGAKIT_ERROR_FILE"
_LAST_LINES = 40


def run(command: Sequence[str], *, environment: Mapping[str, str] | None = None) -> None:
    """Returns when the child has ended well. It is ended with this process, however that ends.

    Raises SaigaError with the child's own sentence where it carried one up (see `child`), else with its last lines.
    """
    with tempfile.TemporaryDirectory() as scratch:
        error_file = Path(scratch) / "error.txt"
        workspace.session_start()  # children count their hours from here
        inherited = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", **(environment or {})}
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
            try:
                last = _echo(process)
            except BaseException:
                _end(process)
                raise
        if process.returncode:
            sentence = error_file.read_text(encoding="utf-8") if error_file.is_file() else ""
            raise SaigaError(sentence or _died(command, process.returncode, last))


def distributed(module: str, arguments: Sequence[str], *, processes: int) -> None:
    """`python -m module` on that many processes, one per GPU; notebook_launcher cannot be used with bitsandbytes."""
    command = [sys.executable, "-m", module, *arguments]
    environment = {"TOKENIZERS_PARALLELISM": "false"}
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        # Peer-to-peer transfers hang on Kaggle's pair of T4; each process gets its share of the cores.
        environment |= {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
    # As many GPUs as processes: one process that sees two doubles the loss of a quantised model.
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, workspace.visible_gpus(processes)[:processes]))
    run(command, environment=environment)


def _echo(process: "subprocess.Popen[str]") -> list[str]:
    """Prints what the child prints, and a heartbeat when it is silent; returns its last lines."""
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(process, lines), daemon=True).start()
    last: deque[str] = deque(maxlen=_LAST_LINES)
    start = time.monotonic()
    while True:
        try:
            line = lines.get(timeout=HEARTBEAT_S)
        except queue.Empty:
            print(f"… still running, {time.monotonic() - start:.0f} s so far", flush=True)
            continue
        if line is None:
            process.wait()
            return list(last)
        last.append(line)
        print(line, end="", flush=True)


def _read(process: "subprocess.Popen[str]", lines: "queue.Queue[str | None]") -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


def _end(process: "subprocess.Popen[str]") -> None:
    """Asks the child and its children to end, then makes them."""
    for number, patience_s in ((signal.SIGTERM, PATIENCE_S), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            continue
        return


def _died(command: Sequence[str], code: int, last: Sequence[str]) -> str:
    name = " ".join(Path(part).name for part in command[:3])
    why = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    memory = " That is what the system does when memory runs out." if code == -signal.SIGKILL else ""
    return f"{name} {why}.{memory} Its last lines:\n" + "".join(last).rstrip()


@contextlib.contextmanager
def child() -> Iterator[None]:
    """Around the main of a child: its SaigaError becomes the parent's, and it ends when the parent has gone."""
    if _ERROR_FILE in os.environ:
        threading.Thread(target=_follow, daemon=True).start()
    try:
        yield
    except SaigaError as error:
        if _ERROR_FILE not in os.environ:
            sys.exit(f"error: {error}")
        Path(os.environ[_ERROR_FILE]).write_text(str(error), encoding="utf-8")
        sys.exit(1)


def _follow() -> None:
    os.read(0, 1)  # nobody writes: it returns when the parent's end is closed
    os._exit(1)


if __name__ == "__main__":  # `python -m saigakit.launch COMMAND …`: with a heartbeat
    with child():
        run(sys.argv[1:])
