"""What a user can mend, said in a sentence: what is wrong, where, and what to do."""

import difflib
from collections.abc import Iterable, Sequence


class SaigaError(Exception):
    """A sentence for the user. The command line prints it and exits 1; a notebook shows it alone."""

    def _render_traceback_(self) -> list[str]:
        """IPython's hook: the sentence instead of a stack of frames."""
        return [f"{type(self).__name__}: {self}"]


class DataError(SaigaError):
    """Bad records: every problem with its file, line and field; the first 50 are shown, the rest counted.

    `more`: problems that were counted and not kept.
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
        return "\n".join(lines)


def suggestion(name: str, known: Iterable[str]) -> str:
    """A question to put behind the sentence that `name` is unknown; nothing where none of `known` is like it."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
