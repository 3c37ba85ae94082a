"""The clock into a decision: is it time for a line of progress? Kaggle keeps every line."""

import time

EVERY_S = 10  # seconds between two lines


class Every:
    """True when called once EVERY_S seconds have passed since it was last True."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self) -> bool:
        now = time.monotonic()
        if now - self._last < EVERY_S:
            return False
        self._last = now
        return True
