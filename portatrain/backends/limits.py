"""Whether a step has an update: its loss and its gradient norm are finite, and not above the limits of the recipe's
`spikes`."""

from __future__ import annotations

import ctypes
import math
from typing import Any

Limits = tuple[float, float]
"""The largest loss and the largest gradient norm, as numbers of float32."""
NONE: Limits = (math.inf, math.inf)


def as_float32(limits: Limits) -> Limits:
    """Return `limits` rounded to float32, in which all backends compare; one beyond its range is infinite."""
    loss, norm = (ctypes.c_float(limit).value for limit in limits)
    return loss, norm


def within(loss: float, norm: float, limits: Limits) -> bool:
    """Return whether a step with these numbers has an update."""
    return math.isfinite(loss) and math.isfinite(norm) and loss <= limits[0] and norm <= limits[1]


def within_on_device(xp: Any, loss: Any, norm: Any, limits: Any) -> Any:
    """Return the same for arrays of the framework `xp`; `limits` None is no comparison in the program."""
    good = xp.isfinite(loss) & xp.isfinite(norm)
    return good if limits is None else good & (loss <= limits[0]) & (norm <= limits[1])
