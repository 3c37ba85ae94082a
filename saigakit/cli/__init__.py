"""The `saigakit` command, the runner of the four notebooks and the terminal chat."""

from saigakit.cli import kaggle_commands  # adds its commands to main
from saigakit.cli.commands import main

__all__ = ["kaggle_commands", "main"]
