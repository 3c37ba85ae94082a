"""Execute one notebook with given parameters, in a kernel of this Python interpreter."""

import ast
import contextlib
import math
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO

from saigakit.core import launch, manifest, workspace
from saigakit.core.display import Every, printable
from saigakit.core.files import write_text
from saigakit.errors import DataError, SaigaError, masked

if TYPE_CHECKING:
    import psutil
    from jupyter_client.manager import AsyncKernelManager
    from papermill.exceptions import PapermillExecutionError

KERNEL_LOG = ".runner/kernel.log"  # what the kernel prints outside its notebook, such as a crash
SILENT_S = 20.0  # of no output, after which a line says that the notebook is still running
_LAST_LINES = 12
# nbconvert's page without the scripts that it loads from the network.
_PAGE = """{%- extends 'index.html.j2' -%}
{%- block html_head_js -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
"""


def read_parameters(notebook: Path) -> dict[str, Any]:
    """Read names and defaults from the cell tagged `parameters`."""
    if not notebook.is_file():
        raise SaigaError(f"{notebook} does not exist.")
    import papermill

    try:
        inspected = papermill.inspect_notebook(_escape_braces(notebook))
    except ValueError as error:
        raise SaigaError(f"{notebook} is not a notebook: {error}.") from None
    found = {}
    for key, parameter in inspected.items():
        try:
            found[key] = ast.literal_eval(parameter["default"])
        except (ValueError, SyntaxError):
            raise SaigaError(f"{notebook}: {key} = {parameter['default']} must be a literal value.") from None
    return found


def execute(notebook: Path, values: Mapping[str, Any], run_dir: Path, screen: "Screen", lock: int) -> None:
    """Write `run_dir`/<stage>.ipynb and .html once the stage is complete.

    The kernel inherits the file descriptor `lock`, so that the next run also waits for the kernel of a killed one.
    Raises SaigaError with the notebook's own message or its last lines, KeyboardInterrupt after `Screen.interrupt`.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError

    stage = notebook.stem
    partial, failed = run_dir / f".{stage}.partial.ipynb", failed_file(run_dir, stage)
    try:
        private = tempfile.TemporaryDirectory(dir="/tmp")  # paths of sockets have at most 103 bytes
        with private as directory, (run_dir / KERNEL_LOG).open("w", encoding="utf-8") as log:
            papermill.execute_notebook(
                _escape_braces(notebook),
                _escape_braces(partial),
                parameters={**values, "run_dir": str(run_dir)},
                kernel_name="python3",
                progress_bar=False,
                stdout_file=screen,
                stderr_file=screen,
                kernel_manager_class=_kernel_class(lock, log, Path(directory), screen),
                on_cell_start=screen.require_uninterrupted,  # between two cells a kernel ignores signals
            )
        manifest.require_stage(run_dir / stage, stage)
        _mask(partial)
        write_text(run_dir / f"{stage}.html", _render_page(partial, stage))
        partial.replace(run_dir / f"{stage}.ipynb")
    except (PapermillExecutionError, SaigaError, RuntimeError) as error:  # RuntimeError: a dead kernel in nbclient
        screen.require_uninterrupted()
        _mask(partial)
        partial.replace(failed)
        raise SaigaError(_failure(stage, error, failed)) from None
    finally:
        screen.kernel = None
        partial.unlink(missing_ok=True)


def _mask(notebook: Path) -> None:
    """Remove secrets, which an error of a library may quote."""
    notebook.touch()  # papermill may have written nothing
    notebook.write_text(masked(notebook.read_text(encoding="utf-8")), encoding="utf-8")


def failed_file(run_dir: Path, stage: str) -> Path:
    return run_dir / f"{stage}.failed.ipynb"


def _escape_braces(path: Path) -> str:
    """papermill applies str.format to paths."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _render_page(notebook: Path, title: str) -> str:
    import nbformat
    from nbconvert import HTMLExporter

    content = nbformat.read(notebook, as_version=4)
    exporter = HTMLExporter(raw_template=_PAGE, embed_images=True)
    page, _ = exporter.from_notebook_node(content, resources={"metadata": {"name": title}})
    return str(page)


def _failure(stage: str, error: "PapermillExecutionError | SaigaError | RuntimeError", failed: Path) -> str:
    """The message for the user: the notebook's own if it raised a SaigaError."""
    from papermill.exceptions import PapermillExecutionError, strip_color

    if isinstance(error, SaigaError):
        return f"{stage} finished without a complete result: {error} See {failed}."
    if not isinstance(error, PapermillExecutionError):
        return (
            f"{stage}: the notebook's kernel was lost ({error}), often because memory ran out. Close other programs or "
            f"choose smaller parameters, and run the same command again. See {failed} and, for a crash, "
            f"{failed.parent / KERNEL_LOG}."
        )
    if error.ename in (SaigaError.__name__, DataError.__name__):
        return str(error.evalue)
    lines = strip_color("\n".join(error.traceback)).rstrip().splitlines() or [f"{error.ename}: {error.evalue}"]
    return "\n".join([f"{stage} failed:", *lines[-_LAST_LINES:], f"The notebook up to this error: {failed}"])


