"""Which checkpoints stay: the last k, every n-th step, the best by a metric. Plain Python; it removes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from portatrain.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Retention:
    """What to keep of the committed checkpoints.

    last: the newest ones, at least 1. every: also each whose step is a multiple of it. best: also the best by
    'min:NAME' or 'max:NAME', NAME an evaluation's metric such as loss; a checkpoint is judged by the evaluation after
    the step that it is of, if there was one.
    """

    last: int = 2
    every: int | None = None
    best: str | None = None

    def __post_init__(self) -> None:
        if self.best is not None:
            self.goal  # noqa: B018  # raises

    @property
    def goal(self) -> tuple[str, str]:
        """('min' or 'max', the metric)."""
        sign, colon, name = (self.best or "").partition(":")
        if sign not in ("min", "max") or not colon or not name:
            raise UserError(
                "checkpoint_keep_best",
                expected="min:NAME or max:NAME",
                got=repr(self.best),
                do="A usual one is min:loss, by the validation loss.",
            )
        return sign, name

    def kept(self, steps: Iterable[int], metrics: Mapping[int, Mapping[str, float]]) -> set[int]:
        """Those of the committed `steps` that stay; `metrics` by step."""
        ordered = sorted(steps)
        keep = set(ordered[-self.last :])
        if self.every is not None:
            keep |= {s for s in ordered if s % self.every == 0}
        if self.best is not None:
            sign, name = self.goal
            found = {s: metrics.get(s, {}).get(name) for s in ordered}
            judged = {s: v for s, v in found.items() if v is not None and math.isfinite(v)}
            if judged:
                pick = min if sign == "min" else max
                keep.add(pick(sorted(judged, reverse=True), key=judged.__getitem__))  # of equals the newest
        return keep
