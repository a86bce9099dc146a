"""Parity of generated cells (model, options, mesh, backend) within the derived bound; gradients against float64, too.

A gradient that nearly cancels has an error of the terms that cancel. If it is beyond the bound, how far the float64
gradient itself moves with the parameters decides: the terms are then as large as it moves.
"""

from __future__ import annotations

import dataclasses
import itertools
import pickle
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.exact_gradients import exact
from portatrain.backends import rounding
from portatrain.backends.base import backend_class, missing
from portatrain.backends.program import make_program
from portatrain.system.processes import run_processes
from portatrain.testing import parity
from tests.support.generated_cells import STEPS, Cell, generated

pytestmark = pytest.mark.skipif(bool(missing("jax") or missing("torch")), reason="parity needs jax and torch")

MOVE, DRAWS = 1e-6, 3
AMPLIFIED = 4.0
"""The largest error of a gradient that nearly cancels, over e times what moves it."""


@dataclasses.dataclass
class Held:
    """What two sides of a cell differ by, over what they may."""

    gradient: float
    loss: float
    failures: list[str]


def held(cell: Cell, mine: parity.Trace, steps: int = STEPS) -> Held:
    recipe = cell.recipe()
    given = parity.batches(recipe, steps)
    one = parity.trace(backend_class("jax"), recipe, given)
    bound = parity.bound_of(recipe, given) / 2**0.5  # beside float64, which has no error of its own
    found = Held(0.0, 0.0, [])
    truth = exact(make_program(recipe), given[0])
    for (side, trace), name in itertools.product((("one jax device", one), ("this cell", mine)), truth):
        off = float(np.abs(trace.gradients[name] - truth[name]).max())
        most = bound * float(np.abs(truth[name]).max())
        if not off <= most:
            most = max(most, AMPLIFIED * _error(cell, given) * _amplification(cell, given, name, truth[name]))
        found.gradient = max(found.gradient, off / most if most else float(off > 0))
        if not off <= most:
            found.failures.append(f"{side}: gradient of {name} is {off:.2e} off float64, bound {most:.2e}")
    most = parity.loss_bound(backend_class("jax"), recipe, given, one)
    found.loss = max(abs(a - b) / abs(a) for a, b in zip(one.losses, mine.losses, strict=True)) / most
    if not found.loss <= 1:
        found.failures.append(f"losses differ by {found.loss * most:.2e}, bound {most:.2e}")
    return found


def _error(cell: Cell, given: parity.Batches) -> float:
    definition = cell.recipe().describe()
    positions = rounding.positions_in(definition, given[0], microbatches=True)
    return rounding.step_error(definition, positions)


def _amplification(cell: Cell, given: parity.Batches, name: str, truth: np.ndarray) -> float:
    """The largest change of a gradient, per unit, when every parameter moves by a small amount of random sign."""
    rng = np.random.default_rng(0)
    largest = 0.0
    for _ in range(DRAWS):
        near = exact(
            make_program(cell.recipe()),
            given[0],
            change=lambda _, array: array * (1 + MOVE * rng.choice((-1.0, 1.0), array.shape)),
        )
        largest = max(largest, float(np.abs(near[name] - truth).max()) / MOVE)
    return largest


@pytest.mark.parametrize("number", range(2))
def test_one_device_of_each_framework(number: int) -> None:
    cell = dataclasses.replace(generated(16, 2, devices=(1,))[number], backend="torch")
    recipe = cell.recipe()
    mine = parity.trace(backend_class("torch"), recipe, parity.batches(recipe, 3))
    found = held(cell, mine, steps=3)
    assert not found.failures, f"{cell}: {found}"


def test_a_wrong_gradient_is_beyond_the_bound() -> None:
    """By 1e-4 of its scale, in one element of a tensor."""
    cell = dataclasses.replace(generated(16, 1, devices=(1,))[0], backend="torch")
    recipe = cell.recipe()
    mine = parity.trace(backend_class("torch"), recipe, parity.batches(recipe, 1))
    gradient = mine.gradients["blocks/mlp/up"]
    gradient.flat[7] += 1e-4 * np.abs(gradient).max()
    (failure,) = held(cell, mine, steps=1).failures
    assert "this cell: gradient of blocks/mlp/up" in failure


def traces(seed: int, count: int, folder: Path) -> Iterator[tuple[Cell, parity.Trace]]:
    """Run the cells in groups of processes: jax in one, torch in one a device."""
    cells = generated(seed, count)
    kinds = sorted({(c.backend, c.devices) for c in cells})
    for backend, devices in kinds:
        numbers = [i for i, c in enumerate(cells) if (c.backend, c.devices) == (backend, devices)]
        out = folder / f"{backend}-{devices}"
        given = {"seed": seed, "count": count, "numbers": numbers, "out": str(out)}
        assert run_processes(1 if backend == "jax" else devices, "tests.support.cell_worker:main", given) == 0
        with out.open("rb") as stream:
            for _ in numbers:
                number, trace = pickle.load(stream)
                assert isinstance(trace, parity.Trace), f"{cells[number]}\n{trace}"
                yield cells[number], trace


def _all_within(seed: int, count: int, folder: Path) -> list[Held]:
    found = []
    for cell, trace in traces(seed, count, folder):
        found.append(held(cell, trace))
        print(f"seed {seed}: {cell}: {found[-1]}", flush=True)
    failures = [f for h in found for f in h.failures]
    print(f"{count} cells, seed {seed}: of the bound, gradients reach {max(h.gradient for h in found):.2f}", end="")
    print(f" and losses {max(h.loss for h in found):.2f}")
    assert not failures, f"seed {seed}: {failures}"
    return found


@pytest.mark.full
@pytest.mark.meshes
@pytest.mark.timeout(1800)
def test_generated_cells(tmp_path: Path) -> None:
    _all_within(2026, 6, tmp_path)


@pytest.mark.soak
@pytest.mark.timeout(14400)
def test_fresh_cells(tmp_path: Path) -> None:
    """The bound holds, and is no more than four times what is seen."""
    found = _all_within(random.SystemRandom().randrange(1 << 30), 500, tmp_path)
    assert max(h.gradient for h in found) >= 0.25
