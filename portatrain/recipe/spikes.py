"""`Spikes`: which steps of a run are spikes, as a pure function of the losses and gradient norms before them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from portatrain.config import added_later, check_types
from portatrain.errors import UserError

LAG = 2
"""A step is judged by the steps up to this many before it: a backend may start a step before the result of the one
before it is known, and all backends must decide alike."""
SIGMA = 1.4826
"""The standard deviation of normal numbers is their median absolute deviation times this (1 / 0.6745)."""
FLOOR = 0.01
"""The deviation counts as at least this share of the median, so that a flat curve has no band of width zero."""

Seen = tuple[int, float, float]
"""A step with an update: (step, loss, gradient norm before clipping)."""


@dataclass(frozen=True, kw_only=True)
class Spikes:
    """Skip the update of a step with a loss, or a gradient norm, far above those of the steps before it; or go back to
    the last checkpoint before it and leave its samples out.

    Over the last ``window`` steps that had an update, without the newest one, let m be the median and d the median of
    abs(x - m). A step is a spike if its value is above m + width * max(1.4826 d, 0.01 abs(m)). For normal numbers,
    1.4826 d is the standard deviation. Skipped steps do not enter the window, so a spike does not widen the band. Only
    large values are spikes.

    The rule is that of OLMo-core's SkipStepAdamW (128 steps, 6 deviations), with medians in place of means: one spike
    moves a mean and a standard deviation of 128 numbers, and hardly moves medians.

    Raises:
        UserError: a number is out of range, or there is nothing to judge by.
    """

    window: int = 128
    """Number of steps in the window, at least 4."""
    least: int = 64
    """Number of steps in the window before the first step can be a spike, from 4 to ``window``."""
    loss: float | None = 6.0
    """The width for the loss, in deviations. None: the loss is not judged."""
    grad_norm: float | None = 6.0
    """The width for the gradient norm, in deviations. None: the norm is not judged."""
    action: Literal["skip", "rewind"] = added_later("skip")
    """skip: the step changes nothing, and the next one takes the next samples. rewind: the run goes back to a
    checkpoint before the step, leaves its samples out (``leave_out`` of the recipe), and trains on; a step that is not
    finite is then a spike, too."""
    before: int = added_later(0)
    """Number of steps before a spike whose samples a rewind leaves out as well, at least 0. No effect with skip."""
    after: int = added_later(0)
    """Number of steps after a spike whose samples a rewind leaves out as well, at least 0. No effect with skip."""
    max_rewinds: int = added_later(10)
    """Maximum number of rewinds without a checkpoint behind the spike before; one more spike ends the run with an
    error, at least 1."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.loss is None and self.grad_norm is None:
            self._refuse("loss", "a width for loss or grad_norm", "Leave spikes out to judge no step.")
        if self.window < 4:
            self._refuse("window", "at least 4 steps", "A usual window is 128.")
        if not 4 <= self.least <= self.window:
            self._refuse("least", f"from 4 to window={self.window}", "A usual choice is half of the window.")
        for name, least in (("before", 0), ("after", 0), ("max_rewinds", 1)):
            if getattr(self, name) < least:
                self._refuse(name, f"an integer of at least {least}", "Use a larger number.")
        for name in ("loss", "grad_norm"):
            if (width := getattr(self, name)) is not None and not 0 < width < math.inf:
                self._refuse(name, "a number above 0, or none", "A usual width is 6.")

    def _refuse(self, field: str, expected: str, do: str) -> None:
        raise UserError(f"Spikes.{field}", expected=expected, got=repr(getattr(self, field)), do=do)

    def limits(self, step: int, seen: Sequence[Seen]) -> tuple[float, float]:
        """Return (largest loss, largest gradient norm) with which ``step`` has an update; infinity for no limit.

        ``seen``: the steps before it that had an update, in order.
        """
        known = [one for one in seen if one[0] <= step - LAG][-self.window :]
        if len(known) < self.least:
            return math.inf, math.inf
        _, losses, norms = zip(*known, strict=True)
        return limit(losses, self.loss), limit(norms, self.grad_norm)


def limit(values: Sequence[float], width: float | None) -> float:
    """Return the upper edge of the band around ``values``; infinity without a width."""
    if width is None:
        return math.inf
    middle = statistics.median(values)
    spread = statistics.median(abs(value - middle) for value in values)
    return middle + width * max(SIGMA * spread, FLOOR * abs(middle))
