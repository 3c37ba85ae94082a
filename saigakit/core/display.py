"""Show tables and progress lines in a terminal and in a notebook."""

import html
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

from saigakit.errors import masked

EVERY_S = 10  # seconds between progress lines
# Colours and cursor movements, and every other control character, what reorders a line, and unpaired surrogates.
_CONTROLS = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """What a terminal can show without obeying it, and without secrets; a carriage return ends a line."""
    return _CONTROLS.sub("", re.sub(r"\r\n?", "\n", masked(text)))


def count(number: int, noun: str) -> str:
    """Such as "1 record" or "2,000 records"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


class Every:
    """Calling it returns True at most once every EVERY_S seconds."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()

    def __call__(self) -> bool:
        now = time.monotonic()
        if now - self._last < EVERY_S:
            return False
        self._last = now
        return True

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def left(self, done: float, total: float) -> float:
        """Estimated seconds for the rest, at the average speed so far."""
        return self.spent * (total - done) / done


class Progress:
    """Print from time to time how many texts are done and how long the rest will take."""

    def __init__(self, what: str) -> None:
        self.what, self._is_due = what, Every()

    def __call__(self, done: int, total: int) -> None:
        if not self._is_due() and done < total:
            return
        took = f"{self._is_due.spent:.0f} s"
        left = f"about {self._is_due.left(done, total):.0f} s left" if done else f"{took} so far"
        print(f"{self.what}: {done} of {count(total, 'text')}, {left if done < total else took}", flush=True)


@dataclass(frozen=True, repr=False)
class Table:
    """A table that prints aligned in a terminal and renders as HTML in a notebook."""

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""

    def __str__(self) -> str:
        rows = [[*map(printable, cells)] for cells in (self.header, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]) for cells in rows]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], printable(self.note)]).rstrip()

    __repr__ = __str__  # a notebook stores it next to the HTML

    def _repr_html_(self) -> str:
        rows = [_html_row(self.header, "th"), *(_html_row(row, "td") for row in self.rows)]
        return f"<table>{''.join(rows)}</table><p><small>{html.escape(self.note)}</small></p>"


def _html_row(cells: Sequence[str], tag: str) -> str:
    begin = f'<{tag} style="text-align:left;vertical-align:top">'
    return f"<tr>{''.join(f'{begin}{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"
