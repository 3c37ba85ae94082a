"""Run the kaggle command line, and say in one sentence why it failed and what to do."""

import json
import re
import subprocess
import sys
import tempfile
import threading
import time

from saigakit.core import install, workspace
from saigakit.core.display import Table, printable
from saigakit.errors import SaigaError

_QUESTION_S, TRANSFER_S = 300.0, 86400.0  # until a question, and an up- or download, count as never answered
# What the command line prints, and what it means.
_NO_LOGIN = "Authentication required"
_ABSENT = r"\b40[34] Client Error|The resource was not found|You don't have access|Permission .* was denied"
_REMEDIES = {
    r"No space left on device|Disk quota exceeded": ("The disk is full", "Free some space"),
    r"Max retries exceeded|Connection\w*Error|NameResolution|Connection (aborted|reset)|[Tt]imed? ?out": (
        "No connection to Kaggle", "Check the internet connection and the variables HTTP_PROXY and HTTPS_PROXY"
    ),
    r"Expecting value|JSONDecodeError": (
        "Kaggle answered with something other than JSON, such as a page about maintenance or the login of a network",
        "Open kaggle.com in a browser, and try again later",
    ),
    r"You have been rate limited|\b429 ": ("Kaggle got too many requests", "Wait a few minutes and try again"),
    r"problem on Kaggle's side|\b5\d\d Server Error": ("Kaggle has a fault of its own", "Try again later"),
}  # fmt: skip


class NoAnswerError(SaigaError):
    """Kaggle did not answer this time; the same command may succeed later."""


def run(*arguments: str, echo: bool = False, limit_s: float = _QUESTION_S, until: str | None = None) -> str:
    """Run a command and return what it printed on both streams, or the first line that begins with `until`.

    Raises NoAnswerError if there is no connection, no answer within `limit_s` seconds or a fault of Kaggle's, and
    SaigaError if it refuses.
    """
    if lacking := install.missing(["kaggle"]):
        raise SaigaError(f"This needs {install.listed(lacking)}. Run: {install.pip_install(['kaggle', 'run'])}")
    # -m kaggle: its check of the program's name knows this form. -W: no warning about a newer version.
    return run_python("-m", "kaggle", "-W", *arguments, echo=echo, limit_s=limit_s, until=until)


def run_python(*arguments: str, echo: bool = False, limit_s: float = _QUESTION_S, until: str | None = None) -> str:
    """As `run`, for any code that uses the packages of the command line."""
    lines, start = [], time.monotonic()
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            env=workspace.child_environment(),
            encoding="utf-8",
            errors="replace",
        ) as child,
    ):
        assert child.stdout is not None
        timer = threading.Timer(limit_s, child.kill)  # a request after which this machine slept is never answered
        timer.daemon = True
        timer.start()
        for line in child.stdout:
            lines.append(line)
            if echo and _NO_LOGIN not in lines[0]:  # else a page of help follows
                print(printable(line), end="", flush=True)
            if until and line.startswith(until):
                timer.cancel()
                child.kill()
                return line
        code = child.wait()
        timer.cancel()
        errors.seek(0)
        lines.append(errors.read().decode("utf-8", "replace"))
    if code == 0:
        return "".join(lines)
    about = next((each for each in arguments if re.fullmatch(r"[\w-]+/[\w/-]+", each)), "the request")
    if time.monotonic() - start >= limit_s:
        raise NoAnswerError(f"Kaggle did not answer {about} within {limit_s:.0f} s.")
    raise _explain(about, re.sub(r"^.*%\|.*$", "", lines[-1], flags=re.MULTILINE).strip() or "".join(lines).strip())


def _explain(about: str, output: str) -> SaigaError:
    if _NO_LOGIN in output:
        return SaigaError(
            "Nobody is logged in to Kaggle, or the token is no longer valid. Run `kaggle auth login`, or set "
            "KAGGLE_API_TOKEN to a token from https://www.kaggle.com/settings/api."
        )
    first = (output.splitlines() or ["no reason was given"])[0]
    reason = printable(re.sub(r"( for|with) url:.*|\(Caused by.*", "", first)[:300]).strip().rstrip(".")
    for pattern, (what, remedy) in _REMEDIES.items():
        if re.search(pattern, output):
            return NoAnswerError(f"{what} ({reason}). {remedy}.")
    return _RefusedError(about, reason, is_absent=bool(re.search(_ABSENT, output)))


class _RefusedError(SaigaError):
    def __init__(self, about: str, reason: str, *, is_absent: bool) -> None:
        self.reason, self.is_absent = reason, is_absent
        meaning = " (it does not exist, or it belongs to somebody else)" if is_absent else ""
        super().__init__(f"Kaggle refused {about}: {reason}{meaning}.")


def query(*command: str) -> str | None:
    """The output of a command; None if what it asks about does not exist."""
    try:
        return run(*command)
    except _RefusedError as error:
        if error.is_absent:  # Kaggle answers "denied" for what does not exist
            return None
        raise


def submit(reference: str, *command: str) -> str:
    """Run a command that creates `reference`, and check its output: it exits with status 0 even if refused."""
    try:
        output = run(*command, limit_s=TRANSFER_S)
        reason = "; ".join(re.findall(r"^.*(?:push|creation) error: *(.*)$", output, re.MULTILINE))
    except _RefusedError as error:
        output, reason = "", error.reason
    if reason:
        raise SaigaError(
            f"Kaggle refused {reference}: {printable(reason).rstrip('.')}. If it is a quota or running sessions, wait "
            "or stop one (`saigakit stop`); if it is the title or the name, somebody has it: choose another."
        )
    if dropped := re.findall(r"^The following are not valid (.*)$", output, re.MULTILINE):
        raise SaigaError(
            f"Kaggle accepted {reference} without some of its sources: {'; '.join(dropped)}. Cancel the run on "
            "kaggle.com if it has started. A data set must be ready and a notebook must have finished once; then push "
            "again."
        )
    if not re.search(r"is being created|successfully.* at \S|was created", output):
        raise SaigaError(f"Kaggle did not confirm {reference}: {output.strip()[-600:]!r}")
    return output


def username() -> str:
    """The user who is logged in."""
    found = re.search(r"^- username: (?!None$)(\S+)", run("config", "view"), re.MULTILINE)
    if found is None:
        raise _explain("the request", _NO_LOGIN)
    return found[1]


def quota() -> Table:
    """The hours of this week by accelerator."""
    try:
        rows = json.loads(run("quota", "--format", "json"))
    except ValueError:  # "No quota information available"
        rows = []
    keys = ("resource", "used", "remaining", "total", "refreshAt")
    note = "An hour of GPU T4 x2 is one hour of the quota." if rows else "Kaggle gave no quota for this user."
    cells = [tuple(str(row.get(key, "")) for key in keys) for row in rows]
    return Table(("accelerator", "used", "left", "of", "renewed at"), cells, note)
