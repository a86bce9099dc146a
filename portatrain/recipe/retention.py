"""The rule for keeping checkpoints: the newest k, every n-th step, the best by a metric, and one to go back to. Nothing
here deletes any."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from portatrain.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Retention:
    """The committed checkpoints to keep.

    Raises:
        UserError: ``best`` is not of the form 'min:NAME' or 'max:NAME'.
    """

    last: int = 2
    """Number of newest checkpoints to keep, at least 1."""
    every: int | None = None
    """Also keep each checkpoint whose step is a multiple of this number. None: no others."""
    best: str | None = None
    """Also keep the best checkpoint by 'min:NAME' or 'max:NAME', with NAME a metric of the evaluation after the
    checkpoint's step. A checkpoint without such an evaluation does not count. None: no others."""
    back: int = 0
    """To go back to: also keep the newest checkpoint that is at least this many steps older than the newest one, and
    the oldest one that is not, which takes its place in time. 0: no others."""
    floor: int = 0
    """A run does not go back behind this step: checkpoints before it do not count for ``back``."""

    def __post_init__(self) -> None:
        if self.best is not None:
            self.goal  # noqa: B018  # raises

    @property
    def goal(self) -> tuple[str, str]:
        """``best`` as ('min' or 'max', name of the metric)."""
        sign, colon, name = (self.best or "").partition(":")
        if sign not in ("min", "max") or not colon or not name:
            raise UserError(
                "checkpoint_keep_best",
                expected="min:NAME or max:NAME",
                got=repr(self.best),
                do="For the lowest validation loss, use min:loss.",
            )
        return sign, name

    def kept(self, steps: Iterable[int], metrics: Mapping[int, Mapping[str, float]]) -> set[int]:
        """Return the subset of the committed `steps` to keep.

        Args:
            metrics: step -> the metrics of its evaluation, name -> value.
        """
        ordered = sorted(steps)
        keep = set(ordered[-self.last :])
        if self.back and ordered:
            able = [s for s in ordered if s >= self.floor]
            old = [s for s in able if s <= ordered[-1] - self.back]
            keep |= {*old[-1:], *able[len(old) :][:1]}
        if self.every is not None:
            keep |= {s for s in ordered if s % self.every == 0}
        if self.best is not None:
            sign, name = self.goal
            found = {s: metrics.get(s, {}).get(name) for s in ordered}
            judged = {s: v for s, v in found.items() if v is not None and math.isfinite(v)}
            if judged:
                pick = min if sign == "min" else max
                keep.add(pick(sorted(judged, reverse=True), key=judged.__getitem__))  # the newest of equals

        return keep
