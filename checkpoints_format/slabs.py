"""Buffers between arrays and a store: one is filled while the store writes the other."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .direct import PAGE, aligned


class Slabs:
    """Two buffers that alternate: one is filled while a store writes the other.

    The chunks begin and end at multiples of the page size, in the file and in memory, so that a store can bypass the
    page cache. Only the last chunk of a file may end anywhere. The file is filled from its first byte on.

    Args:
        nbytes: bytes of each buffer, to which one page is added. Buffers smaller than a page yield unaligned chunks.
    """

    def __init__(self, nbytes: int) -> None:
        self._unit = PAGE if nbytes >= PAGE else 1
        nbytes += self._unit - 1
        self._now, self._other = aligned(nbytes), aligned(nbytes)
        self._used = 0

    def room(self, nbytes: int) -> Iterator[memoryview]:
        """Make room for ``nbytes``, at most the size of a buffer: yield the filled bytes if they would not fit."""
        if self._used + nbytes <= len(self._now):
            return
        whole = self._used - self._used % self._unit
        yield self._now[:whole].data
        # Only now, because the store was writing the other buffer until the yield returned.
        rest = self._used - whole
        self._other[:rest] = self._now[whole : self._used]
        self._now, self._other, self._used = self._other, self._now, rest

    def take(self, nbytes: int) -> np.ndarray:
        """Return the next ``nbytes`` bytes to fill, uint8. Call ``room`` first."""
        self._used += nbytes
        return self._now[self._used - nbytes : self._used]

    def copy(self, data: np.ndarray) -> Iterator[memoryview]:
        """Copy any number of bytes into the buffers, and yield the chunks that are full."""
        while len(data):
            yield from self.room(min(len(data), self._unit))
            n = min(len(data), len(self._now) - self._used)
            self.take(n)[:] = data[:n]
            data = data[n:]

    def rest(self) -> memoryview:
        """Return the filled bytes that were not yielded yet: the last bytes of the file."""

        return self._now[: self._used].data
