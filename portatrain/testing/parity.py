"""Check that two backends follow the same curve on the same recipe.

The check has four parts, and each detects errors that the others miss: the gradients of the first step (an adaptive
optimizer hides a wrong scale from the curve), the parameters after one update (clipping and the rule), the losses of
some steps (errors that accumulate), and the reported gradient norms. The bound is derived from the lengths and
depth of the model (`bound_of`). Two rules have a bound of their own for the curve. Lion takes a sign (`sign_bound`);
Adafactor divides by a root that may be rounding alone, so its bound is a multiple of its own floor: its distance
from itself when the rows of every batch are reordered, which changes only the order of sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from portatrain.backends import rounding
from portatrain.backends.base import Backend, StepResult
from portatrain.backends.program import Program, make_program
from portatrain.data import open_data
from portatrain.data.left_out import LeftOut
from portatrain.optim import Adafactor, Lion
from portatrain.recipe import Recipe

FLOOR_FACTOR = 4.0
"""The largest drift of losses that amplify rounding, over the drift of one device from itself (`floor`)."""
FLOOR_ORDERS = 4
"""Reorderings that a floor is the largest of: the drift of one says little."""

Batches = list[dict[str, np.ndarray]]
Make = Callable[[Program], Backend]


@dataclass(frozen=True, kw_only=True)
class Trace:
    """The results of a run of a few steps: everything that the check compares."""

    losses: list[float]
    norms: list[float]
    gradients: Mapping[str, np.ndarray]
    """Of the first step, before clipping."""
    updated: Mapping[str, np.ndarray]
    """Parameters after the first step."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The measured differences and their bounds; `failures` is empty if all hold."""

    gradient: float
    worst_gradient: str
    update: float
    loss: float
    norm: float
    loss_bound: float
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"gradient {self.gradient:.1e} ({self.worst_gradient}), update {self.update:.1e}, norm {self.norm:.1e}, "
            f"loss {self.loss:.1e} (bound {self.loss_bound:.1e})" + "".join(f"\n  {f}" for f in self.failures)
        )


def batches(recipe: Recipe, steps: int) -> Batches:
    """Return the first global batches of a recipe, split into its microbatches."""
    split = LeftOut(open_data(recipe.data, seed=recipe.seed).train, recipe.left_out)
    cut = []
    for step in range(steps):
        rows = split.batch(recipe.samples_after(step), recipe.batch_at(step + 1))
        cut.append(recipe.microbatches(rows))
    return cut


def reordered(given: Batches, seed: int = 0) -> Batches:
    """Return the same samples with the rows of every global batch permuted across its microbatches."""
    rng = np.random.default_rng(seed)
    out = []
    for batch in given:
        n, b = batch["sample"].shape
        order = rng.permutation(n * b)
        out.append({k: v.reshape(n * b, *v.shape[2:])[order].reshape(v.shape) for k, v in batch.items()})
    return out


def bound_of(recipe: Recipe, given: Batches) -> float:
    """Return the largest difference of a gradient over its tensor's largest value, and of a loss over the loss."""
    definition = recipe.describe()
    positions = rounding.positions_in(definition, given[0], microbatches=True)
    return rounding.bound(definition, positions, recipe.precision)


def sign_bound(recipe: Recipe, baseline: Trace, bound: float) -> float:
    """Return the largest relative difference of a loss under Lion, which moves each element by lr times a sign.

    The sign of a number within rounding of zero is itself rounding. If it turns, the element is 2 lr away from the
    other run, and the loss moves by up to 2 lr times the largest gradient. The first gradients say how many elements
    are so near zero (but at least one); each step may turn as many, and their effects add as random signs do.
    """
    steps = len(baseline.losses)
    near = sum(int((np.abs(g) <= bound * np.abs(g).max(initial=0.0)).sum()) for g in baseline.gradients.values())
    largest = max(float(np.abs(g).max(initial=0.0)) for g in baseline.gradients.values())
    factor = max(info.lr for info in recipe.describe().params.values())
    turned = 2 * factor * recipe.optimizer.lr * largest * math.sqrt(max(1, near) * steps)
    return bound + turned / min(abs(loss) for loss in baseline.losses)


