"""A run's checkpoints: logical tensors in `checkpoints_format`, restored on any backend and mesh.

    checkpoints = Checkpoints(run_dir / "checkpoints")
    checkpoints.save(10, backend, state, meta)      # copies to the host and returns; a thread writes
    step, reader = checkpoints.newest(report)       # the newest that opens and verifies
    state = backend.restore_state(reads(reader))

Names: `params/<name>`, `state/<name>`, `ema/<name>`, `opt/<slot>/<name>`, `opt/count`.
"""

from __future__ import annotations

import dataclasses
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_format import (
    Box,
    FormatError,
    LocalStore,
    Mesh,
    NotCommittedError,
    Reader,
    Sharded,
    Tensor,
    Want,
    Writer,
    commit,
)
from checkpoints_format import Layout as FormatLayout
from checkpoints_format.packs import receipt_name
from portatrain.backends.base import Backend, Program
from portatrain.errors import UserError
from portatrain.module import TensorInfo
from portatrain.state import COUNT, slot_tensors

RECEIPTS_WITHIN_S = 600.0
"""How long the committing process waits for the others to have written."""

Read = Callable[[str, str, tuple[int, ...], tuple[int, ...]], np.ndarray]


def full_name(role: str, name: str) -> str:
    """The name in a checkpoint of tensor `name` in `role`."""
    return f"{role}/{name}" if name else role


def format_layout(program: Program) -> FormatLayout:
    """What a checkpoint of `program` holds, and which mesh position has which box of it."""
    mesh = {axis: size for axis, size in program.layout.mesh.sizes.items() if size > 1}

    def tensor(info: TensorInfo, role: str) -> Tensor:
        # Averages lie as parameters do; a slot as the layout's mapping for the optimizer says.
        spec = program.layout.tensor_spec(info, role="params" if role == "ema" else role)
        return Tensor(
            name=full_name(role, info.name), dtype=info.dtype, shape=info.shape, axes=info.axes,
            role=role.split("/")[0], batch=info.batch_dims,
            placement=Sharded(spec=tuple(tuple(a for a in dim if a in mesh) for dim in spec)),
        )  # fmt: skip

    infos = program.definition
    tensors = [tensor(t, "params") for t in infos.params.values()]
    tensors += [tensor(t, "state") for t in infos.states.values()]
    tensors += [tensor(t, "ema") for n, t in infos.params.items() if n in program.ema]
    tensors += [
        tensor(slot, slot.role)
        for n, t in infos.params.items()
        if n in program.trainable
        for slot in slot_tensors(program.optimizer, t).values()
    ]
    tensors.append(Tensor(name=COUNT, dtype="int32", shape=(), role="opt"))
    axes = tuple(mesh.items()) or (("device", 1),)
    return FormatLayout(tensors=tuple(tensors), meshes=(Mesh(axes=axes),))


def snapshot(backend: Backend, state: Any) -> dict[str, list[tuple[Box, np.ndarray]]]:
    """Copies on the host of all that this process holds, each box once."""
    held: dict[str, dict[tuple[int, ...], tuple[Box, np.ndarray]]] = {}
    for box in backend.local_boxes(state):
        boxes = held.setdefault(full_name(box.role, box.name), {})
        if box.offset not in boxes:
            boxes[box.offset] = (Box(box.offset, box.shape), box.fetch())
    return {name: list(boxes.values()) for name, boxes in held.items()}


def _source(held: list[tuple[Box, np.ndarray]]) -> Callable[[Box], np.ndarray]:
    """Any box of a tensor, put together from the pieces that this process holds (torch has one a layer)."""

    def values(wanted: Box) -> np.ndarray:
        for box, array in held:
            if box.intersect(wanted) == wanted:
                return array[wanted.slices(box.offset)]
        out = np.empty(wanted.shape, held[0][1].dtype)
        for box, array in held:
            common = box.intersect(wanted)
            if common is not None:
                out[common.slices(wanted.offset)] = array[common.slices(box.offset)]
        return out

    return values


