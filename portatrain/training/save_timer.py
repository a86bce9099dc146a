"""When the next checkpoint by time is due: every so many seconds, and rarer if saving would cost too much."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SAVE_SHARE = 0.02
"""The share of the time for which saves by time may keep the loop waiting; beyond it they become rarer."""


class SaveTimer:
    """Times saves. `every_s`: seconds between two, None: none is ever due."""

    def __init__(self, every_s: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._every_s, self._clock = every_s, clock
        self._took_s, self._first = 0.0, True
        self.start()

    def start(self) -> None:
        """Count from now."""
        self._since_s = self._clock()

    @property
    def due(self) -> bool:
        """Whether it is time to save."""
        if self._every_s is None:
            return False
        return self._clock() - self._since_s >= max(self._every_s, self._took_s / SAVE_SHARE)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Measure how long the loop waits for a save of any kind; count from its end.

        The first save of an attempt is left out: it may compile what the others use.
        """
        began_s = self._clock()
        try:
            yield
        finally:
            self.start()
            self._took_s = 0.0 if self._first else self._since_s - began_s
            self._first = False
