"""Time contenders in pairs: every round runs each once, in an order drawn anew, and ratios are taken within a round.

A slow phase of the machine slows both sides of a pair, and the order favours neither.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """The median of paired ratios with its 95 % interval: order statistics, which assume no distribution."""

    median: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interleaved(
    run: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    repeats: int = 1,
    seed: int = 0,
    before: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Return the seconds of `repeats` calls of each, by name, one value a round; the calls of `before` are not
    counted."""
    order, rng = list(run), random.Random(seed)
    taken: dict[str, list[float]] = {name: [] for name in run}
    for _ in range(rounds):
        rng.shuffle(order)
        for name in order:
            before()
            began = time.perf_counter()
            for _ in range(repeats):
                run[name]()
            taken[name].append((time.perf_counter() - began) / repeats)
    return taken


def rank_of_bound(n: int, confidence: float = 0.95) -> int:
    """Return the largest k, counted from 1, for which the k-th smallest and k-th largest of n values bracket the median
    with `confidence` at least: P(Binomial(n, 1/2) < k) <= (1 - confidence) / 2."""
    below, k = 0.0, 0
    while (below := below + math.comb(n, k) / 2**n) <= (1 - confidence) / 2:
        k += 1
    if k == 0:
        raise ValueError(f"{n} values do not bound a median with {confidence:.0%}: take at least 6")
    return k


def ratio(ours_s: Sequence[float], theirs_s: Sequence[float]) -> Ratio:
    """Return our speed over theirs: their seconds over ours, round by round."""
    ratios = sorted(b / a for a, b in zip(ours_s, theirs_s, strict=True))
    k = rank_of_bound(len(ratios))
    return Ratio(median=median(ratios), low=ratios[k - 1], high=ratios[-k])
