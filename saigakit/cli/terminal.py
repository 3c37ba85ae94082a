"""Keep control characters from the terminal, print user errors on one line and exit with status 1."""

import contextlib
import io
import os
import sys
from typing import Any

import click

from saigakit.core import install
from saigakit.core.display import printable
from saigakit.errors import SaigaError

_ON_WINDOWS = ("chat", "fetch", "publish", "kaggle", "push", "quota", "stop", "watch", "wheels")


class _Terminal(io.TextIOWrapper):
    """Standard output without the control characters of files, models and other machines."""

    def __init__(self) -> None:
        stream = os.fdopen(sys.stdout.fileno(), "wb", closefd=False)
        super().__init__(stream, sys.stdout.encoding, sys.stdout.errors, line_buffering=True)

    def write(self, text: str) -> int:
        return super().write(printable(text))


class Group(click.Group):
    """A group whose commands end without a traceback if the user can fix the error."""

    def main(self, *args: Any, **options: Any) -> Any:  # noqa: ANN401
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # cp1251 and koi8-r have no "→"
        return super().main(*args, **options)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:  # noqa: ANN401
        for path in (*args, os.getcwd()):  # noqa: PTH109
            path.encode("utf-8")  # as it will be for a manifest or llama.cpp; raises UnicodeEncodeError
        name, *rest = super().resolve_command(ctx, args)
        if os.name == "nt" and name not in _ON_WINDOWS:
            raise SaigaError(f"saigakit {name} needs Linux or macOS. On Windows run it in WSL (wsl --install).")
        return name, *rest

    def invoke(self, ctx: click.Context) -> object:
        try:
            # A file or a pipe gets the exact text, such as an answer.
            with contextlib.redirect_stdout(_Terminal()) if sys.stdout.isatty() else contextlib.nullcontext():
                return super().invoke(ctx)
        except BrokenPipeError:
            raise  # `saigakit … | head`: click exits with 1 and prints nothing
        except (SaigaError, OSError) as error:
            message = str(error)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("saigakit"):
                raise
            message = f"{error.name} is not installed. Run: {install.pip_install(['all'])}"
        except UnicodeEncodeError as error:
            message = f"{error.object[-200:]!r} is not UTF-8; rename the file or directory."
        except KeyboardInterrupt:
            ctx.exit(130)  # as a shell reports Ctrl-C
        click.echo(f"error: {printable(message)}", err=True)
        return ctx.exit(1)