def loss_bound(make: Make, recipe: Recipe, given: Batches, baseline: Trace) -> float:
    """Return the largest relative difference of a loss under the recipe's optimizer."""
    bound = bound_of(recipe, given)
    if isinstance(recipe.optimizer, Lion):
        return sign_bound(recipe, baseline, bound)
    if isinstance(recipe.optimizer, Adafactor):
        return max(bound, FLOOR_FACTOR * floor(make, recipe, given, baseline))
    return bound


def trace(make: Make, recipe: Recipe, given: Batches, *, mesh: str = "") -> Trace:
    """Run `recipe` over `given` on the backend that `make` makes."""
    backend = make(make_program(recipe, mesh=mesh))
    state = backend.init_state()
    _, gradients = backend.gradients(state, given[0], step=1)
    losses, norms = [], []
    updated: dict[str, np.ndarray] = {}
    for after, result in _steps(backend, state, recipe, given):
        losses.append(float(result.loss))
        norms.append(float(result.grad_norm))
        updated = updated or parameters(backend, after)
    return Trace(losses=losses, norms=norms, gradients=gradients, updated=updated)


def _steps(backend: Backend, state: Any, recipe: Recipe, given: Batches) -> Iterator[tuple[Any, StepResult]]:
    """Yield the state and the result of every step from step 1 on."""
    for step, batch in enumerate(given, start=1):
        state, result = backend.step(state, batch, step=step, scale=recipe.lr_scale(step))
        yield state, result


def parameters(backend: Backend, state: object) -> dict[str, np.ndarray]:
    """Return the parameters that this process holds, as whole logical tensors."""
    infos = backend.program.definition.params
    found = {n: np.zeros(t.shape, np.float32) for n, t in infos.items()}
    for box in backend.local_boxes(state):
        if box.role == "params":
            where = tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))
            found[box.name][where] = box.fetch()
    return found


def compare(
    baseline: Trace, other: Trace, *, bound: float, loss_bound: float | None = None, update_bound: float | None = None
) -> Verdict:
    """Return every difference between two traces of one recipe, and which of them are too large.

    `bound`: see `bound_of`. `loss_bound`: that of the losses, if it is another one (`loss_bound`).
    `update_bound`: the largest difference of a parameter after one step over the largest change of that parameter;
    None if the rule is not continuous in the gradient, so that a rounding error may reverse a whole step.
    """
    loss_bound = bound if loss_bound is None else loss_bound
    gradient, worst = max(
        (_relative(other.gradients[n], g, float(np.abs(g).max())), n) for n, g in baseline.gradients.items()
    )
    update = max(_relative(other.updated[n], p, float(np.abs(p).max())) for n, p in baseline.updated.items())
    loss = max(abs(a - b) / abs(a) for a, b in zip(baseline.losses, other.losses, strict=True))
    norm = abs(baseline.norms[0] - other.norms[0]) / baseline.norms[0]
    checks = [
        ("gradient", gradient, bound),
        ("norm", norm, bound),
        ("loss", loss, loss_bound),
        *([("update", update, update_bound)] if update_bound is not None else []),
    ]
    failures = [f"{what} differs by {d:.2e}, bound {most:.1e}" for what, d, most in checks if not d <= most]
    return Verdict(
        gradient=gradient,
        worst_gradient=worst,
        update=update,
        loss=loss,
        norm=norm,
        loss_bound=loss_bound,
        failures=failures,
    )


def floor(make: Make, recipe: Recipe, given: Batches, baseline: Trace) -> float:
    """Return how far the baseline drifts from itself when every batch is reordered.

    The result is the largest relative difference of a loss, over `FLOOR_ORDERS` reorderings.
    """
    backend = make(make_program(recipe))  # one for all orders, so that its step is compiled once
    drifts = []
    for seed in range(FLOOR_ORDERS):
        steps = _steps(backend, backend.init_state(), recipe, reordered(given, seed))
        again = [float(result.loss) for _, result in steps]
        drifts += [abs(a - b) / abs(a) for a, b in zip(baseline.losses, again, strict=True)]
    return max(drifts)


def _relative(a: np.ndarray, b: np.ndarray, scale: float) -> float:
    difference = float(np.abs(a.astype(np.float64) - b).max())
    return difference / scale if scale else difference
