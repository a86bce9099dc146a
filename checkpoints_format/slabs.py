"""The bytes of a file on their way from arrays to a store."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .direct import PAGE, aligned


class Slabs:
    """Two pieces of memory that take turns: one is filled while a store writes the other.

    What they give out begins and ends on pages of the file and of memory, so that a store may write it past the page
    cache; only the last of a file may end anywhere. The file is filled from its first byte on.

    Args:
        nbytes: of each, and a page. Slabs that are smaller than a page give out what fits.
    """

    def __init__(self, nbytes: int) -> None:
        self._unit = PAGE if nbytes >= PAGE else 1
        nbytes += self._unit - 1
        self._now, self._other = aligned(nbytes), aligned(nbytes)
        self._used = 0

    def room(self, nbytes: int) -> Iterator[memoryview]:
        """Give out what is filled where ``nbytes``, at most those of a slab, would not fit beside it."""
        if self._used + nbytes <= len(self._now):
            return
        whole = self._used - self._used % self._unit
        yield self._now[:whole].data
        # Only now: as long as that was waited for, the other slab was being written.
        rest = self._used - whole
        self._other[:rest] = self._now[whole : self._used]
        self._now, self._other, self._used = self._other, self._now, rest

    def take(self, nbytes: int) -> np.ndarray:
        """The next bytes, uint8, to be filled: there is room for them."""
        self._used += nbytes
        return self._now[self._used - nbytes : self._used]

    def copy(self, data: np.ndarray) -> Iterator[memoryview]:
        """Fill in bytes of any number, giving out what is full on the way."""
        while len(data):
            yield from self.room(min(len(data), self._unit))
            n = min(len(data), len(self._now) - self._used)
            self.take(n)[:] = data[:n]
            data = data[n:]

    def rest(self) -> memoryview:
        """What is filled and was not given out: the last bytes of the file."""
        return self._now[: self._used].data
