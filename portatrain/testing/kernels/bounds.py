"""Derive how far a kernel may be from the exact result, for every element, from dtypes and lengths alone.

`backends/rounding.py` gives the error of one operation on sums of up to n terms, in the root mean square:

    e(u, n) = sqrt((u^2 + (BESIDE + n / LANES) 2^-48) / 6)

Here u is the unit roundoff of what the operation takes and returns: 2^-24 if it stays in float32, 2^-8 if it is rounded
to bfloat16. The error of a sum is e times the sum of its absolute terms. The oracles carry these errors from one
operation to the next, to first order, and add the absolute values of errors that may have one cause. So each element
has a standard deviation of its own. It is allowed DEVIATIONS of them: rounding errors have tails like a normal
distribution, and the chance of one so large is 2 exp(-DEVIATIONS^2 / 2), or 3e-14. A court that compares ten million
elements convicts an honest kernel with a chance of less than one in a million. Nothing is measured, and nothing fitted.

A device may take numbers below the smallest normal one as zero, at every term of a sum, so `FLOOR` is allowed for
each term.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from portatrain.backends import rounding

Array = np.ndarray
Operands = Mapping[str, Any]

DEVIATIONS = 8.0
FLOOR = 2.0**-126
"""The smallest normal number of float32 and of bfloat16."""
PRECISION = {"float32": "fp32", "bfloat16": "bf16"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Due:
    """What a kernel owes: the exact values of one array in float64, and the allowed error of each element."""

    operand: str
    value: Array
    bound: Array


def wide(length: int) -> float:
    """Return e of an operation in float32 on sums of up to `length` terms."""
    return rounding.error("fp32", length)


def narrow(dtype: str, length: int) -> float:
    """Return e of an operation on sums of up to `length` terms, whose operand or result is rounded to `dtype`."""
    return rounding.error(PRECISION[dtype], length)


def due(operand: str, value: Array, deviation: Array, dtype: str, terms: int, largest: float) -> Due:
    """Return the value with its bound. deviation: of the value before it is rounded to `dtype`. terms: the number of
    terms of its sum, each at most FLOOR times `largest` off if it is taken as zero."""
    deviation = deviation + narrow(dtype, 0) * np.abs(value)
    return Due(operand=operand, value=value, bound=DEVIATIONS * deviation + FLOOR * terms * max(largest, 1.0))


def representable(array: Array, dtype: str) -> Array:
    """Return `array` in float32, rounded to nearest, ties to even, to the numbers that `dtype` has."""
    x = np.ascontiguousarray(array, np.float32)
    if dtype == "float32":
        return x
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32).reshape(x.shape)
