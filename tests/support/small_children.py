"""Start Python children that do not outlive a failed test."""

import os
import pty
import subprocess
import sys
from contextlib import contextmanager

import psutil


def python(code):
    return [sys.executable, "-c", code]


@contextmanager
def started(code, **options):
    """A Python process that does not outlive a failure of the test."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True} | options
    with subprocess.Popen(python(code), **options) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def gone_within(process_id, seconds):
    try:
        psutil.Process(process_id).wait(seconds)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return False
    return True


@contextmanager
def in_a_terminal(code):
    """A Python process in a terminal, and the descriptor that shows and closes it."""
    master, slave = pty.openpty()
    own = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    ends = {"stdin": slave, "stdout": slave, "stderr": slave, "start_new_session": True}
    with started(own + code, **ends) as process:
        os.close(slave)
        yield process, master


def read_until(descriptor, text):
    """Read from a terminal until `text` has come."""
    seen = ""
    while text not in seen:
        seen += os.read(descriptor, 1000).decode()
    return seen