def reads(reader: Reader) -> Read:
    """For `Backend.restore_state`: boxes out of an open checkpoint, checked as they are read."""

    def read(role: str, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
        return reader.read_many([Want(full_name(role, name), Box(offset, shape), None)])[0]

    return read


class Checkpoints:
    """The folder `checkpoints/step-NNNNNNNN` of a run. A second save waits for the first.

    Every process writes its own boxes; `process` 0 commits when the receipts of all are there, inside `guard()`, which
    raises where the run has gone to another attempt.
    """

    def __init__(
        self, folder: Path, *, keep: int = 2, save_name: str = "a1", process: int = 0, processes: int = 1,
        guard: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:  # fmt: skip
        self.guard = guard
        self.folder, self.keep, self.save_name = folder, keep, save_name
        self.process, self.processes = process, processes
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def steps(self) -> list[int]:
        """Steps that a folder exists for, ascending; whether one is whole, only its COMMIT says."""
        names = [p.name for p in self.folder.iterdir()] if self.folder.is_dir() else []
        return sorted(int(n[5:]) for n in names if n.startswith("step-") and n[5:].isdigit())

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    # ---- saving

    def save(self, step: int, backend: Backend, state: Any, meta: Mapping[str, Any]) -> None:
        """Copy the state to the host, then write and commit in the background.

        Raises UserError if the save before this one failed; what was committed earlier stands.
        """
        self.wait()
        layout = dataclasses.replace(format_layout(backend.program), writers=self.processes)
        held = snapshot(backend, state)
        self._thread = threading.Thread(
            target=self._write, args=(step, layout, held, dict(meta)), name="portatrain-checkpoint"
        )
        self._thread.start()

    def _write(
        self, step: int, layout: FormatLayout, held: Mapping[str, Any], meta: Mapping[str, Any]
    ) -> None:
        try:
            sources = {name: _source(boxes) for name, boxes in held.items()}
            with LocalStore(self.path(step), create=True) as store:
                Writer(store, layout, save=self.save_name, writer=self.process).write(sources)
                if self.process:
                    return
                self._await_receipts(store)
                with self.guard():
                    commit(store, layout, save=self.save_name, meta=meta)
            self._sweep(step)
        except BaseException as error:
            self._error = error

    def _await_receipts(self, store: LocalStore) -> None:
        """Until every process has written. In the file system, as a collective here could meet one of the step's."""
        deadline_s = time.monotonic() + RECEIPTS_WITHIN_S
        for writer in range(self.processes):
            while store.size(receipt_name(self.save_name, writer)) is None:
                if time.monotonic() > deadline_s:
                    raise UserError(
                        f"checkpoint in {self.folder}", expected=f"the receipt of process {writer}",
                        got=f"none within {RECEIPTS_WITHIN_S:.0f} s", do="All processes must see one run directory.",
                    )  # fmt: skip
                time.sleep(0.01)

    def _sweep(self, newest: int) -> None:
        """Remove all but the last `keep` checkpoints that are committed. Nothing is removed before this one stands."""
        good = [s for s in self.steps() if s <= newest and (self.path(s) / "COMMIT").exists()]
        for step in good[: -self.keep]:
            with self.guard():
                (self.path(step) / "COMMIT").unlink()  # first: what is half removed is not a checkpoint
            shutil.rmtree(self.path(step), ignore_errors=True)

    def wait(self) -> None:
        """Wait for the save under way; UserError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if isinstance(error, FormatError):
            raise UserError(error.what, expected=error.expected, got=error.got, do=error.do) from error
        if error is not None:
            raise error

    # ---- going on

    def at(self, step: int) -> Reader:
        """The checkpoint of `step`, which another process has found and verified."""
        return Reader(LocalStore(self.path(step)))

    def newest(self, report: Callable[[str], None]) -> tuple[int, Reader] | None:
        """The newest committed checkpoint of which every byte verifies; None where nothing was ever committed.

        An uncommitted folder is a save that did not finish: passed over in silence. A damaged one is reported, and the
        one before it taken. UserError where there are commits and none is left that verifies.
        """
        damaged: list[str] = []
        for step in reversed(self.steps()):
            try:
                reader = Reader(LocalStore(self.path(step)))
                reader.verify_all()
                return step, reader
            except NotCommittedError:
                continue
            except FormatError as error:
                damaged.append(str(error))
                report(f"checkpoint of step {step} is damaged and passed over: {error}")
        if damaged:
            raise UserError(
                f"checkpoints in {self.folder}", expected="one that verifies", got=f"none: {damaged[0]}",
                do="Restore the folder from a copy, or begin a new run under another name.",
            )  # fmt: skip
        return None
