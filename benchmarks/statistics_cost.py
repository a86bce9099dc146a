"""Measure what statistics add to a step: a step of tiny-lm with them beside one without, in paired rounds.

    python -m benchmarks.statistics_cost jax
    python -m benchmarks.statistics_cost torch

Prints how much longer such a step is (the median with its 95 % interval, as `benchmarks.paired`), and the share of the
time that statistics every 10 steps take.
"""

from __future__ import annotations

import itertools
import sys
from statistics import median

import numpy as np

from benchmarks.paired import interleaved, ratio
from benchmarks.shapes import SHAPES, batch_of, open_ours

ROUNDS = 41


def main(backend: str) -> None:
    shape = SHAPES["tiny-lm"]
    run = open_ours(backend, shape)
    batch = {k: v[None] for k, v in batch_of(shape).items()}
    steps, held = itertools.count(1), [run.init_state()]

    def step(**more: bool) -> None:
        held[0], result = run.step(held[0], batch, step=next(steps), scale=1.0, **more)
        float(result.loss)
        sum(float(np.sum(np.asarray(values))) for values in result.statistics.values())

    contenders = {"plain": step, "measured": lambda: step(statistics=True)}
    interleaved(contenders, rounds=2)  # they compile
    taken = interleaved(contenders, rounds=ROUNDS)
    longer = ratio(taken["plain"], taken["measured"])
    share = ", ".join(f"{10 * (x - 1):.2f}" for x in (longer.low, longer.high))
    print(
        f"{backend}: a step of {1000 * median(taken['plain']):.0f} ms, with statistics {longer} of it; "
        f"every 10 steps they take {10 * (longer.median - 1):.2f} % [{share}] of the time"
    )


if __name__ == "__main__":
    main(sys.argv[1])
