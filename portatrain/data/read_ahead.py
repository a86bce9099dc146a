"""Prefetching of batches on a background thread.

A plain thread is enough: one call returns any batch, so no worker pool and no iterator state is needed.
docs/understand/data.md has the measurement.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType

import numpy as np

from portatrain.data.split import Batch, Split

CLOSE_WITHIN_S = 2.0
SAY_AFTER_S = 10.0
"""A wait for a batch is told after this time, and again whenever it has doubled."""
Rows = Callable[[int], np.ndarray | None]


class Prefetch(Iterator[Batch]):
    """An iterator over batches that reads up to ``depth`` of them ahead.

    Args:
        start: number of the first sample.
        count: samples per batch, or an iterator of the samples of each batch.
        rows: a function of the samples in a batch that returns which of them this process uses, (B,) bool, or None if
            all; see `Split.part`.

    If reading a batch fails, the ``next`` for that batch raises the error, and so does every later one. ``close``, the
    end of the ``with`` block, or garbage collection of the iterator ends the thread.
    """

    def __init__(
        self, split: Split, start: int, count: int | Iterator[int], depth: int = 2, rows: Rows = lambda count: None
    ) -> None:
        self._stop = threading.Event()
        counts = itertools.repeat(count) if isinstance(count, int) else count
        if (isinstance(count, int) and count < 1) or depth < 1:
            raise ValueError(f"count and depth must be at least 1, got {count} and {depth}")
        self._ready: queue.Queue[Batch | BaseException] = queue.Queue(depth)
        self._error: BaseException | None = None
        # The thread has no reference to self, so an iterator that is no longer used is collected and ends the thread.
        self._thread = threading.Thread(
            target=_read,
            args=(split, start, counts, rows, self._ready, self._stop),
            name="portatrain-prefetch",
            daemon=True,
        )
        self._thread.start()

    def __next__(self) -> Batch:
        batch = self.get(lambda: False)
        assert batch is not None
        return batch

    def get(self, stopped: Callable[[], bool], waits: Callable[[float], None] = lambda waited_s: None) -> Batch | None:
        """Wait for the next batch and return it; return None if ``stopped()`` becomes true before it is ready.

        ``waits`` is called with the seconds of a wait of SAY_AFTER_S, and again at twice, four times ... as many.
        """
        began_s, say_s = time.monotonic(), SAY_AFTER_S
        while self._error is None:
            if self._stop.is_set():
                raise StopIteration
            try:
                got = self._ready.get(timeout=0.1)
            except queue.Empty:
                if stopped():
                    return None
                if (waited_s := time.monotonic() - began_s) >= say_s:
                    waits(waited_s)
                    say_s = 2 * waited_s
                continue
            if not isinstance(got, BaseException):
                return got
            self._error = got
        raise self._error

    def close(self) -> None:
        """End the thread. Can be called more than once.

        It waits up to CLOSE_WITHIN_S seconds for the batch that is being read, and no longer, since the source may have
        stalled.
        """

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


def prefetch(
    split: Split, start: int, count: int | Iterator[int], depth: int = 2, rows: Rows = lambda count: None
) -> Prefetch:
    """Return an iterator over the batches from sample ``start`` on, read ahead; use it in a ``with`` block."""

    return Prefetch(split, start, count, depth, rows)


def _read(
    split: Split,
    start: int,
    counts: Iterator[int],
    rows: Rows,
    ready: queue.Queue[Batch | BaseException],
    stop: threading.Event,
) -> None:
    now = next(counts, None)
    while now is not None and not stop.is_set():
        count, now = now, next(counts, None)
        item: Batch | BaseException
        try:
            mine = rows(count)
            split.ahead(start, count, mine)
            if now is not None:
                split.ahead(start + count, now, rows(now))
            item = split.batch(start, count) if mine is None else split.part(start, count, mine)
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
