"""Everything that a few steps on a backend leave, as whole logical tensors: the same code for one process or many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from portatrain.backends.base import Backend, LocalBox
from portatrain.backends.program import Program
from tests.support.mesh_cases import Case

Boxes = list[tuple[str, str, tuple[int, ...], tuple[int, ...], np.ndarray]]
Gather = Callable[[Any], list[Any]]
"""What every process has, on all of them."""


@dataclass
class Measured:
    losses: list[float]
    norms: list[float]
    skipped: list[int]
    weights: list[float]
    aux: list[dict[str, float]]
    layers: list[dict[str, np.ndarray]]
    gradients: dict[str, np.ndarray]
    first: dict[tuple[str, str], np.ndarray]
    """All tensors after the first step, by role and name."""
    last: dict[tuple[str, str], np.ndarray]
    evaluated: dict[str, np.ndarray]
    predicted: np.ndarray | None
    bytes: dict[str, int]
    """Of process 0, by role."""


def measure(make: Callable[[Program], Backend], case: Case, mesh: str, gather: Gather = lambda x: [x]) -> Measured:
    backend = make(case.program(mesh))
    batches = case.batches()
    state = backend.init_state()
    _, gradients = backend.gradients(state, batches[0], step=1)
    found = Measured([], [], [], [], [], [], gradients, {}, {}, {}, None, {})
    for step, batch in enumerate(batches, start=1):
        state, result = backend.step(state, batch, step=step, scale=min(1.0, step / 3))
        found.losses.append(float(result.loss))
        found.norms.append(float(result.grad_norm))
        found.skipped.append(int(result.skipped))
        found.weights.append(float(result.weight))
        found.aux.append({k: float(v) for k, v in result.aux.items()})
        found.layers.append({k: np.asarray(v.tolist()) for k, v in result.layers.items()})
        if step == 1:
            found.first = tensors(backend, state, gather)
    found.last = tensors(backend, state, gather)
    if backend.processes > 1:  # what a hook gets of the parameters
        for name in backend.definition.params:  # type: ignore[attr-defined]
            if not np.array_equal(backend.whole_parameter(state, name), found.last["params", name]):  # type: ignore[attr-defined]
                raise AssertionError(f"{name}: the whole parameter is not what the boxes of all processes hold")
    rows = {k: v[0][: len(v[0]) - case.left_out] for k, v in batches[0].items()}  # which do not divide over a mesh
    found.evaluated = backend.eval(state, rows)
    if case.predicts:
        found.predicted = backend.predict(state, rows)
    found.bytes = backend.describe_memory(state)
    same = gather((found.losses, found.norms, found.skipped, found.aux, found.layers))
    if any(repr(s) != repr(same[0]) for s in same):
        raise AssertionError(f"processes disagree: {same}")
    return found


def held(backend: Backend, state: Any) -> Boxes:
    def copy(box: LocalBox) -> tuple[str, str, tuple[int, ...], tuple[int, ...], np.ndarray]:
        return box.role, box.name, box.offset, box.shape, box.fetch()

    return [copy(box) for box in backend.local_boxes(state)]


def tensors(backend: Backend, state: Any, gather: Gather) -> dict[tuple[str, str], np.ndarray]:
    """Whole tensors from the boxes of all processes. They must cover every element; equal boxes must be equal."""
    boxes: dict[tuple[str, str], list[tuple[tuple[int, ...], np.ndarray]]] = {}
    for mine in gather(held(backend, state)):
        for role, name, offset, shape, array in mine:
            if array.shape != shape:
                raise AssertionError(f"{role} {name}: a box of {shape} holds {array.shape}")
            boxes.setdefault((role, name), []).append((offset, array))
    whole = {}
    for key, parts in boxes.items():
        size = tuple(max(o[d] + a.shape[d] for o, a in parts) for d in range(parts[0][1].ndim))
        out, seen = np.zeros(size, parts[0][1].dtype), np.zeros(size, bool)
        for offset, array in parts:
            at = tuple(slice(o, o + n) for o, n in zip(offset, array.shape, strict=True))
            if not np.array_equal(out[at][seen[at]], array[seen[at]], equal_nan=True):
                raise AssertionError(f"{key}: processes hold different values of one element")
            out[at], seen[at] = array, True
        if not seen.all():
            raise AssertionError(f"{key}: boxes leave elements out")
        whole[key] = out
    return whole
