"""Writes past the page cache, where a file system of this host's own disks takes them (O_DIRECT).

A checkpoint is written once and read, if at all, by another job: in the page cache it displaces what others read, costs
a copy and fresh pages, and is waited for at fsync all the same. On network file systems, on overlays and in memory
files are written as ever: there the cache is what joins requests, or is the disk.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator

import numpy as np

PAGE = 4096  # address, offset and length of a direct write are multiples of it
_LEAST_BYTES = 1 << 20  # below this a trip to the disk costs more than the cache does


def aligned(nbytes: int) -> np.ndarray:
    """Zeros of uint8 that begin on a page, in shared memory: a fork while a direct write is under way may take private
    pages from under it (open(2), notes on O_DIRECT), and data loaders fork."""
    return np.frombuffer(mmap.mmap(-1, max(1, nbytes)), np.uint8)


class Direct:
    """Turns direct writes on and off for a new file.

    Args:
        fd: open for writing.
    """

    def __init__(self, fd: int) -> None:
        self._fd, self._on = fd, False
        # Network, memory and layered file systems have no device; those of a disk have its number.
        self._allowed = hasattr(os, "O_DIRECT") and os.major(os.fstat(fd).st_dev) != 0

    def parts(self, chunk: memoryview, offset: int) -> Iterator[memoryview]:
        """The chunk in one part or two, each to be written at once, at ``offset`` of the file and after it."""
        chunk = chunk.cast("B")
        whole = len(chunk) - len(chunk) % PAGE
        fits = whole >= _LEAST_BYTES and offset % PAGE == 0 and _address(chunk) % PAGE == 0
        if self._allowed and fits and self._switch(True):
            yield chunk[:whole]
            chunk = chunk[whole:]
        if chunk:
            self._switch(False)
            yield chunk

    def refused(self, error: OSError) -> bool:
        """Whether a write failed as the file system does not take direct ones after all: it may be tried again."""
        if not self._on or error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            return False
        self._allowed = False
        self._switch(False)
        return True

    def _switch(self, on: bool) -> bool:
        if on != self._on:
            flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
            try:
                fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
            except OSError:
                self._allowed = False
                return False
            self._on = on
        return True


def _address(chunk: memoryview) -> int:
    return int(np.frombuffer(chunk, np.uint8).ctypes.data)
