"""What a backend gives for a small recipe on one mesh: the numbers that the check compares.

Runs in the process of the check, and in every process of a mesh of processes. Imports no framework itself.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from portatrain.backends.base import Backend
from portatrain.backends.program import Program
from portatrain.backends.state import COUNT, full_name, inventory
from portatrain.checkpoint.restore import restored
from portatrain.checkpoint.saver import Checkpoints

SCALE = 0.1
"""The schedule's multiplier in the steps: at a full rate, without a warm-up, many models jump far."""

Arrays = dict[str, np.ndarray]
Boxes = list[tuple[str, tuple[int, ...], np.ndarray]]
Gather = Callable[[Any], list[Any]]


@dataclass(kw_only=True)
class Measured:
    """loss, gradients: of the first batch, at the parameters of a fresh run ('initial') and at others ('moved').
    evaluated, predicted: at the latter. losses: of the steps from there. after: the whole state after the first
    step, by full name."""

    loss: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, Arrays] = field(default_factory=dict)
    evaluated: Arrays = field(default_factory=dict)
    predicted: np.ndarray | None = None
    losses: list[float] = field(default_factory=list)
    after: Arrays = field(default_factory=dict)


def state_at(backend: Backend, params: Mapping[str, np.ndarray], states: Mapping[str, np.ndarray]) -> Any:
    """Return a state with these parameters, averages equal to them, and slots of zero."""
    infos = {tensor.key: tensor.info for tensor in inventory(backend.program)}

    def read(role: str, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
        if role == COUNT:
            return np.zeros(shape, np.int32)
        held = {"params": params, "ema": params, "state": states}.get(role)
        info = infos[role, name]
        if held is None:
            return np.zeros(shape, info.dtype)
        return held[name][tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))].astype(info.dtype)

    return backend.restore_state(read)


def microbatches(batch: Mapping[str, np.ndarray], n: int) -> Arrays:
    """Return (samples, ...) as (n, samples / n, ...), as `Backend.step` takes it."""
    return {key: array.reshape(n, -1, *array.shape[1:]) for key, array in batch.items()}


def measure(
    backend: Backend,
    batches: Sequence[Mapping[str, np.ndarray]],
    points: Mapping[str, Mapping[str, np.ndarray]],
    states: Mapping[str, np.ndarray],
    *,
    accumulation: int = 1,
    steps: int = 2,
    predicts: bool = False,
    gather: Gather = lambda mine: [mine],
) -> Measured:
    """Run everything that `Measured` holds. `points`: parameters by the name of the point; the last is stepped from."""
    found = Measured()
    cut = [microbatches(batch, accumulation) for batch in batches]
    state: Any = None
    for name, params in points.items():
        state = state_at(backend, params, states)
        found.loss[name], found.gradients[name] = backend.gradients(state, cut[0], step=1)
    if accumulation == 1:
        found.evaluated = backend.eval(state, batches[0])
        if predicts:
            found.predicted = np.asarray(backend.predict(state, batches[0]))
    for step, batch in enumerate(cut[:steps], start=1):
        state, result = backend.step(state, batch, step=step, scale=SCALE)
        found.losses.append(float(result.loss))
        if step == 1:
            found.after = whole(backend, state, gather)
    return found


def whole(backend: Backend, state: Any, gather: Gather = lambda mine: [mine]) -> Arrays:
    """Return every tensor of the state whole, by full name, put together from the boxes of all processes."""
    return put_together(backend.program, gather(boxes_of(backend, state)))


def boxes_of(backend: Backend, state: Any) -> Boxes:
    """Return the boxes of a state that this process holds."""
    return [(full_name(b.role, b.name), b.offset, b.fetch()) for b in backend.local_boxes(state)]


def put_together(program: Program, held: Sequence[Boxes]) -> Arrays:
    """Return every tensor whole, by full name, from the boxes of all processes."""
    shapes = {full_name(t.role, t.info.name): t.info.shape for t in inventory(program)}
    found: Arrays = {}
    for boxes in held:
        for name, offset, array in boxes:
            there = found.setdefault(name, np.zeros(shapes.get(name, ()), array.dtype))
            there[tuple(slice(o, o + n) for o, n in zip(offset, array.shape, strict=True))] = array
    return found


@dataclass(kw_only=True)
class Resumed:
    """The states before a save and after the restores, by backend, and the losses of the next step."""

    saved: Arrays
    restored: Arrays
    loss: float
    loss_after: float


def saved_and_restored(
    first: Backend,
    second: Backend,
    batches: Sequence[Mapping[str, np.ndarray]],
    params: Mapping[str, np.ndarray],
    states: Mapping[str, np.ndarray],
) -> Resumed:
    """Train a step on `first`, save, restore on `second`, and take the next step on both."""
    state = state_at(first, params, states)
    state, _ = first.step(state, microbatches(batches[0], 1), step=1, scale=SCALE)
    with tempfile.TemporaryDirectory(prefix="portatrain-check-") as folder:
        checkpoints = Checkpoints(Path(folder) / "checkpoints")
        checkpoints.save(1, first, state, {"step": 1})
        checkpoints.wait()
        newest = checkpoints.newest(lambda text: None)
        assert newest is not None
        there = restored(second, newest[1])
        newest[1].store.close()
    saved, back = whole(first, state), whole(second, there)
    batch = microbatches(batches[1], 1)
    _, result = first.step(state, batch, step=2, scale=SCALE)
    _, after = second.step(there, batch, step=2, scale=SCALE)
    return Resumed(saved=saved, restored=back, loss=float(result.loss), loss_after=float(after.loss))
