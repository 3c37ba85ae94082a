"""Read questions in a terminal of any system, and let nothing that is typed reach an answer or the shell."""

import _thread
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.filters import is_searching
from prompt_toolkit.history import FileHistory
from prompt_toolkit.input import create_input
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.output import create_output

from saigakit.core.display import printable


class Editor:
    """Enter sends, Alt-Enter adds a line, and a paste of many lines is one text."""

    def __init__(self) -> None:
        self._input = create_input()
        self.quiet = self._input.raw_mode  # what is typed is not shown
        self.history_file = _history_file()
        keys = KeyBindings()
        keys.add("enter", filter=~is_searching)(lambda event: event.current_buffer.validate_and_handle())
        keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
        self._session: PromptSession[str] = PromptSession(
            "> ",
            multiline=True,
            key_bindings=keys,
            history=_History(self.history_file),
            input=self._input,
            output=create_output(always_prefer_tty=True),  # stdout may be a file
        )

    def read(self, status: str) -> str:
        """Return the next text that is not blank, in valid Unicode; "/bye" at its end."""
        text = ""
        while not text.strip():
            try:
                text = self._session.prompt(bottom_toolbar=status)
            except KeyboardInterrupt:
                continue  # with an empty line
            except EOFError:
                return "/bye"
        return text.rstrip().encode("utf-8", "replace").decode("utf-8")

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Discard what is typed meanwhile; Ctrl-C raises KeyboardInterrupt."""
        is_over = threading.Event()

        def watch() -> None:
            while not is_over.wait(0.005):
                if any(press.key == "c-c" for press in self._input.read_keys()):
                    _thread.interrupt_main()
                    break

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()
            self._input.flush_keys()  # half of an escape sequence

    def drain(self) -> None:
        """Discard what was typed or pasted: else the shell would run it. A long paste arrives in pieces."""
        with self.quiet(), self.watching():
            threading.Event().wait(0.1)


class _History(FileHistory):
    """Without secrets; a full disk does not end a chat."""

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            super().store_string(printable(string))


def _history_file() -> Path:
    try:
        file = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state", "saigakit", "chat_history").expanduser()
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600))
    except (OSError, RuntimeError):  # it cannot be written, or there is no home directory
        return Path(os.devnull)
    return file
