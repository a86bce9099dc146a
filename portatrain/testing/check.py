"""Run the cases: compare a backend's values and gradients with the oracle's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from portatrain.testing.case import Case
from portatrain.testing.cases import CASES
from portatrain.testing.oracle import Answers, answers, results_of, scalar_of
from portatrain.testing.tolerance import tolerance


class ContractError(AssertionError):
    """A backend's operation differs from the oracle by more than the tolerance."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison. error and tolerance are absolute; the tolerance is 0 if the values must be equal."""

    case: str
    what: str
    error: float
    tolerance: float

    @property
    def good(self) -> bool:
        return self.error <= self.tolerance  # False for nan

    def __str__(self) -> str:
        word = "ok" if self.good else "DIFFERS"
        return f"{word:8}{self.case}: {self.what}: error {self.error:.3g}, tolerance {self.tolerance:.3g}"


def check_ops(backend: Any, cases: Sequence[Case] = CASES) -> int:
    """Check every case in every precision that it has; return the number of comparisons.

    `backend` is a class with `evaluate` and `differentiate`. Raises ContractError with a list of all that differ.
    """
    checks = [check for case in cases for precision in case.precisions for check in measure(backend, case, precision)]
    _raise(backend, checks)
    return len(checks)


def check_case(backend: Any, case: Case, precision: str = "fp32") -> None:
    """Check one case; raise ContractError if a result or gradient differs too much."""
    _raise(backend, list(measure(backend, case, precision)))


def _raise(backend: Any, checks: Sequence[Check]) -> None:
    bad = [check for check in checks if not check.good]
    if bad:
        lines = "\n".join(map(str, bad))
        raise ContractError(f"{backend.__name__}: {len(bad)} of {len(checks)} comparisons differ\n{lines}")


def measure(backend: Any, case: Case, precision: str = "fp32") -> Iterator[Check]:
    """Return the comparisons of one case: its results and, in fp32, its gradients."""
    expected = answers(case, precision)
    floating = tuple(a.dtype.kind == "f" for a in expected.args)
    fn = _in_compute_dtype(case.fn, floating) if precision == "bf16" else results_of(case.fn)
    got = backend.evaluate(fn, expected.args, expected.context)
    for i, (mine, true) in enumerate(zip(got, expected.results, strict=True)):
        what = f"{precision} result {i}" if len(expected.results) > 1 else f"{precision} result"
        yield _compare(case, what, np.asarray(mine), true, expected.amplifications[i], precision)
    if expected.slopes:
        yield from _compare_gradients(backend, case, expected)


def _compare(case: Case, what: str, mine: np.ndarray, true: np.ndarray, amplification: float, precision: str) -> Check:
    if mine.shape != true.shape or (mine.dtype.kind == "f") != (true.dtype.kind == "f"):
        wrong = f"{what}: {mine.dtype} {mine.shape} where {true.dtype} {true.shape} is due"
        return Check(case=case.name, what=wrong, error=math.nan, tolerance=0.0)
    equal = true.dtype.kind != "f" or case.exact
    allowed = 0.0 if equal else tolerance(_largest(true), amplification, precision)
    error = _largest(np.asarray(mine, np.float64) - np.asarray(true, np.float64))
    return Check(case=case.name, what=what, error=error, tolerance=allowed)


def _compare_gradients(backend: Any, case: Case, expected: Answers) -> Iterator[Check]:
    """Compare the backend's gradients along directions with differences of the oracle.

    An error e of a gradient is visible along a direction of unit variance as about |e|, so M of the tolerance is a norm
    there, and a largest element for single elements. Both are taken over all arguments, because rounding errors are as
    large as the values that pass through the backward pass, also if these cancel (the gradient of a query that sees
    one key is 0).
    """
    given = (*expected.args, *expected.weights)
    _, gradients = backend.differentiate(scalar_of(case.fn, len(expected.args)), given, expected.context)
    found = [np.asarray(g, np.float64) for g in gradients if g is not None]
    norm, largest = max(float(np.linalg.norm(g)) for g in found), max(map(_largest, found))
    for (i, slopes), gradient in zip(expected.slopes.items(), found, strict=True):
        name = f"gradient {i}" if i < len(expected.args) else f"gradient of weights {i - len(expected.args)}"
        if gradient.shape != given[i].shape:
            wrong = f"{name}: shape {gradient.shape} where {given[i].shape} is due"
            yield Check(case=case.name, what=wrong, error=math.nan, tolerance=0.0)
        elif i in case.constant:
            yield Check(case=case.name, what=name, error=_largest(gradient), tolerance=0.0)
        else:
            for slope in slopes:
                error = abs(float((gradient * slope.direction).sum()) - slope.true)
                allowed = tolerance(norm if slope.dense else largest, slope.amplification)
                yield Check(case=case.name, what=f"{name}, {slope.what}", error=error, tolerance=allowed)


def _in_compute_dtype(fn: Callable[..., Any], floating: tuple[bool, ...]) -> Callable[..., tuple]:
    """`fn` with its floating arguments cast to the compute dtype, and its floating results to float32 (NumPy has no
    bfloat16)."""

    def cast(ops: Any, *args: Any) -> tuple:
        given = [ops.cast(a, "compute") if f else a for a, f in zip(args, floating, strict=True)]
        values = results_of(fn)(ops, *given)
        return tuple(ops.cast(v, "float32") if "float" in str(v.dtype) else v for v in values)

    return cast


def _largest(array: np.ndarray) -> float:
    """Return the largest absolute value; nan if the array has a nan."""
    return float(np.abs(array).max(initial=0.0))
