"""The host's copies of what a save writes: made while training waits, given up as they are written.

Where the budget holds all of them training waits for the copy alone, and nothing is written before it is done. Where it
does not, the writer begins at once, the copies go on in the order in which it asks for them as it gives others up, and
training waits until the last one is made: for the copy, and for the writing of what exceeds the budget.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from checkpoints_format import Box
from portatrain.system import environment


@dataclass(slots=True)
class _Copy:
    name: str
    box: Box
    fetch: Callable[[], np.ndarray]
    nbytes: int
    left: int
    """Elements that are still to be asked for; at 0 the copy is given up."""
    array: np.ndarray | None = None


class Staging:
    """Copies of boxes, shared by the thread that trains (`fill`) and the one that writes (`sources`).

    Args:
        boxes: (tensor, box, how to copy it) of what this process is to write, in any order, each once.
        item_bytes: of one element, by tensor, in the order in which they are written.
        budget_bytes: for copies at the same time; one that is larger by itself is made all the same.
    """

    def __init__(
        self,
        boxes: Iterable[tuple[str, Box, Callable[[], np.ndarray]]],
        item_bytes: Mapping[str, int],
        *,
        budget_bytes: int,
    ) -> None:
        self._turn = {name: number for number, name in enumerate(item_bytes)}
        self._copies = sorted(
            (_Copy(n, b, f, math.prod(b.shape) * item_bytes[n], math.prod(b.shape)) for n, b, f in boxes),
            key=lambda copy: (self._turn[copy.name], copy.box.offset),
        )
        self._of: dict[str, list[_Copy]] = {name: [] for name in item_bytes}
        for copy in self._copies:
            self._of[copy.name].append(copy)
        self._budget_bytes = budget_bytes
        self._changed = threading.Condition()
        self._used = self._passed = 0
        self._starving = self._closed = False
        self._error: BaseException | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all copies."""
        return sum(copy.nbytes for copy in self._copies)

    @property
    def beyond_bytes(self) -> int:
        """How much is written, at most, before the last copy is made: copies are given up whole."""
        over = self.nbytes - self._budget_bytes
        return min(self.nbytes, over + max(copy.nbytes for copy in self._copies)) if over > 0 else 0

    def fill(self) -> None:
        """Make the copies; returns once the last one is made, or the writer has ended."""
        try:
            for copy in self._copies:
                with self._changed:
                    while not self._closed and not self._room(copy):
                        self._changed.wait()
                    if self._closed:
                        return
                    self._starving = False  # it asks again if this is not the one that it waits for
                array = copy.fetch()
                with self._changed:
                    copy.array = array
                    self._used += copy.nbytes
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()
            raise

    def _room(self, copy: _Copy) -> bool:
        return self._starving or not self._used or self._used + copy.nbytes <= self._budget_bytes

    def sources(self) -> dict[str, Callable[[Box], np.ndarray]]:
        """For a `Writer` of one stream: the values of any box, by tensor; it asks for each element once."""

        def source(name: str) -> Callable[[Box], np.ndarray]:
            return lambda wanted: self._values(name, wanted)

        return {name: source(name) for name in self._of}

    def close(self) -> None:
        """The writer has ended: no copy is needed any more."""
        with self._changed:
            self._closed = True
            for copy in self._copies:
                copy.array = None
            self._changed.notify_all()

    def _values(self, name: str, wanted: Box) -> np.ndarray:
        """A view of the one copy that holds all of it, else put together (torch has a tensor a layer)."""
        found: list[tuple[_Copy, Box, np.ndarray]] = []
        with self._changed:
            for copy in self._copies[self._passed :]:
                if self._turn[copy.name] >= self._turn[name]:
                    break
                self._give_up(copy)  # its tensor has been written
                self._passed += 1
            parts = [(copy, part) for copy in self._of[name] if (part := copy.box.intersect(wanted))]
            for copy, part in parts:
                while copy.array is None:
                    if self._error is not None:
                        raise self._error
                    self._starving = True
                    self._changed.notify_all()
                    self._changed.wait()
                self._starving = False
                found.append((copy, part, copy.array))
                copy.left -= part.size
                if copy.left <= 0:
                    self._give_up(copy)
        if sum(part.size for _, part, _ in found) < wanted.size:
            raise RuntimeError(f"{name}: not all elements of {wanted} are held by this process")
        if len(found) == 1:
            copy, _, array = found[0]
            return array[wanted.slices(copy.box.offset)]
        out = np.empty(wanted.shape, found[0][2].dtype)
        for copy, part, array in found:
            out[part.slices(wanted.offset)] = array[part.slices(copy.box.offset)]
        return out

    def _give_up(self, copy: _Copy) -> None:
        if copy.array is not None:
            copy.array = None
            self._used -= copy.nbytes
            self._changed.notify_all()


def given_budget_bytes() -> int | None:
    """What the environment allows the copies to take, or None. Raises UserError where it is not a number."""
    gib = environment.SAVE_MEMORY_GIB.get()
    return None if gib is None else int(gib * 2**30)


def free_memory_bytes() -> int:
    """Memory of this host that is free, or can be made so."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            found = next(line for line in lines if line.startswith("MemAvailable"))
        return int(found.split()[1]) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
