"""Measure what statistics add to a step: a step of tiny-lm with them beside one without, in pairs.

    python benchmarks/statistics_cost.py jax
    python benchmarks/statistics_cost.py torch

Prints the median of the ratios with its 95 % interval (order statistics), and the share of the time that statistics
every 10 steps take.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace

import numpy as np

from portatrain.backends.base import backend_class
from portatrain.backends.program import make_program
from portatrain.recipe import load_recipe

ROUNDS, BATCH = 41, 16


def main(backend: str) -> None:
    recipe = replace(load_recipe("tiny-lm"), batch=BATCH)
    length = recipe.data.tokens_per_sample() or 1
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 256, (1, BATCH, length + 1)).astype(np.int32)
    ones = np.ones((1, BATCH, length), np.int32)
    batch = {"tokens": ids[..., :-1], "targets": ids[..., 1:], "mask": ones.astype(np.float32), "segment_ids": ones}
    batch |= {"positions": np.cumsum(ones, axis=2, dtype=np.int32) - 1, "sample": np.arange(BATCH)[None]}
    run = backend_class(backend)(make_program(recipe))
    state = run.init_state()

    def seconds(step: int, **more: bool) -> float:
        nonlocal state
        began_s = time.perf_counter()
        state, result = run.step(state, batch, step=step, scale=1.0, **more)
        float(result.loss)
        sum(float(np.sum(np.asarray(values))) for values in result.statistics.values())
        return time.perf_counter() - began_s

    for step in (1, 2):  # compile
        seconds(step), seconds(step, statistics=True)
    pairs = [(seconds(n), seconds(n, statistics=True)) for n in range(3, 3 + ROUNDS)]
    ratios = sorted(measured / plain for plain, measured in pairs)
    middle, low, high = ratios[20], ratios[13], ratios[27]  # ranks of the 95 % interval of a median of 41
    plain = sorted(plain for plain, _ in pairs)[20]
    print(
        f"{backend}: a step of {1000 * plain:.0f} ms, with statistics {middle:.3f} [{low:.3f}, {high:.3f}] of it; "
        f"every 10 steps they take {10 * (middle - 1):.2f} % [{10 * (low - 1):.2f}, {10 * (high - 1):.2f}] of the time"
    )


if __name__ == "__main__":
    main(sys.argv[1])
