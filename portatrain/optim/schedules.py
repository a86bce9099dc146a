"""Learning-rate schedules as data: the multiplier of a rule's ``lr`` at each step, in float64.

``schedule(step, steps)`` takes the step from 1 and the length of the run. With w = warmup, for all::

    step <= w               step / w           1/w at the first step, exactly 1 at step w
    w <= step <= steps      the class's curve  exactly 1 at step w, its end value at step ``steps``
    step > steps            the value at ``steps``

so a step is never taken at rate 0 unless ``min_ratio`` is 0 and it is the last. The value depends
on nothing else: a run that is stopped and goes on finds the same rates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from portatrain.config import check_types
from portatrain.errors import UserError
from portatrain.optim.base import require


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Base of all schedules: the warm-up, the limits, and a curve that a subclass gives."""

    warmup: int = 0  # steps

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "warmup", self.warmup >= 0, "a number of steps, 0 or more")

    def __call__(self, step: int, steps: int) -> float:
        """The multiplier at ``step`` (from 1) of a run of ``steps``; UserError as in ``check``."""
        self.check(steps)
        if step < 1:
            raise UserError("a schedule's step", expected="1 or more", got=str(step), do="Count steps from 1.")
        step = min(step, steps)
        return step / self.warmup if step < self.warmup else self.curve(step, steps)

    def check(self, steps: int) -> None:
        """Raise UserError unless the schedule fits a run of ``steps``; to be asked before training."""
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
                do="Shorten the warm-up or lengthen the run.",
            )

    def curve(self, step: int, steps: int) -> float:
        """The multiplier for warmup <= step <= steps, 1 where step equals warmup."""
        raise TypeError(f"{type(self).__name__} does not define curve(self, step, steps)")


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """1 after the warm-up."""

    def curve(self, step: int, steps: int) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """A straight line from 1 at step ``warmup`` to ``min_ratio`` at the last step."""

    min_ratio: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_ratio(self, self.min_ratio)

    def curve(self, step: int, steps: int) -> float:
        return _between(self.min_ratio, 1.0 - _progress(step, self.warmup, steps))


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Half a cosine from 1 at step ``warmup`` to ``min_ratio`` at the last step.

    Loshchilov & Hutter, SGDR, 2017 (arXiv:1608.03983), equation 5, one period.
    """

    min_ratio: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_ratio(self, self.min_ratio)

    def curve(self, step: int, steps: int) -> float:
        return _between(self.min_ratio, 0.5 * (1.0 + math.cos(math.pi * _progress(step, self.warmup, steps))))


@dataclass(frozen=True, kw_only=True)
class WSD(Schedule):
    """Warm-up, stable, decay: still 1 at step ``steps - decay``, then down to ``min_ratio`` at ``steps``.

    Without ``decay`` it is a tenth of the run, rounded down to whole steps, as in MiniCPM. The way
    down is a line, or 1 - sqrt(progress) with shape="sqrt" (Hägele et al., Scaling Laws and
    Compute-Optimal Training Beyond Fixed Training Durations, 2024, arXiv:2405.18392). WSD itself is
    of Hu et al., MiniCPM, 2024 (arXiv:2404.06395).
    """

    decay: int | None = None  # steps
    min_ratio: float = 0.0
    shape: Literal["linear", "sqrt"] = "linear"

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
        """How many steps of a run of ``steps`` are on the way down."""
        return steps // 10 if self.decay is None else self.decay

    def curve(self, step: int, steps: int) -> float:
        progress = _progress(step, steps - self.decay_steps(steps), steps)
        return _between(self.min_ratio, 1.0 - (math.sqrt(progress) if self.shape == "sqrt" else progress))


def _require_ratio(schedule: Schedule, ratio: float) -> None:
    require(schedule, "min_ratio", 0 <= ratio <= 1, "a number between 0 and 1")


def _progress(step: int, start: int, stop: int) -> float:
    """0 up to ``start``, 1 at ``stop``; 0 where the two are one."""
    return max(0, step - start) / max(1, stop - start)


def _between(low: float, height: float) -> float:
    """``low`` at height 0 and 1 at height 1, both exactly."""
    return low + (1.0 - low) * height if height < 1.0 else 1.0