def _kernel_class(lock: int, log: TextIO, directory: Path, screen: "Screen") -> "type[AsyncKernelManager]":
    """Kernels of this interpreter: an installed kernelspec `python3` may belong to another one."""
    import psutil
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    class Kernel(AsyncKernelManager):
        process: psutil.Process | None = None

        def __init__(self, **options: Any) -> None:  # noqa: ANN401
            super().__init__(transport="ipc", connection_file=str(directory / "kernel.json"), **options)

        @property
        def kernel_spec(self) -> KernelSpec:
            # Outdated stages are replaced once the new ones are complete.
            return KernelSpec(**{**get_kernel_dict(), "env": {"SAIGAKIT_REPLACE": "1", **workspace.SAFE_PATH}})

        async def start_kernel(self, **options: object) -> None:  # type: ignore[override]
            await self._async_start_kernel(**options, pass_fds=(lock,), stdout=log, stderr=log)
            self.process = screen.kernel = psutil.Process(self.provisioner.pid)  # type: ignore[union-attr]

        async def shutdown_kernel(self, now: bool = False, restart: bool = False) -> None:  # type: ignore[override]
            """Kill its child processes too."""
            screen.kernel = None
            children: list[psutil.Process] = []
            with contextlib.suppress(psutil.NoSuchProcess):
                children = self.process.children(recursive=True) if self.process else []
            await self._async_shutdown_kernel(now=now, restart=restart)
            for process in children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    return Kernel


class Screen:
    """Prints the output of a notebook as it comes, with a heartbeat when there is none, and passes Ctrl-C on to it."""

    def __init__(self) -> None:
        self.kernel: psutil.Process | None = None
        self.is_interrupted, self._end_at = False, math.inf
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._in_line, self._is_due = False, Every()
        self.begin("")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def begin(self, stage: str) -> None:
        self._stage, self._start, self._last_output = stage, time.monotonic(), time.monotonic()

    def write(self, text: str) -> None:
        """Print output of the notebook, which may end within a line; of a progress bar, a line now and then."""
        if text.startswith("\r") and not text.endswith("\n") and not self._is_due():
            return
        self._end_at = math.inf if launch.ENDING in text else self._end_at
        with self._lock:
            self._print(text, sys.stdout)

    def flush(self) -> None:
        """Do nothing: `write` flushes. papermill calls this."""

    def print_line(self, line: str, stream: TextIO | None = None) -> None:
        """Start a new line if the notebook's output ended within one."""
        with self._lock:
            self._print(f"\n{line}\n" if self._in_line else f"{line}\n", stream or sys.stdout)

    def _print(self, text: str, stream: TextIO) -> None:
        try:
            stream.write(text := printable(text))
            stream.flush()
        except OSError:  # of a closed terminal or pipe
            os.kill(os.getpid(), signal.SIGHUP)
        self._in_line, self._last_output = not text.endswith("\n"), time.monotonic()

    def require_uninterrupted(self, **_: object) -> None:
        if self.is_interrupted:
            raise KeyboardInterrupt

    def interrupt(self, number: int) -> None:
        """Interrupt the notebook and let it end by itself; the second time, end it."""
        kernel, is_second = self.kernel, self.is_interrupted
        if is_second and (kernel is None or number == signal.SIGHUP):
            return  # it ends already, or this is a terminal that was closed: its shell sends a SIGHUP too
        self.is_interrupted, self._end_at = True, time.monotonic() + launch.PATIENCE_S
        if kernel is not None and kernel.is_running():
            os.killpg(kernel.pid, signal.SIGINT)
        if kernel is None or is_second:
            self.kernel = None  # before it is shut down, which no signal may disturb
            raise KeyboardInterrupt

    def _watch(self) -> None:
        while not self._ended.wait(SILENT_S / 20):
            now = time.monotonic()
            if now > self._end_at:
                os.kill(os.getpid(), signal.SIGINT)
            if now - self._last_output >= SILENT_S:
                self.print_line(f"{self._stage}: still running after {format_duration(now - self._start)}")


def format_duration(seconds: float) -> str:
    return f"{seconds // 60:.0f} min {seconds % 60:.0f} s" if seconds >= 60 else f"{seconds:.0f} s"
