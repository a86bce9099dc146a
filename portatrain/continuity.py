"""Is the run that goes on the run that stopped? A probe at every save, computed again on arrival.

The exact part must be equal: the counts, the hash of the next batch, the next random word, the learning rate of the
next step, the data's fingerprint. The numeric part is the loss of each of the next samples, without dropout, under the
restored parameters: within 1e-5 relative in fp32. What it does not see yet: the optimizer's slots (their bytes are
checksummed, but a wrong one that was written is not noticed here).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from portatrain.backends.base import Backend
from portatrain.data import Split, batch_hash
from portatrain.recipe import Recipe
from portatrain.rng import words

PROBE_SAMPLES = 64
LOSS_BOUND = {"fp32": 1e-5, "bf16": 2e-2}
"""Largest relative difference of a sample's loss. fp32: summation order; bf16: a few roundings of 2^-8 each, as they
average over a sample's targets."""


def probe(backend: Backend, state: Any, recipe: Recipe, train: Split, step: int) -> dict[str, Any]:
    """What the state after `step` steps looks like, as JSON. Changes nothing."""
    start = step * recipe.batch
    losses: list[float] = []
    for at in range(start, start + PROBE_SAMPLES, recipe.batch):
        found = backend.eval(state, train.batch(at, recipe.batch))
        losses += (found["loss_B"] / np.maximum(found["weight_B"], 1)).astype(np.float64).tolist()
    return {
        "exact": {
            "step": step,
            "next_sample": start,
            "next_batch": batch_hash(train.batch(start, recipe.batch)),
            "fingerprint": train.fingerprint,
            "random_word": str(words(recipe.seed, "step", step, 1)[0]),
            "learning_rate": recipe.optimizer.lr * recipe.schedule(min(step + 1, recipe.steps), recipe.steps),
        },
        "losses": losses[:PROBE_SAMPLES],
    }


def verdict(before: Mapping[str, Any] | None, now: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """'continuous', 'broken' or, where the checkpoint has no probe, 'unproven', with the numbers."""
    if before is None:
        return {"verdict": "unproven"}
    differs = [k for k, v in before["exact"].items() if now["exact"].get(k) != v]
    a, b = np.array(before["losses"]), np.array(now["losses"])
    bound = LOSS_BOUND[precision]
    worst = float(np.max(np.abs(a - b) / np.maximum(np.abs(a), 1e-3))) if a.shape == b.shape else float("inf")
    good = not differs and worst <= bound
    return {
        "verdict": "continuous" if good else "broken", "differs": differs, "loss_difference": worst,
        "loss_bound": bound, "samples": len(a),
    }  # fmt: skip
