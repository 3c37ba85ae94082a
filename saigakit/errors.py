"""Errors that the user can fix: what is wrong, where, and what to do."""

import difflib
import os
import re
from collections.abc import Iterable, Sequence

_NAMES_OF_SECRETS = re.compile(r"(_TOKEN|_KEY|_SECRET|_PASSWORD)$")
_HUB_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")
_SHORTEST_SECRET = 8  # characters; a shorter value could be a part of any text
_secrets: set[str] = set()


def hide(secret: str) -> None:
    """Keep it out of every text that `masked` returns from now on."""
    _secrets.add(secret)


def masked(text: str) -> str:
    """Replace secrets: those that were hidden, those in the environment, and anything like a token of the Hub."""
    environment = {value.strip() for name, value in os.environ.items() if _NAMES_OF_SECRETS.search(name)}
    for secret in sorted(_secrets | environment, key=len, reverse=True):
        if len(secret) >= _SHORTEST_SECRET:
            text = text.replace(secret, "…")
    return _HUB_TOKEN.sub("…", text)


class SaigaError(Exception):
    """The command line prints its message and exits with status 1; a notebook shows it without a traceback."""

    def __str__(self) -> str:
        return masked(super().__str__())

    def _render_traceback_(self) -> list[str]:
        """IPython calls this instead of rendering a traceback."""
        return [f"{type(self).__name__}: {self}"]


class DataError(SaigaError):
    """Invalid records. The message shows the first 50 problems and counts the rest.

    `more`: problems that were counted but not kept.
    """

    SHOWN = 50

    def __init__(self, summary: str, problems: Sequence[str], more: int = 0) -> None:
        self.summary = summary
        self.problems = list(problems)
        self.more = more
        super().__init__(summary, self.problems, more)

    def __str__(self) -> str:
        lines = [self.summary, *(f"  {problem}" for problem in self.problems[: self.SHOWN])]
        if hidden := max(0, len(self.problems) - self.SHOWN) + self.more:
            lines.append(f"  … and {hidden} more")
        return masked("\n".join(lines))


def suggestion(name: str, known: Iterable[str]) -> str:
    """` Did you mean …?` to append to an error about an unknown `name`; empty if no known name is similar."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
