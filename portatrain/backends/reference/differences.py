"""Finite differences in float64: the oracle of gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

_CLOSE = 1e-9
_NOISE = 1e-14
_HALVINGS = 24


def directional_derivative(
    function: Callable[..., float], args: Sequence[np.ndarray], direction: Sequence[np.ndarray | None]
) -> float:
    """Return d/dh function(args + h direction) at h = 0, to about nine digits.

    It uses central differences of fourth order, (8 (f(h) - f(-h)) - (f(2h) - f(-2h))) / 12 h + O(h^4) (Fornberg 1988,
    table 1). It halves h until two successive results agree to 1e-9, or to the rounding error of f divided by h. The
    first h changes the element with the largest direction by a hundredth of the root mean square of the arguments.

    Args:
        function: must be smooth at `args`; near a kink, h is halved until the kink is outside.
        args: float64 arrays.
        direction: one array per argument, or None for an argument that does not change.
    """
    moved = [(a, d) for a, d in zip(args, direction, strict=True) if d is not None]
    reach = max(float(np.abs(d).max()) for _, d in moved)
    square = np.mean([float(np.mean(np.square(a))) for a, _ in moved])
    h = 0.01 * float(np.sqrt(square) or 1.0) / reach

    def odd(t: float) -> tuple[float, float]:
        """Return (f(t) - f(-t), the larger of |f(t)| and |f(-t)|)."""

        up, down = (
            float(function(*(a if d is None else a + s * d for a, d in zip(args, direction, strict=True))))
            for s in (t, -t)
        )
        return up - down, max(abs(up), abs(down))

    wide, _ = odd(2 * h)
    narrow, size = odd(h)
    found = (8 * narrow - wide) / (12 * h)
    for _ in range(_HALVINGS):
        h, wide = h / 2, narrow
        narrow, size = odd(h)
        finer = (8 * narrow - wide) / (12 * h)
        if abs(finer - found) <= max(_CLOSE * abs(finer), _NOISE * size / h):
            return finer
        found = finer
    return found
