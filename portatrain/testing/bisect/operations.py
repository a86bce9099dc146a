"""Judge one call of an operation by the oracle, on the numbers that the side itself had.

A result may differ from the oracle's by `testing.tolerance`, which is defined for one operation with careful rounding,
and a sum of n terms beyond the 64 of that definition by sqrt(n / 64) more: rounding errors of a sum are independent.
The gradient of an argument is compared along directions, as the tests of operations do. In bfloat16 a backward pass
rounds what it computes again from the forward pass and what it computes itself, so twice the tolerance is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from portatrain.backends.base import Context
from portatrain.backends.reference.differences import directional_derivative
from portatrain.backends.reference.ops import ReferenceOps
from portatrain.backends.reference.run import as_reference
from portatrain.backends.reference.watched import is_array
from portatrain.backends.watched import BODIES, WATCHED, Call, call_with, taken_apart
from portatrain.errors import UserError
from portatrain.testing.tolerance import amplification, moved, tolerance

TERMS = 64
"""Sums of up to this many terms are within the tolerance of an operation (`testing/tolerance.py`)."""
NO_SLOPE = ("stop_gradient", "top_k", "sort", "weight")
"""Operations with a derivative that differences of the oracle do not show."""


@dataclass(frozen=True, kw_only=True)
class Error:
    """An error of a call: the part of it, the element, the value there, the oracle's, and the tolerance."""

    part: str
    element: str
    value: float
    oracle: float
    allowed: float

    @property
    def bad(self) -> bool:
        return not abs(self.value - self.oracle) <= self.allowed


@dataclass(frozen=True, kw_only=True)
class Judge:
    """The oracle for the calls of one microbatch on one side. terms: the longest sum of the step."""

    context: Context
    terms: int

    @property
    def _wider(self) -> float:
        return math.sqrt(max(1.0, self.terms / TERMS))

    @property
    def precision(self) -> str:
        return "fp32" if self.context.precision == "fp32" else "bf16"

    def function(self, call: Call) -> Callable[..., list[np.ndarray]]:
        """Return the operation in float64, as a function of the call's arrays."""

        def run(*arrays: np.ndarray) -> list[np.ndarray]:
            context = self.context
            ops = ReferenceOps(seed=context.seed, step=context.step, sample=context.sample, training=True)
            ops.layer = np.asarray(call.layer or 0, np.int32)
            results: list[Any] = []
            with np.errstate(all="ignore"):
                taken_apart(call_with(getattr(ops, call.name), call.template, arrays), is_array, results)
            return [np.asarray(r) for r in results]

        return run

    def _stages(self, call: Call) -> float:
        """Return how many operations a call rounds the results of: those of its function in bfloat16. The tolerance in
        fp32 has room for them."""
        if self.precision == "fp32" or call.name not in BODIES:
            return 1.0
        counted = 0

        def counting(name: str) -> Callable[..., Any]:
            def method(ops: Any, *args: Any, **options: Any) -> Any:
                nonlocal counted
                counted += 1
                return getattr(ReferenceOps, name)(ops, *args, **options)

            return method

        made = type("Counting", (ReferenceOps,), {name: counting(name) for name in WATCHED})
        ops = made(seed=self.context.seed, step=self.context.step, sample=self.context.sample, training=True)
        with np.errstate(all="ignore"):
            call_with(getattr(ops, call.name), call.template, [as_reference(a) for a in call.args])
        return float(counted)

    def forward(self, call: Call, at: tuple[int, int] | None = None) -> Error | None:
        """Return the error of the result with the largest one; with `at` that of (result, flat index). None: the oracle
        refuses the arguments."""
        run, given = self.function(call), [as_reference(a) for a in call.args]
        try:
            exact = run(*given)
        except (UserError, ValueError, IndexError):
            return None
        worst: Error | None = None
        for i, (got, true) in enumerate(zip(call.results, exact, strict=True)):
            if got.shape != true.shape:
                return Error(part=f"result {i}", element="", value=math.nan, oracle=math.nan, allowed=0.0)
            if true.dtype.kind == "f":
                rng = np.random.default_rng(i)
                size = amplification(lambda *xs, i=i: run(*xs)[i], given, true, rng)
                allowed = self._stages(call) * self._wider * tolerance(largest(true), size, self.precision)
            else:
                allowed = 0.0
            apart = difference(got, true)
            index = at[1] if at is not None and at[0] == i else int(np.argmax(apart)) if apart.size else None
            if index is None or (at is not None and at[0] != i):
                continue
            found = error_at(f"result {i}" if len(exact) > 1 else "result", index, got, true, allowed)
            if worst is None or _ratio(found) > _ratio(worst):
                worst = found
        return worst

    def backward(self, call: Call, i: int, index: int) -> Iterator[Error]:
        """Yield the errors of the gradient of argument `i`: at element `index`, then along a random direction."""
        grad = call.arg_grads[i]
        if call.name in NO_SLOPE or grad is None:
            return
        run, given = self.function(call), [as_reference(a) for a in call.args]
        # The gradient of a loss is that of its sum; the losses of samples have none.
        weights = [None if g is None else g.astype(np.float64) for g in call.result_grads]
        rng = np.random.default_rng(0)
        found = [g.astype(np.float64) for g in call.arg_grads if g is not None]
        unit = np.zeros(grad.shape)
        unit.flat[index] = 1.0
        dense = rng.normal(size=grad.shape)
        sizes = (max(map(largest, found)), max(float(np.linalg.norm(g)) for g in found))
        for what, direction, size in (("element", unit, sizes[0]), ("direction", dense, sizes[1])):
            true = self._slope(run, given, weights, i, direction)
            near = []
            for _ in range(2):
                away = [moved(a, rng) if a.dtype.kind == "f" else a for a in given]
                cotangents = [None if w is None else moved(w, rng) for w in weights]
                near.append(abs(self._slope(run, away, cotangents, i, direction) - true) / 1e-6)
            stages = (1.0 if self.precision == "fp32" else 2.0) * self._stages(call)
            yield Error(
                part=f"gradient of argument {i}" + (" along a random direction" if what == "direction" else ""),
                element=place(index, grad.shape) if what == "element" else "",
                value=float((grad.astype(np.float64) * direction).sum()),
                oracle=true,
                allowed=stages * self._wider * tolerance(size, max(near), self.precision),
            )

    def _slope(
        self,
        run: Callable[..., list[np.ndarray]],
        given: Sequence[np.ndarray],
        weights: Sequence[np.ndarray | None],
        i: int,
        direction: np.ndarray,
    ) -> float:
        def scalar(*arrays: np.ndarray) -> float:
            pairs = zip(run(*arrays), weights, strict=True)
            return float(sum((y * w).sum() for y, w in pairs if w is not None and y.dtype.kind == "f"))

        along = [direction if j == i else None for j in range(len(given))]
        return directional_derivative(scalar, given, along)


