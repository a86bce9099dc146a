"""Direct writes (O_DIRECT), which bypass the page cache, on file systems of this host's own disks.

A checkpoint is written once and read by another job, if at all. In the page cache it would displace data that others
read, cost a copy and new pages, and fsync would wait for it anyway. On network, overlay and memory file systems, files
are written normally: there the cache merges requests, or is the storage itself.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator

import numpy as np

PAGE = 4096  # address, offset and length of a direct write are multiples of it
_LEAST_BYTES = 1 << 20  # smaller writes are faster through the cache


def aligned(nbytes: int) -> np.ndarray:
    """Return zeros, uint8, that begin at a page, in shared memory.

    A fork during a direct write can corrupt it if the memory is private (open(2), notes on O_DIRECT), and data loaders
    fork.
    """
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
        """Yield the chunk in one or two parts; write each before requesting the next, beginning at ``offset``."""
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
        """Return True if a write failed because the file system rejects direct writes; the caller can write again."""

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
