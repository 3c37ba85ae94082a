"""One notebook and its values into an executed notebook and its page, by a kernel of this very interpreter."""

import ast
import contextlib
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO

from saigakit.core import manifest
from saigakit.core.files import write_text
from saigakit.errors import DataError, SaigaError

if TYPE_CHECKING:
    from jupyter_client.manager import AsyncKernelManager
    from papermill.exceptions import PapermillExecutionError

KERNEL_LOG = ".runner/kernel.log"  # what a kernel says outside of its notebook: of a crash, and of its own ending
SILENT_S = 20.0  # after which a line says that the notebook still runs
_LAST_LINES = 12
# nbconvert's page without the scripts that it would load from the network.
_PAGE = """{%- extends 'index.html.j2' -%}
{%- block html_head_js -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
"""


def parameters_of(notebook: Path) -> dict[str, Any]:
    """Names and defaults, as the cell tagged `parameters` sets them."""
    if not notebook.is_file():
        raise SaigaError(f"{notebook} is not there.")
    try:
        import papermill
    except ModuleNotFoundError as error:
        raise SaigaError(f"{error.name} is not installed: pip install 'saigakit[run]'.") from None
    try:
        inspected = papermill.inspect_notebook(_literal(notebook))
    except ValueError as error:
        raise SaigaError(f"{notebook} is no notebook: {error}.") from None
    found = {}
    for key, parameter in inspected.items():
        try:
            found[key] = ast.literal_eval(parameter["default"])
        except (ValueError, SyntaxError):
            raise SaigaError(
                f"{notebook}: the parameter {key} = {parameter['default']} is no literal; write a value there."
            ) from None
    return found


def execute(notebook: Path, values: Mapping[str, Any], run_dir: Path, terminal: "Terminal", lock: int) -> None:
    """`run_dir`/<stage>.ipynb and .html, which bear their names only when the stage's directory is complete.

    The kernel holds the file descriptor `lock` too, so that whoever waits for it waits for the kernel of a killed run.
    Raises SaigaError with the sentence that the notebook itself raised, or with its last lines.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError

    stage = notebook.stem
    partial, failed = run_dir / f".{stage}.partial.ipynb", failed_file(run_dir, stage)
    try:
        with (run_dir / KERNEL_LOG).open("w", encoding="utf-8") as log:
            papermill.execute_notebook(
                _literal(notebook),
                _literal(partial),
                parameters={**values, "run_dir": str(run_dir)},
                kernel_name="python3",
                progress_bar=False,
                stdout_file=terminal,
                stderr_file=terminal,
                kernel_manager_class=_kernel_class(lock, log),
            )
        manifest.require_stage(run_dir / stage, stage)
        write_text(run_dir / f"{stage}.html", _page(partial, stage))
        partial.replace(run_dir / f"{stage}.ipynb")
    except (PapermillExecutionError, SaigaError, RuntimeError) as error:  # RuntimeError: nbclient's for a dead kernel
        partial.replace(failed)
        raise SaigaError(_failure(stage, error, failed)) from None
    finally:
        partial.unlink(missing_ok=True)


def failed_file(run_dir: Path, stage: str) -> Path:
    return run_dir / f"{stage}.failed.ipynb"


def _literal(path: Path) -> str:
    """papermill formats paths; doubled braces stay braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _page(notebook: Path, title: str) -> str:
    """One file with everything in it."""
    import nbformat
    from nbconvert import HTMLExporter

    content = nbformat.read(notebook, as_version=4)
    exporter = HTMLExporter(raw_template=_PAGE, embed_images=True)
    page, _ = exporter.from_notebook_node(content, resources={"metadata": {"name": title}})
    return str(page)


def _failure(stage: str, error: "PapermillExecutionError | SaigaError | RuntimeError", failed: Path) -> str:
    """What the notebook has to say to the user: its own sentence where it raised one."""
    from papermill.exceptions import PapermillExecutionError, strip_color

    if isinstance(error, SaigaError):
        return f"{stage} ran to its end without a complete result: {error} See {failed}."
    if not isinstance(error, PapermillExecutionError):
        return (
            f"{stage}: the Python that ran the notebook was lost ({error}). The system kills one when memory runs "
            f"out: close other programs or choose smaller parameters, and run the same command. See {failed} and, "
            f"for a crash, {failed.parent / KERNEL_LOG}."
        )
    if error.ename in (SaigaError.__name__, DataError.__name__):
        return str(error.evalue)
    lines = strip_color("\n".join(error.traceback)).rstrip().splitlines() or [f"{error.ename}: {error.evalue}"]
    return "\n".join([f"{stage} failed:", *lines[-_LAST_LINES:], f"The notebook as it stopped: {failed}"])


def _kernel_class(lock: int, log: TextIO) -> "type[AsyncKernelManager]":
    """Kernels of this interpreter: a kernelspec `python3` that somebody installed may be of another one."""
    import psutil
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    class Kernel(AsyncKernelManager):
        @property
        def kernel_spec(self) -> KernelSpec:
            # A stage that was made differently is replaced when the new one is complete.
            return KernelSpec(**{**get_kernel_dict(), "env": {"SAIGAKIT_REPLACE": "1"}})

        async def start_kernel(self, **options: object) -> None:  # type: ignore[override]
            await self._async_start_kernel(**options, pass_fds=(lock,), stdout=log, stderr=log)

        async def shutdown_kernel(self, now: bool = False, restart: bool = False) -> None:  # type: ignore[override]
            """With all that it started."""
            started: list[psutil.Process] = []
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(self.provisioner.pid)  # type: ignore[union-attr]
                started = process.children(recursive=True)
            await self._async_shutdown_kernel(now=now, restart=restart)
            for process in started:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    return Kernel


class Terminal:
    """Prints what a notebook prints, as it comes, and speaks up when that is silent."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._in_line = False
        self.begin("")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def begin(self, stage: str) -> None:
        self._stage, self._start, self._spoken = stage, time.monotonic(), time.monotonic()

    def write(self, text: str) -> None:
        """Of the notebook; may end within a line."""
        with self._lock:
            self._print(text, sys.stdout)

    def flush(self) -> None:
        """papermill asks for it; every text is flushed when written."""

    def say(self, line: str, stream: TextIO | None = None) -> None:
        """On a line of its own."""
        with self._lock:
            self._print(f"\n{line}\n" if self._in_line else f"{line}\n", stream or sys.stdout)

    def _print(self, text: str, stream: TextIO) -> None:
        stream.write(text)
        stream.flush()
        self._in_line, self._spoken = not text.endswith("\n"), time.monotonic()

    def _watch(self) -> None:
        while not self._ended.wait(SILENT_S / 20):
            now = time.monotonic()
            if now - self._spoken >= SILENT_S:
                self.say(f"{self._stage}: {spent(now - self._start)} so far")


def spent(seconds: float) -> str:
    return f"{seconds // 60:.0f} min {seconds % 60:.0f} s" if seconds >= 60 else f"{seconds:.0f} s"
