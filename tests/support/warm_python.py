"""Run programs as `python -c` does, each in a process forked from one that has imported what they need.

A fresh process would import that again: 1.5 s for the client of the Hub and datasets, more on a busy machine.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

_SERVER = """
import json, os, sys, traceback
exec(sys.argv[1])
while line := sys.stdin.readline():
    code, arguments, environment, cwd, files = json.loads(line)
    if not (child := os.fork()):
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
os.environ.clear()
os.environ.update(environment)
os.chdir(cwd)
for stream, (file, flags) in enumerate(zip(files, (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY))):
    os.dup2(os.open(file, flags), stream)
sys.argv, status = ["-c", *arguments], 0
try:
    exec(code, {"__name__": "__main__"})
except SystemExit as end:
    status = int(end.code or 0)
except BaseException:
    traceback.print_exc()
    status = 1
sys.stdout.flush()
sys.stderr.flush()
os._exit(status)  # at once: to free all that was imported takes longer than a question
"""


class Run(Protocol):
    def __call__(
        self, code: str, *arguments: object, env: Mapping[str, str], cwd: Path, text: str = ""
    ) -> subprocess.CompletedProcess[str]: ...


@contextmanager
def started(imports: str, env: Mapping[str, str]) -> Iterator[Run]:
    """A function that runs a program; `env` is what the modules see while they are imported."""
    command, pipes = [sys.executable, "-c", _SERVER, imports], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (
        tempfile.TemporaryDirectory() as scratch,
        subprocess.Popen(command, env=env, text=True, **pipes) as server,
    ):
        files = [Path(scratch) / name for name in ("stdin", "stdout", "stderr")]

        def run(
            code: str, *arguments: object, env: Mapping[str, str], cwd: Path, text: str = ""
        ) -> subprocess.CompletedProcess[str]:
            for file, content in zip(files, (text, "", ""), strict=True):
                file.write_text(content, encoding="utf-8")
            job = [code, [*map(str, arguments)], dict(env), os.fspath(cwd), [*map(str, files)]]
            print(json.dumps(job), file=server.stdin, flush=True)
            status = int(server.stdout.readline())
            stdout, stderr = (file.read_text(encoding="utf-8") for file in files[1:])
            return subprocess.CompletedProcess(code, status, stdout, stderr)

        yield run
        server.stdin.close()
