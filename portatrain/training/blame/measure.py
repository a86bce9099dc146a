"""Measure the samples of a step one by one: loss, gradient, and share of the batch's gradient.

A sample is a microbatch of one: its loss is what the recipe's step would compute for it alone, with the dropout that it
draws. The gradient G of the step's mean loss is the sum of c_i = w_i g_i / W, where g_i is the gradient of the mean
loss of sample i, w_i its weight (its targets) and W the weight of the batch. The share of a sample is <c_i, G> /
<G, G>, so the shares of a step add up to 1; one is negative if the sample pulls the other way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from portatrain.backends import rounding
from portatrain.backends.base import Arrays, Backend
from portatrain.data.in_sample import Part
from portatrain.data.split import Batch, Split
from portatrain.recipe import Recipe

BAND = 32
"""Samples that a sample is compared with: those of its step and, if these are fewer, the ones that follow."""
Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A sample at the state before a step.

    Attributes:
        place: where it is in the run's sequence of samples: its number, unless samples are left out before it.
        step: the step that trains on it; 0 for a sample that follows and is only compared with.
        weight: its targets. loss: the mean over them.
        norm: the 2-norm of its part of a batch's gradient, times the samples of the batch: of equal weights, that of
            its own gradient.
        share: of the gradient of the step; None for a sample that follows, or if the gradient is not finite.
        squares: the squared norm of its part by tensor and layer.
    """

    number: int
    place: int
    step: int
    weight: float
    loss: float
    norm: float
    share: float | None = None
    squares: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class InDocument:
    """The targets of one document in a sample: their number, mean loss, and share of the sample's own gradient."""

    part: Part
    weight: float
    loss: float
    share: float | None


@dataclass(frozen=True, kw_only=True)
class MeasuredStep:
    """A step with its samples and those that follow. notes: what makes its figures less than exact."""

    step: int
    loss: float
    norm: float
    samples: Sequence[Measured]
    others: Sequence[Measured]
    notes: Sequence[str] = ()


class Meter:
    """Measures samples with `backend` at a state, for a step of `recipe`."""

    def __init__(self, backend: Backend, recipe: Recipe, state: object, step: int) -> None:
        self._backend, self._recipe, self._state, self._step = backend, recipe, state, step
        self._params = backend.program.definition.params

    def measured(self, split: Split, tell: Tell = lambda line: None) -> MeasuredStep:
        """Return the samples of the step, and as many of those that follow as the band needs."""
        recipe, step = self._recipe, self._step
        first, count = recipe.samples_after(step - 1), recipe.batch_at(step)
        rows = split.batch(first, count)
        loss, whole = self._backend.gradients(self._state, recipe.microbatches(rows), step=step)
        total = sum(self._weight(one) for one in _each(rows))
        square = _dot(whole, whole)
        sums = {n: np.zeros(g.shape, np.float64) for n, g in whole.items()}
        sizes = dict.fromkeys(whole, 0.0)
        samples = []
        for i, one in enumerate(_each(rows)):
            tell(f"step {step}: sample {i + 1} of {count}")
            found, part = self._one(one, first + i, step, total, count)
            share = _dot(part, whole) / square if part and math.isfinite(square) and square else None
            samples.append(replace(found, share=share))
            for name, values in part.items():
                sums[name] += values
                sizes[name] += float(np.max(np.abs(values), initial=0.0))
        others = []
        more = split.batch(first + count, BAND - count) if count < BAND else None
        for i, one in enumerate(_each(more) if more is not None else ()):
            tell(f"step {step}: sample {i + 1} of {BAND - count} that follow")
            others.append(self._one(one, first + count + i, 0, total, count)[0])
        notes = self._notes(sums, sizes, whole, rows)
        return MeasuredStep(step=step, loss=loss, norm=math.sqrt(square), samples=samples, others=others, notes=notes)

    def documents(self, split: Split, sample: Measured, parts: Sequence[Part]) -> list[InDocument]:
        """Return the documents of a sample: what it is with the targets of each alone."""
        row = split.batch(sample.place, 1)
        if "segment_ids" not in row or len(parts) < 2:
            return [InDocument(part=part, weight=sample.weight, loss=sample.loss, share=1.0) for part in parts]
        _, whole = self._gradients(row)
        square, out = _dot(whole, whole), []
        for part in parts:
            mask = np.zeros_like(row["mask"])
            inside = slice(part.column, part.column + part.count)
            mask[:, inside] = row["mask"][:, inside]
            mine = {**row, "mask": mask}
            weight = self._weight(mine) if mask.any() else 0.0
            if not weight:
                continue
            loss, grads = self._gradients(mine)
            share = weight / sample.weight * _dot(grads, whole) / square if square and math.isfinite(square) else None
            out.append(InDocument(part=part, weight=weight, loss=loss, share=share))
        return out

    def _one(self, row: Batch, place: int, step: int, total: float, count: int) -> tuple[Measured, Arrays]:
        """Return a sample, and its part of the gradient of a batch of weight `total`; no part if it has no target."""
        number, weight = int(row["sample"][0]), self._weight(row)
        if not weight:
            return Measured(number=number, place=place, step=step, weight=0.0, loss=math.nan, norm=0.0), {}
        loss, grads = self._gradients(row)
        part = {n: g.astype(np.float64) * (weight / total) for n, g in grads.items()}
        squares = {}
        for name, values in part.items():
            stacks = self._params[name].stack_dims
            by_layer = np.sum(values * values, axis=tuple(range(stacks, values.ndim)))
            for index in np.ndindex(by_layer.shape):
                layer = f", layer {'.'.join(map(str, index))}" if index else ""
                squares[f"{name}{layer}"] = float(by_layer[index])
        norm = math.sqrt(math.fsum(squares.values())) * count if all(map(math.isfinite, squares.values())) else math.nan
        found = Measured(number=number, place=place, step=step, weight=weight, loss=loss, norm=norm, squares=squares)
        return found, part

    def _gradients(self, row: Batch) -> tuple[float, Arrays]:
        return self._backend.gradients(self._state, {k: v[None] for k, v in row.items()}, step=self._step)

    def _weight(self, row: Batch) -> float:
        return float(self._backend.eval(self._state, row)["weight_B"].sum())

    def _notes(self, sums: Arrays, sizes: Mapping[str, float], whole: Arrays, rows: Batch) -> list[str]:
        """Return a note if the samples of the step alone do not add up to its gradient."""
        definition = self._backend.program.definition
        positions = rounding.positions_in(definition, rows)
        # The bound is for errors of random signs. Those of a token that repeats have one sign, and add up in full.
        in_full = math.sqrt(6 * (rounding.BESIDE + rounding.longest_sum(definition, positions) / rounding.LANES))
        bound = in_full * rounding.bound(definition, positions, self._recipe.precision)
        for name, total in sums.items():
            apart = float(np.max(np.abs(total - whole[name]), initial=0.0))
            if math.isfinite(sizes[name]) and apart > bound * sizes[name]:
                return [
                    f"step {self._step}: the samples alone do not add up to the gradient of the batch ({name} is apart "
                    f"by {apart / sizes[name]:.2g}, rounding explains {bound:.2g}): this model compares samples, or a "
                    "loss of it is of the whole batch, so shares are approximate"
                ]
        return []


def _each(rows: Batch) -> list[Batch]:
    return [{k: v[i : i + 1] for k, v in rows.items()} for i in range(len(rows["sample"]))]


def _dot(a: Arrays, b: Arrays) -> float:
    return math.fsum(float(np.vdot(a[n].astype(np.float64), b[n].astype(np.float64))) for n in a)
