"""Define the special points of an operation, and compare a backend with the oracle there.

`cases.py` draws arguments at random, and so never meets a kink, a tie, an infinity or an axis of size 0. A `Special`
has such arguments. At a kink, finite differences do not give the derivative: it is a convention, which the operation's
docstring states and `gradients` repeats in NumPy. If no convention is needed, the oracle's differences are used.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from portatrain.backends.base import Context
from portatrain.backends.reference.backend import ReferenceBackend
from portatrain.testing.check import Check
from portatrain.testing.oracle import results_of
from portatrain.testing.tolerance import FACTOR, MOVE, UNIT_ROUNDOFF

Array = np.ndarray
Gradients = Callable[..., Sequence[Array]]

INF, NAN = np.inf, np.nan
EMPTY = np.zeros((2, 0, 3), np.float32)

SMALLEST_NORMAL = 2.0**-126
"""Devices may take smaller numbers for 0 (XLA on a CPU does), so a number below it may count as 0 of its sign."""


def points(*values: float) -> Array:
    """(P,) float32: what every operation is tried at (zeros of both signs, numbers below and above the smallest normal
    one, ordinary and large ones, infinities, NaN), and more."""
    common = (0.0, -0.0, 1e-40, -1e-40, 1e-30, -1e-30, 0.5, -0.5, 1.0, -1.0, 3.0, -3.0, 30.0, -30.0, 1e4, -1e4)
    large = (1e18, -1e18, INF, -INF, NAN)
    return np.array([*common, *large, *values], np.float32)


def f32(values: Any) -> Array:
    return np.array(values, np.float32)


def i32(values: Any) -> Array:
    return np.array(values, np.int32)


def one_or_more(size: Array) -> Array:
    return np.maximum(size, 1.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Special:
    """`fn(ops, *args)` of `method` at special arguments.

    gradients(*args, g) are the gradients of (result * g).sum() by the floating arguments, in float64; 'differences':
    the oracle's differences, for points at which the operation is smooth; None: none are compared, as no gradient is
    defined there or none flows.
    """

    method: str
    what: str
    fn: Callable[..., Any]
    args: tuple[Array, ...]
    gradients: Gradients | str | None = "differences"
    terms: Callable[[Array], Array] | None = None
    """Elementwise: the size of the terms that may cancel in the result at x (1 in 1 - tanh(x)^2); None: no such."""
    each: bool = False
    """Elementwise: each gradient is held to its own size; else to the largest element of all of them."""
    context: Context = field(default_factory=Context)

    @property
    def name(self) -> str:
        return f"{self.method}, {self.what}"


def elementwise(
    method: str,
    what: str,
    fn: Callable[..., Any],
    points: Array,
    slope: Callable[[Array], Array],
    terms: Callable[[Array], Array] | None = None,
) -> Special:
    """An operation on one array whose derivative at x is slope(x)."""
    return Special(
        method=method, what=what, fn=fn, args=(points,), gradients=lambda x, g: (g * slope(x),), terms=terms, each=True
    )


def special_checks(backend: Any, cases: Sequence[Special]) -> Iterator[Check]:
    """The comparisons of all `cases`, which share one context: one program for values, one for gradients."""
    context = cases[0].context
    starts = np.cumsum([0, *(len(case.args) for case in cases)])
    args = tuple(a for case in cases for a in case.args)

    def everything(ops: Any, *given: Any) -> list[tuple]:
        return [results_of(c.fn)(ops, *given[i : i + len(c.args)]) for c, i in zip(cases, starts[:-1], strict=True)]

    got = backend.evaluate(everything, args, context)
    for case, mine in zip(cases, got, strict=True):
        yield from _values(case, mine)
    smooth = [case for case in cases if case.gradients is not None]
    if smooth:
        yield from _gradients(backend, smooth)


def _values(case: Special, got: Sequence[Any]) -> Iterator[Check]:
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an empty mean is NaN, as it is due
        choices = [_oracle(case, args) for args in _read_as(case.args)]
        near = [_oracle(case, tuple(_moved(a, sign) for a in case.args)) for sign in (1.0, -1.0)]
    for i, mine in enumerate(got):
        true = [c[i] for c in choices]
        with np.errstate(all="ignore"):
            change = [np.abs(n[i].astype(np.float64) - true[0]) / MOVE for n in near]
        yield _nearest(case, f"result {i}", np.asarray(mine), true, np.maximum(*change) + _terms(case, 0))


def _gradients(backend: Any, cases: Sequence[Special]) -> Iterator[Check]:
    context = cases[0].context
    weights: list[Array] = []
    for case in cases:
        rng = np.random.default_rng(list(case.name.encode()))
        shape = _oracle(case, case.args)[0].shape
        weights.append((rng.choice((-1.0, 1.0), shape) * rng.uniform(0.5, 2.0, shape)).astype(np.float32))
    starts = np.cumsum([0, *(len(case.args) for case in cases)])
    given = (*(a for case in cases for a in case.args), *weights)

    def scalar(ops: Any, *given: Any) -> Any:
        total = 0.0
        for case, i, g in zip(cases, starts[:-1], given[starts[-1] :], strict=True):
            total = total + (results_of(case.fn)(ops, *given[i : i + len(case.args)])[0] * g).sum()
        return total

    _, found = backend.differentiate(scalar, given, context)
    flat = iter([np.asarray(g) for g in found if g is not None])
    for case, g in zip(cases, weights, strict=True):
        mine = [next(flat) for a in case.args if a.dtype.kind == "f"]
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            choices = [_true_gradients(case, args, g) for args in _read_as(case.args)]
            near = [_true_gradients(case, tuple(_moved(a, s) for a in case.args), g) for s in (1.0, -1.0)]
        for i, one in enumerate(mine):
            true = [c[i] for c in choices]
            with np.errstate(all="ignore"):
                change = [np.abs(n[i] - true[0]) / MOVE for n in near]
            # What a backward pass rounds is what flows through it, so the largest element counts for all of them.
            flows = max((float(np.abs(c[np.isfinite(c)]).max(initial=0.0)) for c in choices[0]), default=0.0)
            size = _terms(case, i) if case.each else flows
            yield _nearest(case, f"gradient {i}", one, true, np.maximum(*change) + size)


def _terms(case: Special, i: int) -> Any:
    if case.terms is None:
        return 0.0
    size = case.terms(np.abs(case.args[i].astype(np.float64)))
    return np.where(np.isfinite(size), size, 0.0)


def _true_gradients(case: Special, args: tuple[Array, ...], g: Array) -> list[Array]:
    if callable(case.gradients):
        wide = (a.astype(np.float64) if a.dtype.kind == "f" else a for a in args)
        return [np.asarray(x, np.float64) for x in case.gradients(*wide, g.astype(np.float64))]
    _, found = ReferenceBackend.differentiate(
        lambda ops, *a: (results_of(case.fn)(ops, *a)[0] * g).sum(), args, case.context
    )
    return [x for x in found if x is not None]


def _oracle(case: Special, args: tuple[Array, ...]) -> tuple[Array, ...]:
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ReferenceBackend.evaluate(results_of(case.fn), args, case.context)


def _read_as(args: tuple[Array, ...]) -> list[tuple[Array, ...]]:
    """Return the arguments unchanged, and, if one has numbers below `SMALLEST_NORMAL`, also with zeros in their
    place."""
    flushed = tuple(
        np.where(np.abs(a) < SMALLEST_NORMAL, np.copysign(0.0, a), a).astype(a.dtype) if a.dtype.kind == "f" else a
        for a in args
    )
    same = all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in zip(args, flushed, strict=True))
    return [args] if same else [args, flushed]


def _moved(array: Array, sign: float) -> Array:
    """Return the array with every element a little larger or smaller, in the same way for all, so that ties remain."""
    return array * (1 + sign * MOVE) if array.dtype.kind == "f" else array


def _nearest(case: Special, what: str, mine: Array, true: Sequence[Array], amplification: Array) -> Check:
    """Compare each element with the nearest of the true values; equal infinities and NaNs agree."""
    if mine.shape != true[0].shape or (mine.dtype.kind == "f") != (true[0].dtype.kind == "f"):
        wrong = f"{what}: {mine.dtype} {mine.shape} where {true[0].dtype} {true[0].shape} is due"
        return Check(case=case.name, what=wrong, error=np.nan, tolerance=0.0)
    if mine.dtype.kind != "f":
        return Check(case=case.name, what=what, error=float((mine != true[0]).sum()), tolerance=0.0)
    with np.errstate(all="ignore"):
        errors = np.min([_difference(mine, t.astype(np.float32)) for t in true], axis=0)
        room = np.where(np.isfinite(amplification), amplification, 0.0) + np.where(
            np.isfinite(true[0]), np.abs(true[0]), 0.0
        )
    allowed = FACTOR["fp32"] * UNIT_ROUNDOFF["fp32"] * room + SMALLEST_NORMAL
    if not mine.size:
        return Check(case=case.name, what=what, error=0.0, tolerance=0.0)
    worst = int(np.argmax(errors / allowed))
    at = np.unravel_index(worst, mine.shape)
    said = f"{what} at {tuple(map(int, at))}: {mine[at]:.6g} where {true[0][at]:.6g} is due"
    return Check(case=case.name, what=said, error=float(errors.flat[worst]), tolerance=float(allowed.flat[worst]))


def _difference(mine: Array, true: Array) -> Array:
    """Return |mine - true|: 0 for equal infinities or two NaNs, infinite if only one of them is finite."""
    same = (mine == true) | (np.isnan(mine) & np.isnan(true))
    apart = np.abs(mine.astype(np.float64) - true.astype(np.float64))
    return np.where(same, 0.0, np.where(np.isfinite(apart), apart, np.inf))


def kink(function: Callable[[Array], Array], slope: Callable[[Array], Array], points: Array) -> Array:
    """Return the distance of slope(x) from the interval between the differences on the left and on the right of each
    point: 0 for a subgradient. This checks the conventions of the tables against their functions."""
    step = 1e-7 * np.maximum(1.0, np.abs(points))
    left = (function(points) - function(points - step)) / step
    right = (function(points + step) - function(points)) / step
    low, high = np.minimum(left, right), np.maximum(left, right)
    at = slope(points)
    return np.maximum(np.maximum(low - at, at - high), 0.0)
