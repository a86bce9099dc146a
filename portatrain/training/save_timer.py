"""Decide when the next checkpoint by time is due; if saves cost too much time, they become rarer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SAVE_SHARE = 0.02
"""The largest share of the time that the loop may wait for saves by time; beyond it, they become rarer."""


class SaveTimer:
    """Times saves. `every_s`: the seconds between two saves; None: no save by time is ever due."""

    def __init__(self, every_s: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._every_s, self._clock = every_s, clock
        self._took_s, self._first = 0.0, True
        self.start()

    def start(self) -> None:
        """Start to count the time."""
        self._since_s = self._clock()

    @property
    def due(self) -> bool:
        """Return True if it is time to save."""
        if self._every_s is None:
            return False
        return self._clock() - self._since_s >= max(self._every_s, self._took_s / SAVE_SHARE)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Measure the loop's wait for a save of any kind, and restart the count at its end.

        The first save of an attempt is not measured, because it may compile code that later saves use.
        """
        began_s = self._clock()
        try:
            yield
        finally:
            self.start()
            self._took_s = 0.0 if self._first else self._since_s - began_s
            self._first = False
