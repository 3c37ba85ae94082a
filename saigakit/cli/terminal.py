"""What a command cannot do into one sentence and exit code 1, without a traceback."""

import os
from typing import Any

import click

from saigakit.errors import SaigaError

_ON_WINDOWS = ("chat", "fetch", "publish", "push", "watch")


class Group(click.Group):
    """Ends a command without a traceback where the user can mend it."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:  # noqa: ANN401
        name, *rest = super().resolve_command(ctx, args)
        if os.name == "nt" and name not in _ON_WINDOWS:
            raise SaigaError(f"saigakit {name} needs Linux or macOS. On Windows run it in WSL (wsl --install).")
        return name, *rest

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (SaigaError, OSError) as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(1)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("saigakit"):
                raise
            click.echo(f"error: {error.name} is not installed: pip install 'saigakit[all]'.", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            ctx.exit(130)  # as a shell says it
