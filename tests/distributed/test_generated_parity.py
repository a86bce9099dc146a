"""Parity of generated cells (model, options, mesh, backend) within the derived bound, also beside float64."""

from __future__ import annotations

import dataclasses
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.generated_parity.cells import PLACES, generated, placed
from benchmarks.generated_parity.held import Reference, traces
from portatrain.backends.base import backend_class, missing
from portatrain.testing import parity

pytestmark = pytest.mark.skipif(bool(missing("jax") or missing("torch")), reason="parity needs jax and torch")


@pytest.mark.parametrize("number", range(2))
def test_one_device_of_each_framework(number: int) -> None:
    cell = dataclasses.replace(generated(16, 2, devices=(1,))[number], backend="torch")
    of = Reference(cell, steps=3)
    found = of.held(parity.trace(backend_class("torch"), of.recipe, of.given))
    assert not found.failures, f"{cell}: {found}"


def test_a_wrong_gradient_is_beyond_the_bound() -> None:
    """By 1e-4 of its scale, in one element of a tensor."""
    cell = dataclasses.replace(generated(16, 1, devices=(1,))[0], backend="torch")
    of = Reference(cell, steps=1)
    mine = parity.trace(backend_class("torch"), of.recipe, of.given)
    gradient = mine.gradients["blocks/mlp/up"]
    gradient.flat[7] += 1e-4 * np.abs(gradient).max()
    (failure,) = of.held(mine).failures
    assert "this cell: gradient of blocks/mlp/up" in failure


def test_every_model_of_the_soak_is_on_both_frameworks_and_on_meshes() -> None:
    cells = placed(3, 100)
    assert len(set(cells)) == 100 and {c.devices for c in cells if c.backend == "jax"} == {1, 2, 4}
    for model in range(0, 100, PLACES):
        first, *others = cells[model : model + PLACES]
        assert (first.backend, first.mesh) == ("torch", "") and {c.overrides for c in others} == {first.overrides}
        assert [c.backend for c in others].count("jax") == 1 and len({(c.backend, c.mesh) for c in others}) == 4


@pytest.mark.full
@pytest.mark.meshes
@pytest.mark.timeout(1800)
def test_generated_cells(tmp_path: Path) -> None:
    cells = generated(2026, 6)
    found = {n: Reference(cells[n]).held(trace) for n, trace in traces(list(enumerate(cells)), tmp_path)}
    assert len(found) == 6 and not [f for h in found.values() for f in h.failures], found


@pytest.mark.soak
@pytest.mark.timeout(14400)
def test_fresh_cells(tmp_path: Path) -> None:
    """The bound holds, and is no more than four times what is seen."""
    seed = random.SystemRandom().randrange(1 << 30)
    command = [sys.executable, "-m", "benchmarks.generated_parity", "--seed", str(seed), "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout[-2000:])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    times = float(done.stdout.rsplit("the bound is ", 1)[1].split(" times", 1)[0])
    assert 1 <= times <= 4
