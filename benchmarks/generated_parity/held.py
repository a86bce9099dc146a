"""Hold cells to the derived bound: gradients against float64, losses against one device.

A gradient that nearly cancels has an error of the terms that cancel. If it is beyond the bound, how far the float64
gradient itself moves with the parameters decides: the terms are then as large as it moves. Losses of later steps may
amplify rounding, since the first updates of AdamW are nearly those of a sign. If they are beyond the bound, how far one
device drifts from itself decides.
"""

from __future__ import annotations

import dataclasses
import functools
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.exact_gradients import exact
from benchmarks.generated_parity.cells import STEPS, Cell
from portatrain.backends import rounding
from portatrain.backends.base import backend_class
from portatrain.backends.program import make_program
from portatrain.system.processes import run_processes
from portatrain.testing import parity

MOVE, DRAWS = 1e-6, 3
AMPLIFIED = 4.0
"""The largest error of a gradient that nearly cancels, over e times what moves it."""


@dataclasses.dataclass
class Held:
    """What two sides of a cell differ by, over what they may.

    amplified: the losses are beyond the derived bound, so the drift of one device decided.
    """

    gradient: float
    loss: float
    failures: list[str]
    amplified: bool = False


class Reference:
    """What the cells of one model are held to: its gradients in float64, and the losses of one device."""

    def __init__(self, cell: Cell, steps: int = STEPS) -> None:
        self.recipe, self.steps = cell.recipe(), steps

    @functools.cached_property
    def given(self) -> parity.Batches:
        return parity.batches(self.recipe, self.steps)

    @functools.cached_property
    def truth(self) -> dict[str, np.ndarray]:
        return exact(make_program(self.recipe), self.given[0])

    @functools.cached_property
    def one(self) -> parity.Trace:
        """The trace of one device of jax, if nobody sets another one."""
        return parity.trace(backend_class("jax"), self.recipe, self.given)

    @functools.cached_property
    def bound(self) -> float:
        """Beside float64, which has no error of its own."""
        return parity.bound_of(self.recipe, self.given) / 2**0.5

    @functools.cached_property
    def error(self) -> float:
        definition = self.recipe.describe()
        return rounding.step_error(definition, rounding.positions_in(definition, self.given[0], microbatches=True))

    @functools.cached_property
    def drift(self) -> float:
        """How far the losses of one device drift from themselves when the rows of every batch are reordered."""
        torch = backend_class("torch")
        return parity.floor(torch, self.recipe, self.given, parity.trace(torch, self.recipe, self.given))

    @functools.cached_property
    def moved(self) -> dict[str, float]:
        """The largest change of each gradient, per unit, when every parameter moves by a small amount of random
        sign."""
        rng, largest = np.random.default_rng(0), dict.fromkeys(self.truth, 0.0)
        for _ in range(DRAWS):
            near = exact(
                make_program(self.recipe),
                self.given[0],
                change=lambda _, array: array * (1 + MOVE * rng.choice((-1.0, 1.0), array.shape)),
            )
            for name, array in near.items():
                largest[name] = max(largest[name], float(np.abs(array - self.truth[name]).max()) / MOVE)
        return largest

    def held(self, mine: parity.Trace) -> Held:
        """Return how near `mine` and the one device come to their bounds."""
        found = Held(0.0, 0.0, [])
        for side, trace in (("one device", self.one), ("this cell", mine)):
            for name, truth in self.truth.items():
                off = float(np.abs(trace.gradients[name] - truth).max())
                most = self.bound * float(np.abs(truth).max())
                if not off <= most:
                    most = max(most, AMPLIFIED * self.error * self.moved[name])
                found.gradient = max(found.gradient, off / most if most else float(off > 0))
                if not off <= most:
                    found.failures.append(f"{side}: gradient of {name} is {off:.2e} off float64, bound {most:.2e}")
        most = parity.loss_bound(backend_class("torch"), self.recipe, self.given, self.one)
        off = max(abs(a - b) / abs(a) for a, b in zip(self.one.losses, mine.losses, strict=True))
        if not off <= most:
            most = max(most, parity.FLOOR_FACTOR * self.drift)
            found.amplified = True
        found.loss = off / most
        if not off <= most:
            found.failures.append(f"losses differ by {off:.2e}, bound {most:.2e}")
        return found


def traces(cells: Sequence[tuple[int, Cell]], folder: Path) -> Iterator[tuple[int, parity.Trace]]:
    """Run the cells in groups of processes: jax in one, torch in one a device. Cells with a trace in `folder` already
    are not run again."""
    for kind in sorted({(c.backend, c.devices) for _, c in cells}):
        out = folder / "-".join(map(str, kind))
        here = [(n, c) for n, c in cells if (c.backend, c.devices) == kind]
        there = {n for n, _ in _in(out)}
        left = [(n, dataclasses.asdict(c)) for n, c in here if n not in there]
        if left:
            processes = 1 if kind[0] == "jax" else kind[1]
            given = {"cells": left, "out": str(out)}
            assert run_processes(processes, "benchmarks.generated_parity.worker:main", given) == 0
        for number, trace in _in(out):
            assert isinstance(trace, parity.Trace), f"{dict(here)[number]}\n{trace}"
            yield number, trace


def _in(path: Path) -> Iterator[tuple[int, parity.Trace]]:
    """Yield what a worker wrote; a last pickle that was cut off is removed from the file."""
    if not path.exists():
        return
    with path.open("r+b") as stream:
        while True:
            begin = stream.tell()
            try:
                found = pickle.load(stream)
            except (EOFError, pickle.UnpicklingError):
                stream.truncate(begin)
                return
            yield found
