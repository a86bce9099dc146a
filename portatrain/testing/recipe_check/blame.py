"""Find the operation of a model's forward pass at which two runs of it part."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np

from portatrain.backends.base import Context
from portatrain.backends.reference.guard import GuardedOps, unwrapped
from portatrain.backends.reference.run import forward
from portatrain.backends.reference.trees import tree_map
from portatrain.errors.users_code import is_ours, shown
from portatrain.model.module import Definition
from portatrain.model.ops import Loss, Ops
from portatrain.testing import guard

OPERATIONS = tuple(name for name, _ in inspect.getmembers(Ops, inspect.isfunction) if not name.startswith("_"))
STRUCTURE = ("stack", "scan", "associative_scan")
"""Operations that run parts of the model, whose calls are noted one by one."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of an operation by the model: how it is written, in short, where, and its results."""

    name: str
    spec: str
    place: str
    results: tuple[np.ndarray, ...]

    def __str__(self) -> str:
        return f"ops.{self.name}({self.spec}) in {self.place}"


def place_of(frame: FrameType | None) -> str:
    """Return file and line of the nearest frame that is not portatrain's own."""
    while frame is not None and is_ours(frame.f_code.co_filename):
        frame = frame.f_back
    return "the model" if frame is None else f"{shown(frame.f_code.co_filename)}, line {frame.f_lineno}"


def recording(calls: list[Call], base: type[GuardedOps] = GuardedOps) -> type[GuardedOps]:
    """Return operations as those of `base` that append every call of the model to `calls`."""

    def noting(name: str) -> Callable[..., Any]:
        method = getattr(base, name)

        def call(self: Any, *args: Any, **options: Any) -> Any:
            if self._inside or self._comparing:
                return method(self, *args, **options)
            # What these call sees rows of many samples, and may.
            self._comparing = name in ("across_samples", "experts")
            try:
                result = method(self, *args, **options)
            finally:
                self._comparing = False
            found: list[np.ndarray] = []
            tree_map(lambda x: found.append(np.asarray(x)), _plain(result))
            spec = repr(args[0]) if args and isinstance(args[0], str) else "..."
            calls.append(Call(name=name, spec=spec, place=place_of(sys._getframe(1)), results=tuple(found)))
            return result

        return call

    return type("Recording", (base,), {"_comparing": False} | {name: noting(name) for name in OPERATIONS})


def _plain(result: Any) -> Any:
    plain = unwrapped(result)
    if plain is None:
        return ()
    return (plain.weight_B, plain.loss_B) if isinstance(plain, Loss) else plain


def parting(one: Sequence[Call], other: Sequence[Call]) -> Call | None:
    """Return the first call of two runs with the same inputs whose results differ, or None."""
    for a, b in zip(one, other, strict=False):
        if a.name in STRUCTURE:
            continue
        if a.name != b.name or len(a.results) != len(b.results):
            return b
        if any(
            not np.array_equal(x, y, equal_nan=x.dtype.kind == "f") for x, y in zip(a.results, b.results, strict=True)
        ):
            return a
    return None


def crossing(
    definition: Definition, batch: Mapping[str, np.ndarray], params: Mapping[str, np.ndarray], training: bool
) -> Call | None:
    """Return the first call whose results for a sample depend on the other samples, or None if none is seen.

    The axis that has as many times more elements as there are samples counts as the batch. A result without it, from
    another operation than a reduction over the whole batch, must be the same for all batches.
    """
    context = Context(training=training)
    rows = len(next(iter(batch.values())))
    together: list[Call] = []
    kept: list[Any] = []
    forward(definition, params, batch, context, operations=recording(together, guard.recording(kept)))
    for i in range(rows):
        alone: list[Call] = []
        replaying = recording(alone, guard.replaying(iter(kept), i))
        forward(definition, params, {k: v[[i]] for k, v in batch.items()}, context, operations=replaying)
        for a, b in zip(together, alone, strict=False):
            if a.name in STRUCTURE:
                continue
            if a.name != b.name or any(not _same(x, y, i, rows) for x, y in zip(a.results, b.results, strict=False)):
                return a
    return None


def _same(together: np.ndarray, alone: np.ndarray, i: int, rows: int) -> bool:
    if together.ndim != alone.ndim:
        return False
    for axis, (size, one) in enumerate(zip(together.shape, alone.shape, strict=True)):
        rest = (together.shape[:axis] + together.shape[axis + 1 :], alone.shape[:axis] + alone.shape[axis + 1 :])
        if size == rows * one and rows > 1 and rest[0] == rest[1]:  # the batch, or an axis that is joined with it
            together = np.take(together, range(i * one, (i + 1) * one), axis)
            break
    if together.shape != alone.shape:
        return False
    if together.dtype.kind != "f":
        return bool(np.array_equal(together, alone))
    size = max(1.0, float(np.abs(together).max(initial=0.0)))
    return bool(np.abs(together - alone).max(initial=0.0) <= guard.CLOSE * size)
