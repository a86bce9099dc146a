"""Copy the state of a save from the devices to the host, while training waits, and free each copy when it is written.

If the memory budget holds all copies, training waits for the copying alone, and writing begins after it. Otherwise the
writer begins at once. It frees copies as it writes them, the copying continues in the order in which the writer asks,
and training waits for the last copy: for the copying, and for the writing of what exceeds the budget.
"""

from __future__ import annotations

import math
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
    """The number of elements that the writer has not asked for; at 0 the copy is freed."""
    array: np.ndarray | None = None


class Staging:
    """Copies of boxes. The training thread makes them (`fill`), and the writing thread takes them (`sources`).

    Args:
        boxes: (tensor, box, copy function) for each box that this process writes, once each, in any order.
        item_bytes: bytes of one element, by tensor, in the order in which tensors are written.
        budget_bytes: memory for the copies at one time; a copy that is larger by itself is made all the same.
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
        """Return the bytes of all copies."""
        return sum(copy.nbytes for copy in self._copies)

    @property
    def beyond_bytes(self) -> int:
        """Return the most bytes that are written before the last copy is made. Copies are freed whole."""
        over = self.nbytes - self._budget_bytes
        return min(self.nbytes, over + max(copy.nbytes for copy in self._copies)) if over > 0 else 0

    def fill(self) -> None:
        """Make the copies. Returns when the last one is made, or the writer has ended."""
        try:
            for copy in self._copies:
                with self._changed:
                    while not self._closed and not self._room(copy):
                        self._changed.wait()
                    if self._closed:
                        return
                    self._starving = False  # the writer asks again if it waits for another copy
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
        """Return the sources for a `Writer` of one stream, by tensor: functions from a box to its values. The writer
        asks for each element once."""

        def source(name: str) -> Callable[[Box], np.ndarray]:
            return lambda wanted: self._values(name, wanted)

        return {name: source(name) for name in self._of}

    def close(self) -> None:
        """Record that the writer has ended and needs no more copies."""
        with self._changed:
            self._closed = True
            for copy in self._copies:
                copy.array = None
            self._changed.notify_all()

    def _values(self, name: str, wanted: Box) -> np.ndarray:
        """Return a view of the copy that holds the whole box, or join parts of several copies (torch has a tensor a
        layer)."""
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
            raise RuntimeError(f"{name}: this process does not hold all elements of {wanted}")
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
    """Return the budget for copies that the environment sets, or None. Raises UserError if it is not a number."""
    gib = environment.SAVE_MEMORY_GIB.get()
    return None if gib is None else int(gib * 2**30)
