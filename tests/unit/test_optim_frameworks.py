"""The one code of every rule, in float32, under NumPy, JAX (eager and jitted) and torch."""

from __future__ import annotations

import numpy as np
import pytest

from portatrain.backends.reference import optim as reference
from portatrain.backends.reference.optim_bounds import ratio
from portatrain.optim import Rule
from tests.support.optim_cases import (
    FRAMEWORKS,
    MUTANTS,
    REDUCING,
    RULES,
    SCALE,
    TENSORS,
    Run,
    Tensor,
    randoms,
    run_numpy,
    run_torch,
    zeros,
)

# JAX compiles an operation a shape when it is not jitted: three tensors are enough for that.
FEW = tuple(t for t in TENSORS if t.name in ("norm/scale", "embedding", "blocks/up"))


def worst_ratio(run: Run, rule: Rule, oracle: Rule, infos: tuple[Tensor, ...], counts: list[int]) -> float:
    """Largest (difference / allowed difference) from NumPy float32 under ``oracle``, over single steps.

    Each step starts both from the same float32 parameter, gradient and slots.
    """
    params, grads = zip(*(randoms(info, seed=3, steps=len(counts)) for info in infos), strict=True)
    state = [(param, zeros(oracle, info)) for param, info in zip(params, infos, strict=True)]
    worst = 0.0
    for step, count in enumerate(counts):
        cases = [(param, grad[step], slots) for (param, slots), grad in zip(state, grads, strict=True)]
        got = run(rule, infos, cases, count)
        want = run_numpy(oracle, infos, cases, count)
        for info, (param, grad, slots), a, b in zip(infos, cases, got, want, strict=True):
            assert a[0].dtype == b[0].dtype == np.float32 and a[0].shape == b[0].shape == info.shape
            assert {k: v.shape for k, v in a[1].items()} == {k: v.shape for k, v in b[1].items()}
            start = {"param": param, "grad": grad, "slots": slots, "scale": SCALE, "count": count, "decay": True}
            worst = max(worst, ratio(oracle, info, a, b, **start))
        state = [(b.astype(np.float64), {k: v.astype(np.float64) for k, v in s.items()}) for b, s in want]
    return worst


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", RULES)
def test_frameworks_agree(name: str, framework: str) -> None:
    """Within 4 ulp of the largest operand (AdamW, Lion, SGD) or the derived bound (Adafactor, Muon)."""
    infos = FEW if framework == "jax" else tuple(TENSORS)
    assert worst_ratio(FRAMEWORKS[framework], RULES[name], RULES[name], infos, [1, 2, 3, 1000, 10**6]) <= 1


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_bounds_see_mutants(mutant: str) -> None:
    name, wrong = MUTANTS[mutant]
    stacked = tuple(t for t in TENSORS if t.name == "blocks/up")
    assert worst_ratio(run_torch, RULES[name], RULES[name], stacked, [1, 2, 3]) <= 1
    assert worst_ratio(run_torch, wrong, RULES[name], stacked, [1, 2, 3]) > 1


@pytest.mark.parametrize("info", TENSORS, ids=lambda t: t.name)
@pytest.mark.parametrize("name", REDUCING)
def test_float32_is_within_half_the_bound_of_exact(name: str, info: Tensor) -> None:
    """The bound of the reducing rules is twice the distance from the exact step; so it is held to that."""
    rule, counts = RULES[name], [1, 2, 50]
    acting = rule.rule_for(info)
    param, grads = randoms(info, seed=4, steps=len(counts))
    slots = zeros(rule, info)
    for count, grad in zip(counts, grads, strict=True):
        arguments = {"param": param, "grad": grad, "slots": slots, "scale": SCALE, "count": count, "decay": True}
        ((got, got_slots),) = run_numpy(rule, (info,), [(param, grad, slots)], count)
        if type(acting) is type(rule):  # not what Muon leaves to AdamW
            exact = reference.step(rule, info, **arguments)
            assert ratio(rule, info, (got, got_slots), exact, **arguments) <= 0.5
        param, slots = got.astype(np.float64), {k: v.astype(np.float64) for k, v in got_slots.items()}
