"""The maximal update parametrization on the backends: both follow the oracle of the other, and at the base width a run
is that of the standard parametrization to the last bit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from portatrain import MuP
from portatrain.backends.base import backend_class
from portatrain.optim import SGD, AdamW, Lion, Muon, Rule
from portatrain.recipe import Recipe
from portatrain.testing import parity
from tests.support.running import BACKENDS
from tests.support.short_runs import small

pytestmark = pytest.mark.usefixtures("compiled_quickly")

BASE = {"embed": 16, "heads": 2, "kv_heads": 1, "head_dim": 4, "mlp": 32}
"""Of a model with embed 32 and heads of 8, so that scores are scaled by 1/d."""


def recipe(optimizer: Rule | None = None, /, **base: int) -> Recipe:
    plain = small("model.kv_heads=1", "model.head_dim=8", "model.tied=false", "model.dropout=0", "ema_decay=none")
    optimizer = optimizer or AdamW(lr=1e-2, b2=0.95, weight_decay=0.1)
    return dataclasses.replace(plain, optimizer=optimizer, parametrization=MuP(base={**BASE, **base}))


@pytest.mark.skipif(len(BACKENDS) < 2, reason="needs both frameworks")
@pytest.mark.parametrize(
    "optimizer",
    [None, pytest.param(SGD(lr=0.1, momentum=0.9, weight_decay=0.1), marks=pytest.mark.full)],
    ids=["adamw", "sgd"],
)
def test_both_frameworks_follow_one_curve(optimizer: Rule | None) -> None:
    made = recipe(optimizer, mlp=64)
    kinds = {info.kind for info in made.describe().params.values()}
    assert kinds == {"table", "hidden", "input", "output", "vector"}
    given = parity.batches(made, 4)
    one, other = (parity.trace(backend_class(name), made, given) for name in BACKENDS)
    bound = parity.bound_of(made, given)
    verdict = parity.compare(one, other, bound=bound)
    assert not verdict.failures, str(verdict)
    # The check sees a factor: the same curve without the learning rates of muP is another one.
    without = dataclasses.replace(made, parametrization=MuP(base={**BASE, "mlp": 64}, lr={"*/wq": 1.01}))
    moved = parity.compare(one, parity.trace(backend_class("torch"), without, given), bound=bound, update_bound=bound)
    assert moved.failures


@pytest.mark.parametrize("name", BACKENDS)
def test_at_the_base_width_a_run_has_the_bits_of_the_standard_parametrization(name: str) -> None:
    rules = [AdamW(lr=1e-2, weight_decay=0.1)] if name == "jax" else [AdamW(lr=1e-2), Lion(lr=1e-3), Muon(lr=1e-2)]
    for rule in rules:
        made = recipe(rule, embed=32, heads=4, kv_heads=1, head_dim=8, mlp=64)
        assert {info.kind for info in made.describe().params.values()} == {"same"}
        given = parity.batches(made, 2)
        one, other = (
            parity.trace(backend_class(name), r, given) for r in (made, dataclasses.replace(made, parametrization=None))
        )
        assert one.losses == other.losses and one.norms == other.norms
        for key, value in one.updated.items():
            np.testing.assert_array_equal(value, other.updated[key])
