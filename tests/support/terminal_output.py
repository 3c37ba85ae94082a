"""Run a command whose output and errors go to a real terminal, and return the bytes that the terminal gets."""

import os
import pty
import subprocess
import sys
import termios


def run_on_terminal(*arguments: object, answers: str = "", **options: object) -> bytes:
    """Run `python ARGUMENTS`; it reads `answers` from a pipe, so that only its own output reaches the terminal."""
    reader, terminal = pty.openpty()
    settings = termios.tcgetattr(terminal)
    settings[1] &= ~termios.OPOST  # bytes arrive as they were written
    termios.tcsetattr(terminal, termios.TCSANOW, settings)
    command = [sys.executable, *map(str, arguments)]
    streams = {"stdin": subprocess.PIPE, "stdout": terminal, "stderr": terminal}
    with subprocess.Popen(command, **streams, **options) as child:
        os.close(terminal)
        child.stdin.write(answers.encode())
        child.stdin.close()
        written = b""
        while chunk := _read(reader):
            written += chunk
    os.close(reader)
    return written


def _read(reader: int) -> bytes:
    try:
        return os.read(reader, 2**16)
    except OSError:  # Linux reports the end of a terminal as an error
        return b""


def control_characters(written: bytes) -> set[str]:
    """Those that a terminal may obey."""
    bidirectional = {*map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}
    text = written.decode("utf-8", "surrogateescape")
    return {
        one for one in text if one in bidirectional or ((one < " " or "\x7f" <= one < "\xa0") and one not in "\n\t")
    }
