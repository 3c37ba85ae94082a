"""The saigakit command: the four notebooks as one run, the terminal chat, and a command for each step."""

from saigakit.cli.commands import main

__all__ = ["main"]
