"""What several processes measured, compared with one process of the torch backend."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.exact_gradients import exact
from portatrain.backends import rounding
from portatrain.backends.torch import TorchBackend
from tests.support.mesh_cases import CASES
from tests.support.mesh_measure import Measured, measure


@pytest.fixture(scope="session")
def alone() -> Callable[[str], Measured]:
    """The same on one process."""
    done: dict[str, Measured] = {}
    torch.set_num_threads(1)

    def run(case: str) -> Measured:
        if case not in done:
            done[case] = measure(TorchBackend, CASES[case], "")
        return done[case]

    return run


def differences(one: Measured, many: Measured, case: str) -> list[str]:
    """What of `many` is not what `one` has, within the derived bound of `portatrain.backends.rounding`.

    A gradient beyond the bound is held to the same step in float64: where gradients nearly cancel, one process is as
    far from it as a mesh (9.7e-7 of blocks/attn/wk), on the other side.
    """
    low = CASES[case].options.get("precision", "fp32") != "fp32"
    # bf16: an activation carries 8 bits, and sums of rounded parts differ by a few of its last ones.
    definition, batch = CASES[case].program("").definition, CASES[case].batches()[-1]
    derived = rounding.bound(definition, rounding.positions_in(definition, batch, microbatches=True))
    gradient_bound, loss_bound, own_bound = (2.0**-5, 2.0**-8, 2.0**-5) if low else (derived, derived, 1e-5)
    if CASES[case].options.get("precision") == "fp8":  # a number beside a tie of 4 bits may fall to the other side
        own_bound = rounding.bound(definition, rounding.positions_in(definition, batch, microbatches=True), "fp8")
        gradient_bound, loss_bound = own_bound, 2.0**-5
    failures = []

    def within(what: str, a: Any, b: Any, bound: float, scale: float | None = None) -> None:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        if a.shape != b.shape or not np.array_equal(np.isfinite(a), np.isfinite(b)):
            failures.append(f"{what}: {b} in place of {a}")
            return
        good = np.isfinite(a)
        scale = np.abs(a[good]).max(initial=0.0) if scale is None else scale
        off = np.abs(a - b)[good].max(initial=0.0) / (scale or 1.0)
        if not off <= bound:
            failures.append(f"{what} differs by {off:.2e}, bound {bound:.1e}")

    assert one.gradients.keys() == many.gradients.keys()
    for name, gradient in one.gradients.items():
        within(f"gradient of {name}", gradient, many.gradients[name], gradient_bound)
    if failures and not low:
        failures.clear()
        for name, gradient in _truth(case).items():
            within(f"gradient of {name} from float64", gradient, many.gradients[name], gradient_bound)
    for step, (a, b) in enumerate(zip(one.losses, many.losses, strict=True), start=1):
        within(f"loss of step {step}", a, b, loss_bound)
    within("gradient norm of step 1", one.norms[0], many.norms[0], gradient_bound)
    within("weights", one.weights, many.weights, 0.0)
    if one.skipped != many.skipped:
        failures.append(f"skipped {many.skipped} in place of {one.skipped}")
    for step, (a, b) in enumerate(zip(one.aux, many.aux, strict=True), start=1):
        for name in a:
            within(f"{name} of step {step}", a[name], b[name], 1e-5)
    for step, (c, d) in enumerate(zip(one.layers, many.layers, strict=True), start=1):
        for name in c:  # loads are counts: equal where the routing is
            within(f"{name} of step {step}", c[name], d[name], 0.0 if name == "router_loads" else 1e-5)
    if one.first.keys() != many.first.keys():
        failures.append(f"tensors {sorted(one.first.keys() ^ many.first.keys())}")
        return failures
    for role, name in one.last:
        if role == "state" or role == "opt/count":
            within(f"{role} {name}", one.last[role, name], many.last[role, name], 1e-6)
        elif role == "opt/m" and not low:
            # Linear in the gradient: its first value is, by a factor that is one process's.
            m, g = one.first[role, name].astype(np.float64), one.gradients[name].astype(np.float64)
            factor = (m * g).sum() / ((g * g).sum() or 1.0)
            within(f"{role} {name}", factor * many.gradients[name], many.first[role, name], gradient_bound)
    for name, bound in (("loss_B", own_bound), ("weight_B", 2.0**-5 if low else 0.0)):
        within(f"evaluated {name}", one.evaluated[name], many.evaluated[name], bound)
    if one.predicted is not None and not low:
        # After steps of Adam from gradients that differ in their last bits.
        within("predictions", one.predicted, many.predicted, 1e-3)
    return failures


@functools.cache
def _truth(case: str) -> dict[str, np.ndarray]:
    return exact(CASES[case].program(""), CASES[case].batches()[0])