def error_at(part: str, index: int, got: np.ndarray, true: np.ndarray, allowed: float) -> Error:
    """Return the error of one element, by its flat index."""
    return Error(
        part=part,
        element=place(index, got.shape),
        value=float(got.flat[index]),
        oracle=float(true.flat[index]),
        allowed=allowed,
    )


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the absolute difference, elementwise; 0 where both are NaN or the same infinity, else infinity if one is
    not finite."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    with np.errstate(invalid="ignore"):
        apart = np.abs(x - y)
    same = (x == y) | (np.isnan(x) & np.isnan(y))
    return np.where(same, 0.0, np.where(np.isfinite(apart), apart, np.inf))


def largest(array: np.ndarray) -> float:
    """Return the largest absolute value of the finite elements."""
    x = np.abs(np.asarray(array, np.float64))
    return float(x[np.isfinite(x)].max(initial=0.0))


def place(index: int, shape: tuple[int, ...]) -> str:
    """Return a flat index as it is written: '[0, 3]'; '' for an array without axes."""
    return str([int(i) for i in np.unravel_index(index, shape)]) if shape else ""


def value_at(array: np.ndarray, index: int) -> Any:
    """Return the element at a flat index, NaN beyond the end."""
    value = array.flat[index] if index < array.size else np.nan
    return int(value) if array.dtype.kind in "iub" else float(value)


def index_of(element: str, shape: tuple[int, ...]) -> int:
    """Return the flat index of a place as `place` writes it; 0 for ''."""
    return int(np.ravel_multi_index([int(i) for i in element.strip("[]").split(",")], shape)) if element else 0


def looks_like(got: np.ndarray, true: np.ndarray) -> str:
    """Return what `got` is, if it is `true` in another order; '' if that is not seen."""
    if got.shape != true.shape:
        return f"it has the shape {list(got.shape)} and not {list(true.shape)}"
    if (
        got.ndim >= 2
        and got.shape[-1] == got.shape[-2]
        and np.array_equal(got, true.swapaxes(-1, -2).astype(got.dtype))
    ):
        return "its last two axes are transposed"
    if got.ndim >= 1:
        rows = true.reshape(len(true), -1).astype(got.dtype)
        mine = got.reshape(len(got), -1)
        at = [next((r for r in range(len(rows)) if np.array_equal(rows[r], row)), None) for row in mine]
        if None not in at and at != list(range(len(rows))):
            return f"its rows are the rows {at} of what they should be"
    return ""


def _ratio(error: Error) -> float:
    apart = float(difference(np.array(error.value), np.array(error.oracle)))
    return apart / max(error.allowed, 1e-300)
