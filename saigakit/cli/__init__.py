"""The `saigakit` command, the runner of the four notebooks and the terminal chat."""

from saigakit.cli.commands import main

__all__ = ["main"]
