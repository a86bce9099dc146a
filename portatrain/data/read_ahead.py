"""Reading ahead on a background thread.

A plain thread, not grain: grain serves random-access sources with workers and transformations of its own,
of which nothing is left to do here (a batch is one call that seeks anywhere), and importing it costs more
than a second, which every start of a run would pay. docs/understand/data.md has the measurement.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType

from portatrain.data.split import Batch, Split

CLOSE_WITHIN_S = 2.0


class Prefetch(Iterator[Batch]):
    """Batches of ``count`` samples, or of as many as it gives for each, from ``start`` on, up to ``depth`` of them read
    ahead.

    An error in reading surfaces at the ``next`` that would have returned its batch, and again at every
    later one. ``close``, leaving the ``with`` block, or the iterator's collection ends the thread.
    """

    def __init__(self, split: Split, start: int, count: int | Iterator[int], depth: int = 2) -> None:
        self._stop = threading.Event()
        counts = itertools.repeat(count) if isinstance(count, int) else count
        if (isinstance(count, int) and count < 1) or depth < 1:
            raise ValueError(f"count and depth are at least 1, got {count} and {depth}")
        self._ready: queue.Queue[Batch | BaseException] = queue.Queue(depth)
        self._error: BaseException | None = None
        # The thread holds no reference to self, so that a forgotten iterator is collected and ends it.
        self._thread = threading.Thread(
            target=_read, args=(split, start, counts, self._ready, self._stop), name="portatrain-prefetch", daemon=True
        )
        self._thread.start()

    def __next__(self) -> Batch:
        batch = self.get(lambda: False)
        assert batch is not None
        return batch

    def get(self, stopped: Callable[[], bool]) -> Batch | None:
        """The next batch; None where it has not come when ``stopped()`` is first seen to be true."""
        while self._error is None:
            if self._stop.is_set():
                raise StopIteration
            try:
                got = self._ready.get(timeout=0.1)
            except queue.Empty:
                if stopped():
                    return None
                continue
            if not isinstance(got, BaseException):
                return got
            self._error = got
        raise self._error

    def close(self) -> None:
        """End the thread; a batch being read is finished first, unless that takes longer than CLOSE_WITHIN_S: its
        source may be what has stalled. May be called again."""
        self._stop.set()
        until_s = time.monotonic() + CLOSE_WITHIN_S
        while self._thread.is_alive() and time.monotonic() < until_s:
            try:  # room in the queue lets a blocked put return
                self._ready.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self._stop.set()


def prefetch(split: Split, start: int, count: int | Iterator[int], depth: int = 2) -> Prefetch:
    """Read batches [start, start + count), ... ahead; use in a ``with`` block."""
    return Prefetch(split, start, count, depth)


def _read(
    split: Split, start: int, counts: Iterator[int], ready: queue.Queue[Batch | BaseException], stop: threading.Event
) -> None:
    for count in counts:
        if stop.is_set():
            return
        item: Batch | BaseException
        try:
            item = split.batch(start, count)
        except BaseException as error:
            item = error
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                break
            except queue.Full:
                continue
        if isinstance(item, BaseException):
            return
        start += count
