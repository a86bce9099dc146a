"""The tolerance between a result and the oracle's, defined once for every operation and precision.

Let f be the operation, u the unit roundoff of the compute dtype, M the largest absolute value of the exact result, and
A its amplification: the largest change of f per unit, over random draws, when every floating input moves by a small
relative amount of random sign. A result computed with care has an error of a few u (M + A): M for the rounding of what
comes out, A for the rounding of what goes in and on the way (Higham 2002, section 1.6: forward error <= condition x
backward error). It is accepted up to FACTOR u (M + A).

FACTOR is 16 in fp32: sums of up to 64 terms may gather sqrt(64) u, and elementary functions are good to a few u.
In bf16 it is 2: sums run in float32, so what is left is the rounding of the operation's own one or two stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

UNIT_ROUNDOFF = {"fp32": 2.0**-24, "bf16": 2.0**-8}
FACTOR = {"fp32": 16.0, "bf16": 2.0}

MOVE = 1e-6
_DRAWS = 3


def tolerance(largest: float, amplification: float, precision: str = "fp32") -> float:
    """Return FACTOR u (M + A), as defined above."""
    return FACTOR[precision] * UNIT_ROUNDOFF[precision] * (largest + amplification)


def amplification(
    function: Callable[..., np.ndarray], args: Sequence[np.ndarray], value: np.ndarray, rng: np.random.Generator
) -> float:
    """Return the amplification A of `function` at `args`, whose value there is `value`. Integer arguments stay."""
    largest = 0.0
    for _ in range(_DRAWS):
        near = [moved(a, rng) if a.dtype.kind == "f" else a for a in args]
        largest = max(largest, float(np.abs(function(*near) - value).max(initial=0.0)) / MOVE)
    return largest


def moved(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return `array` with every element moved by the relative amount MOVE, up or down."""
    return array * (1 + MOVE * rng.choice((-1.0, 1.0), array.shape))
