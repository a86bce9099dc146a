"""The oracle's answers to a case, computed once and kept for every backend that is checked in this process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from portatrain.backends.base import Context
from portatrain.backends.reference.backend import ReferenceBackend
from portatrain.backends.reference.differences import directional_derivative
from portatrain.testing.case import Case
from portatrain.testing.tolerance import MOVE, amplification, moved

DENSE_DIRECTIONS = 4
COORDINATES = 6


@dataclass(frozen=True, kw_only=True)
class Slope:
    """The exact derivative `true` of a case's scalar along `direction` in one argument, and its amplification."""

    what: str
    direction: np.ndarray
    true: float
    amplification: float
    dense: bool


@dataclass(frozen=True, kw_only=True)
class Answers:
    """args: as given to backend and oracle. results, amplifications: of `case.fn`. weights: the random weights whose
    sum with the results is the scalar that is differentiated; they are arguments of it, after `args`. slopes: by
    index among those arguments, for every floating one."""

    context: Context
    args: tuple[np.ndarray, ...]
    results: tuple[np.ndarray, ...]
    amplifications: tuple[float, ...]
    weights: tuple[np.ndarray, ...]
    slopes: dict[int, tuple[Slope, ...]]


@functools.lru_cache(maxsize=512)
def answers(case: Case, precision: str) -> Answers:
    """Return the exact results of `case` and, in fp32, its exact slopes."""
    rng = np.random.default_rng(list(case.name.encode()))
    context = replace(case.context, precision=precision)
    args = tuple(_representable(a, precision) for a in case.args(rng))
    results = ReferenceBackend.evaluate(results_of(case.fn), args, context)
    amplifications = tuple(
        0.0 if y.dtype.kind != "f" or case.exact else amplification(_result(case, i, context), args, y, rng)
        for i, y in enumerate(results)
    )
    if not case.gradient or precision != "fp32":
        return Answers(
            context=context, args=args, results=results, amplifications=amplifications, weights=(), slopes={}
        )
    used = results[:1] if case.first_only else results
    weights = tuple(rng.normal(size=y.shape).astype(np.float32) for y in used)
    given = [a.astype(np.float64) if a.dtype.kind == "f" else a for a in (*args, *weights)]
    scalar = scalar_of(case.fn, len(args))

    def function(*moved: np.ndarray) -> float:
        return float(ReferenceBackend.evaluate(scalar, moved, context))

    slopes = {
        i: () if i in case.constant else tuple(_slopes(function, given, i, rng))
        for i, a in enumerate(given)
        if a.dtype.kind == "f"
    }
    return Answers(
        context=context, args=args, results=results, amplifications=amplifications, weights=weights, slopes=slopes
    )


def results_of(fn: Callable[..., Any]) -> Callable[..., tuple]:
    """Wrap `fn` so that it returns a tuple of arrays, even if `fn` returns one array."""

    def flat(ops: Any, *args: Any) -> tuple:
        value = fn(ops, *args)
        return tuple(value) if isinstance(value, (tuple, list)) else (value,)

    return flat


def scalar_of(fn: Callable[..., Any], count: int) -> Callable[..., Any]:
    """The scalar that is differentiated: sum over results of (result * weight).sum(), with `count` arguments of fn
    followed by the weights."""

    def scalar(ops: Any, *given: Any) -> Any:
        weights = given[count:]
        results = results_of(fn)(ops, *given[:count])[: len(weights)]
        return sum((y * w).sum() for y, w in zip(results, weights, strict=True))

    return scalar


def _result(case: Case, i: int, context: Context) -> Callable[..., np.ndarray]:
    return lambda *args: ReferenceBackend.evaluate(results_of(case.fn), args, context)[i]


def _slopes(function: Callable[..., float], given: list, i: int, rng: np.random.Generator) -> Iterator[Slope]:
    """Dense random directions of unit variance, then single elements. As one slope may by chance be insensitive, the
    amplification is the largest over those of a kind."""
    size = given[i].size
    dense = [rng.normal(size=given[i].shape) for _ in range(DENSE_DIRECTIONS)]
    chosen = rng.choice(size, min(COORDINATES, size), replace=False)
    units = [np.eye(1, size, k).reshape(given[i].shape) for k in chosen]
    for kind, directions in (("direction", dense), ("element", units)):
        true, nearby = [], []
        for direction in directions:
            along = [direction if j == i else None for j in range(len(given))]
            true.append(directional_derivative(function, given, along))
            near = [moved(a, rng) if a.dtype.kind == "f" else a for a in given]
            nearby.append(directional_derivative(function, near, along))
        change = max((abs(a - b) / MOVE for a, b in zip(true, nearby, strict=True)), default=0.0)
        for k, (direction, value) in enumerate(zip(directions, true, strict=True)):
            label = k if kind == "direction" else int(chosen[k])
            yield Slope(
                what=f"{kind} {label}", direction=direction, true=value, amplification=change, dense=kind == "direction"
            )


def _representable(array: np.ndarray, precision: str) -> np.ndarray:
    """Return float32 values that the compute dtype holds exactly, so that rounding the input is no error."""
    if array.dtype.kind != "f":
        return array
    array = np.ascontiguousarray(array, np.float32)
    if precision == "bf16":
        bits = array.view(np.uint32)
        array = ((bits + 0x8000) & np.uint32(0xFFFF0000)).view(np.float32)
    return array
