"""Learning-rate schedules: frozen dataclasses that return the multiplier of a rule's ``lr`` at each step, in float64.

``schedule(step, steps)`` takes the step, counted from 1, and the length of the run. With w = warmup, every schedule
returns::

    step <= w               step / w           1/w at the first step, exactly 1 at step w
    w <= step <= steps      the class's curve  exactly 1 at step w, its end value at step ``steps``
    step > steps            the value at ``steps``

The multiplier is 0 only at the last step, and only if ``min_ratio`` is 0. It depends on nothing else, so a resumed run
has the same learning rates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from portatrain.config import check_types, require
from portatrain.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Base class of schedules. It handles the warm-up and the checks; a subclass defines ``curve``.

    Raises:
        UserError: ``warmup`` is below 0, or a field has the wrong type.
    """

    warmup: int = 0
    """Steps of linear warm-up; 0 starts at the full learning rate."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "warmup", self.warmup >= 0, "a number of steps, 0 or more")

    def __call__(self, step: int, steps: int) -> float:
        """Return the multiplier at ``step``, counted from 1, of a run of ``steps`` steps.

        Raises:
            UserError: ``step`` is below 1, or the schedule does not fit the run (see ``check``).
        """
        self.check(steps)
        if step < 1:
            raise UserError("a schedule's step", expected="1 or more", got=str(step), do="Count steps from 1.")
        step = min(step, steps)
        return step / self.warmup if step < self.warmup else self.curve(step, steps)

    def check(self, steps: int) -> None:
        """Raise UserError unless the schedule fits a run of ``steps`` steps. The recipe calls it."""
        name = type(self).__name__
        if steps < 1:
            raise UserError(
                f"{name} schedule", expected="a run of at least 1 step", got=str(steps), do="Give the run more steps."
            )
        if self.warmup > steps:
            raise UserError(
                f"{name}.warmup",
                expected=f"at most the {steps} steps of the run",
                got=str(self.warmup),
                do=f"Shorten the warm-up (--set schedule.warmup={steps // 10}) or lengthen the run (--set steps="
                f"{10 * self.warmup}).",
            )

    def curve(self, step: int, steps: int) -> float:
        """Return the multiplier for warmup <= step <= steps; it is 1 at step warmup."""
        raise TypeError(f"{type(self).__name__} does not define curve(self, step, steps)")


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """A constant learning rate: the multiplier is 1 after the warm-up."""

    def curve(self, step: int, steps: int) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """A straight line from 1 at step ``warmup`` to ``min_ratio`` at the last step.

    With x = (step - warmup) / (steps - warmup), the multiplier is min_ratio + (1 - min_ratio) (1 - x).
    """

    min_ratio: float = 0.0
    """The multiplier at the last step, in [0, 1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_ratio(self, self.min_ratio)

    def curve(self, step: int, steps: int) -> float:
        return _between(self.min_ratio, 1.0 - _progress(step, self.warmup, steps))


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Half a cosine from 1 at step ``warmup`` to ``min_ratio`` at the last step.

    With x = (step - warmup) / (steps - warmup), the multiplier is min_ratio + (1 - min_ratio) (1 + cos(pi x)) / 2.
    Source: Loshchilov & Hutter, SGDR, 2017 (arXiv:1608.03983), equation 5, with a single period.
    """

    min_ratio: float = 0.0
    """The multiplier at the last step, in [0, 1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_ratio(self, self.min_ratio)

    def curve(self, step: int, steps: int) -> float:
        return _between(self.min_ratio, 0.5 * (1.0 + math.cos(math.pi * _progress(step, self.warmup, steps))))


@dataclass(frozen=True, kw_only=True)
class WSD(Schedule):
    """Warm-up, stable, decay: 1 up to step ``steps - decay``, then down to ``min_ratio`` at the last step.

    With x = (step - steps + decay) / decay, the multiplier of a decay step is min_ratio + (1 - min_ratio) (1 - x), or
    (1 - sqrt(x)) in the place of (1 - x) with shape="sqrt". Sources: Hu et al., MiniCPM, 2024 (arXiv:2404.06395); for
    "sqrt", Hägele et al., Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations, 2024
    (arXiv:2405.18392).
    """

    decay: int | None = None
    """Steps of the decay. None: a tenth of the run, rounded down to whole steps, as in MiniCPM."""
    min_ratio: float = 0.0
    """The multiplier at the last step, in [0, 1]."""
    shape: Literal["linear", "sqrt"] = "linear"
    """The form of the decay."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "decay", self.decay is None or self.decay >= 0, "a number of steps, 0 or more, or none")
        _require_ratio(self, self.min_ratio)

    def check(self, steps: int) -> None:
        super().check(steps)
        decay = self.decay_steps(steps)
        if self.warmup + decay > steps:
            raise UserError(
                "WSD.decay",
                expected=f"warmup + decay to be at most the {steps} steps of the run",
                got=f"{self.warmup} + {decay}",
                do="Shorten the warm-up or the decay, or lengthen the run.",
            )

    def decay_steps(self, steps: int) -> int:
        """Return the number of decay steps in a run of ``steps`` steps."""
        return steps // 10 if self.decay is None else self.decay

    def curve(self, step: int, steps: int) -> float:
        progress = _progress(step, steps - self.decay_steps(steps), steps)
        return _between(self.min_ratio, 1.0 - (math.sqrt(progress) if self.shape == "sqrt" else progress))


def _require_ratio(schedule: Schedule, ratio: float) -> None:
    require(schedule, "min_ratio", 0 <= ratio <= 1, "a number between 0 and 1")


def _progress(step: int, start: int, stop: int) -> float:
    """Return the progress from ``start`` to ``stop``: 0 up to start, 1 at stop; 0 if the two are equal."""
    return max(0, step - start) / max(1, stop - start)


def _between(low: float, height: float) -> float:
    """Return ``low`` for height 0 and 1 for height 1, both exactly, and the line between them."""

    return low + (1.0 - low) * height if height < 1.0 else 1.0
