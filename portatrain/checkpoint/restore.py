"""Restore a checkpoint: read the boxes of a process ahead, several requests at a time, within a memory budget.

A backend asks for one box after another (`Backend.restore_state`); torch asks for one a layer. The layout gives the
boxes of this process, so a thread reads whole tensors in groups. The reader merges the requests of a group, sends them
together and verifies each tile. A box that was not expected is read on demand. If the first box was not expected,
nothing is read ahead.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np

from checkpoints_format import Box, FormatError, LocalStore, Reader, Want
from portatrain.backends.base import Backend
from portatrain.backends.program import Program
from portatrain.backends.state import COUNT, full_name, inventory
from portatrain.checkpoint.carry import Carry
from portatrain.checkpoint.shared_reads import Shares, consecutive, owners_of, pays, shares_of
from portatrain.errors import StorageError, UserError

GROUP_BYTES = 64 << 20
BUDGET_BYTES = 512 << 20
"""Host memory for boxes that were read ahead; the boxes of a single tensor may exceed it."""


def boxes_of(
    program: Program,
    process: int = 0,
    processes: int = 1,
    shares: Shares | None = None,
    owners: Sequence[int] | None = None,
) -> dict[str, list[Box]]:
    """Return the boxes that `process` asks for, one a device, by full name and in the order of the checkpoint. Of the
    tensors in `shares` it asks for its part alone. `owners` as in `shares_of`."""
    layout, shares = program.layout, shares or {}
    held_by = owners if owners is not None else consecutive(layout.mesh.devices, processes)
    mine = [layout.mesh.coordinates(d) for d, owner in enumerate(held_by) if owner == process]
    found = {}
    for tensor in inventory(program):
        boxes = [(at, *layout.box(tensor.info, at, role=tensor.laid_out_as)) for at in mine]
        share, name = shares.get(tensor.key), full_name(*tensor.key)
        if share is None:
            found[name] = [Box(offset, shape) for _, offset, shape in boxes]
        else:
            found[name] = [Box(*share.part(layout.mesh, *box)) for box in boxes]
    return {**found, COUNT: [Box((), ())] * len(mine)}


Change = Callable[[str, str, tuple[int, ...], np.ndarray], np.ndarray]
"""Returns the values of a box that replace those in the checkpoint, given role, name, offset and values."""


def restored(backend: Backend, reader: Reader, change: Change | None = None, *, carried: Carry | None = None) -> Any:
    """Return the state of an open checkpoint on `backend`. Processes that hold copies share the reading if it pays and
    if the backend can exchange parts. With `change`, return the state that it makes of the checkpoint's. `carried`:
    what becomes of a checkpoint of another recipe."""
    program, processes, owners, shares = backend.program, backend.processes, owners_of(backend), {}
    exchange: Any = getattr(backend, "restore_shared", None)
    if exchange is not None and processes > 1:
        remote = not isinstance(reader.store, LocalStore)
        # All processes share or none does, even if the environment of one of them differs.
        if not backend.agree(int(not pays(processes, remote=remote))):
            shares = shares_of(program, processes, owners=owners, gap_bytes=reader.store.merge_gap_bytes)
    with Restoring(reader, boxes_of(program, backend.process, processes, shares, owners)) as restoring:
        read = restoring.read if carried is None else carried.reading(restoring.read)
        read = read if change is None else _changed(read, change)
        return exchange(read, shares) if shares else backend.restore_state(read)


def _changed(read: Callable[..., np.ndarray], change: Change) -> Callable[..., np.ndarray]:
    return lambda role, name, offset, shape: change(role, name, offset, read(role, name, offset, shape))


@dataclass
class _Held:
    box: Box
    array: np.ndarray
    left: int
    """The number of elements that have not been asked for; below 1 the array is freed."""


@dataclass
class _Shared:
    """The data that the two threads share, under one lock."""

    waiting: deque[str]
    held: dict[str, list[_Held]] = field(default_factory=dict)
    reading: set[str] = field(default_factory=set)
    nbytes: int = 0
    wanted: str | None = None
    served: bool = False
    error: BaseException | None = None
    closed: bool = False


class Restoring:
    """Provide `read(role, name, offset, shape)` for `Backend.restore_state` from an open checkpoint.

    Args:
        boxes: the boxes that will be asked for, by full name (`boxes_of`), each as often as it will be.
        budget_bytes: host memory for boxes that are read ahead.

    Raises (read): StorageError, with tensor and file, if a read fails or returns other bytes: the checkpoint was
    verified before, so a job tries again. UserError for a tensor that the checkpoint does not have.
    """

    def __init__(self, reader: Reader, boxes: Mapping[str, Sequence[Box]], *, budget_bytes: int = BUDGET_BYTES) -> None:
        self._reader, self._boxes, self._budget_bytes = reader, boxes, budget_bytes
        self._tensors = {t.name: t for t in reader.layout.tensors}
        self._shared = _Shared(deque(n for n in boxes if n in self._tensors))
        self._changed = threading.Condition()
        self._reading = threading.Lock()  # a Reader serves one thread at a time
        self._thread = threading.Thread(target=self._run, name="portatrain-restore", daemon=True)
        self._thread.start()

    def __enter__(self) -> Restoring:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._shared.closed = True
            self._changed.notify_all()
        self._thread.join()

    def read(self, role: str, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
        full, box = full_name(role, name), Box(offset, shape)
        try:
            found = self._ahead(full, box)
            if found is not None:
                return found
            with self._reading:
                return self._reader.read_many([Want(full, box, None)])[0]
        except FormatError as error:
            raise (StorageError if full in self._tensors else UserError).of(error) from error

    def _ahead(self, full: str, box: Box) -> np.ndarray | None:
        """Return the box from what was read ahead; None if it is not there."""
        shared = self._shared
        with self._changed:
            if full in shared.waiting:
                shared.wanted = full
                self._changed.notify_all()
            while full in shared.waiting or full in shared.reading:
                if shared.error is not None:
                    raise shared.error
                self._changed.wait()
            for held in shared.held.get(full, ()):
                if held.box == box or (box.shape and held.box.intersect(box) == box):
                    part = held.array[box.slices(held.box.offset)] if box.shape else held.array
                    held.left -= max(1, box.size)
                    if held.left <= 0:
                        shared.held[full].remove(held)
                        shared.nbytes -= held.array.nbytes
                        self._changed.notify_all()
                    shared.served = True
                    return part
            if not shared.served:
                # This backend asks for other boxes than the layout's (flat ranges, say), so it reads each on demand.
                shared.closed = True
                shared.waiting.clear()
                shared.held.clear()
                self._changed.notify_all()
        return None

    # ---- the thread

    def _run(self) -> None:
        shared = self._shared
        try:
            while (names := self._next_group()) is not None:
                wants = [(n, box) for n in names for box in dict.fromkeys(self._boxes[n])]
                with self._reading:
                    arrays = self._reader.read_many([Want(n, box, None) for n, box in wants])
                with self._changed:
                    for (n, box), array in zip(wants, arrays, strict=True):
                        times = list(self._boxes[n]).count(box)
                        shared.held.setdefault(n, []).append(_Held(box, array, max(1, box.size) * times))
                        shared.nbytes += array.nbytes
                    shared.reading.clear()
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                shared.error = error
                self._changed.notify_all()

    def _next_group(self) -> list[str] | None:
        """Return the next tensors to read, when there is room or another thread waits for one; None at the end."""
        shared = self._shared
        with self._changed:
            while not shared.closed and shared.wanted is None and shared.nbytes >= self._budget_bytes:
                self._changed.wait()
            if shared.closed or not shared.waiting:
                return None
            if shared.wanted is not None and shared.wanted in shared.waiting:
                # The box that is asked for now shows how far the backend is: continue from there.
                shared.waiting.rotate(-shared.waiting.index(shared.wanted))
            shared.wanted = None
            if shared.nbytes >= self._budget_bytes:
                self._give_up()
            names: list[str] = []
            used = 0
            while shared.waiting and (not names or used + self._nbytes(shared.waiting[0]) <= self._group_bytes):
                names.append(shared.waiting.popleft())
                used += self._nbytes(names[-1])
            shared.reading.update(names)
            return names

    @property
    def _group_bytes(self) -> int:
        return min(GROUP_BYTES, self._budget_bytes // 2)

    def _give_up(self) -> None:
        """Make room: evict the boxes that were read first; evicted boxes are read again on demand."""
        shared = self._shared
        for name in list(shared.held):
            if shared.nbytes < self._budget_bytes:
                return
            for held in shared.held.pop(name):
                shared.nbytes -= held.array.nbytes

    def _nbytes(self, name: str) -> int:
        return sum(box.size for box in dict.fromkeys(self._boxes[name])) * self._tensors[name].item_bytes
