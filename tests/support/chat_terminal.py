"""Type into `saigakit chat` on a pseudo-terminal, each chat in a process forked from one that has loaded the model.

A fresh process would import and check for seconds.
"""

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

PASTE = "\x1b[200~{}\x1b[201~"
ALT_ENTER, CTRL_C, CTRL_D, UP = "\x1b\r", "\x03", "\x04", "\x1b[A"
PROMPT = "/bye leaves"  # the end of the line below it
ENVIRONMENT = {"TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
_WHERE, _HERE = b"\x1b[6n", b"\x1b[1;1R"  # a terminal is asked for its cursor
_PATIENCE_S = 20
_SERVER = """
import json, os, sys, time
os.cpu_count = lambda: 1  # threads would not survive the fork
import prompt_toolkit
from saigakit import cli, infer
infer.load(sys.argv[1], n_ctx=256).close()
while line := sys.stdin.readline():
    terminal, arguments, environment, pause_s = json.loads(line)
    if not (child := os.fork()):
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
os.setsid()
os.environ |= environment
descriptor = os.open(terminal, os.O_RDWR)
for stream in range(3):
    os.dup2(descriptor, stream)
sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", buffering=1), open(2, "w", buffering=1)
stream = infer.stream
def slow_stream(*arguments, **options):
    for piece in stream(*arguments, **options):
        yield piece
        time.sleep(pause_s)
if pause_s:
    infer.stream = slow_stream
try:
    cli.main(arguments, prog_name="saigakit")
except SystemExit as end:
    os._exit(end.code or 0)
"""


class Terminal:
    """What a person sees and types."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._unread = b""
        self.seen = ""

    def type(self, *texts: str) -> None:
        for text in texts:
            os.write(self._descriptor, text.encode())

    def expect(self, text: str) -> str:
        """Wait until it is shown, and return what was shown before it since the last time, without escape sequences."""
        end = time.monotonic() + _PATIENCE_S
        while text not in self.shown:
            assert time.monotonic() < end and self._read(end - time.monotonic()), f"{text!r} is not in {self.seen!r}"
        before, _, after = self.shown.partition(text)
        self._unread = after.encode()
        return before

    @property
    def shown(self) -> str:
        text = self._unread.decode("utf-8", "ignore")
        return re.sub(r"\x08|\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07]*\x07|[=>])", "", text)

    def read_to_the_end(self) -> str:
        while self._read(_PATIENCE_S):
            pass
        return self.shown

    def _read(self, seconds: float) -> bool:
        if not select.select([self._descriptor], [], [], max(0, seconds))[0]:
            return False
        try:
            chunk = os.read(self._descriptor, 2**16)
        except OSError:  # Linux reports the end of a terminal as an error
            return False
        for _ in range(chunk.count(_WHERE)):
            os.write(self._descriptor, _HERE)
        self._unread += chunk
        self.seen += chunk.decode("utf-8", "replace")
        return bool(chunk)


def pair() -> tuple[int, int]:
    """Our end of a terminal of 24 lines with 100 columns, and that of its programs."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    return ours, theirs


class Chats:
    """Starts chats, one after the other."""

    def __init__(self, server: subprocess.Popen[str], file: Path) -> None:
        self._server, self._file = server, file

    @contextmanager
    def start(self, *options: object, env: Mapping[str, str], pause_s: float = 0) -> Iterator[Terminal]:
        """A chat, which must end by itself, with status 0. `pause_s`: after each piece of an answer."""
        ours, theirs = pair()
        arguments = ["chat", str(self._file), "--temperature", "0", *map(str, options)]
        job = [os.ttyname(theirs), arguments, {**ENVIRONMENT, **env}, pause_s]
        print(json.dumps(job), file=self._server.stdin, flush=True)
        terminal = Terminal(ours)
        try:
            terminal.expect(PROMPT)
            os.close(theirs)
            yield terminal
            terminal.read_to_the_end()
        finally:
            os.close(ours)  # what still runs gets SIGHUP
            status = self._server.stdout.readline()
        assert status == "0\n", terminal.seen


@contextmanager
def chats(file: Path) -> Iterator[Chats]:
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", _SERVER, str(file)], text=True, **streams) as server:
        yield Chats(server, file)
        server.stdin.close()
