"""jax against torch on the shipped recipes: gradients, updates and curves; and mutants that must turn the check red."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch

from portatrain.backends.base import Backend
from portatrain.backends.jax import JaxBackend
from portatrain.backends.program import Program
from portatrain.backends.torch import TorchBackend
from portatrain.optim import SGD, Adafactor, AdamW, Lion, Muon, Rule
from portatrain.recipe import Recipe, apply_overrides, load_recipe
from portatrain.testing import parity

pytestmark = pytest.mark.usefixtures("compiled_quickly")

STEPS = 20

# The recipes' own models, data and learning rates; fewer samples a step, so that the check takes seconds.
SMALL = {
    "tiny-lm": ["model.dropout=0.1", "data.seq_len=128", "model.layers=2"],
    "tiny-vit": ["model.dropout=0.1", "batch=16"],
}
WHOLE = {"tiny-lm": ["model.dropout=0.1"], "tiny-vit": ["model.dropout=0.1"]}

RULES: dict[str, Rule | None] = {
    "AdamW": None,  # the recipe's own
    "SGD": SGD(lr=0.1, momentum=0.9),
    "Muon": Muon(lr=0.02),
    "Lion": Lion(lr=3e-4, weight_decay=0.1),
    "Adafactor": Adafactor(lr=3e-3),
}
SLOW = ("Muon", "Lion", "Adafactor")


def small(name: str, rule: str, accumulation: int, overrides: dict[str, list[str]] = SMALL) -> Recipe:
    recipe = apply_overrides(load_recipe(name), [*overrides[name], f"accumulation={accumulation}", "clip_norm=none"])
    chosen = RULES[rule]
    return dataclasses.replace(recipe, optimizer=chosen) if chosen else recipe


def check(recipe: Recipe, *, steps: int = STEPS) -> parity.Verdict:
    given = parity.batches(recipe, steps)
    baseline = parity.trace(JaxBackend, recipe, given)
    verdict = parity.compare(
        baseline,
        parity.trace(TorchBackend, recipe, given),
        bound=parity.bound_of(recipe, given),
        loss_bound=parity.loss_bound(JaxBackend, recipe, given, baseline),
    )
    print(recipe.name, type(recipe.optimizer).__name__, recipe.accumulation, verdict)
    return verdict


# Every pair of recipe, rule and accumulation; not every three of them, as a compile for each takes minutes.
COVER = [(name, rule, (1, 4)[(i + j) % 2]) for i, name in enumerate(SMALL) for j, rule in enumerate(RULES)]


def test_the_cover_has_every_pair() -> None:
    for one, other, sizes in ((0, 1, 10), (0, 2, 4), (1, 2, 10)):
        assert len({(cell[one], cell[other]) for cell in COVER}) == sizes


@pytest.mark.parametrize(
    ("name", "rule", "accumulation"),
    [pytest.param(*cell, marks=pytest.mark.full) if cell[1] in SLOW else cell for cell in COVER],
)
def test_both_backends_follow_the_same_curve(name: str, rule: str, accumulation: int) -> None:
    verdict = check(small(name, rule, accumulation))
    assert not verdict.failures, str(verdict)


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", WHOLE)
def test_the_recipes_as_they_are(name: str) -> None:
    verdict = check(small(name, "AdamW", 1, WHOLE))
    assert not verdict.failures, str(verdict)


# ---- mutants: each is one mistake that a backend could make


class ScaledGradient(TorchBackend):
    def _accumulate(self, state: Any, batch: Any, step: int) -> Any:
        found = super()._accumulate(state, batch, step)
        torch._foreach_mul_(self._grads(state), 1.01)
        return found


class MeanOfMeans(TorchBackend):
    """Averages the microbatches' mean losses, where the sum over all is to be divided by the whole weight."""

    def _accumulate(self, state: Any, batch: Any, step: int) -> Any:
        n = len(batch["sample"])
        total, parts = None, []
        for i in range(n):
            parts.append(super()._accumulate(state, {k: v[i : i + 1] for k, v in batch.items()}, step))
            grads = [g.clone() for g in self._grads(state)]
            total = grads if total is None else [a + g for a, g in zip(total, grads, strict=True)]
        for grad, mean in zip(self._grads(state), total or [], strict=True):
            grad.copy_(mean / n)
        return sum(p[0] for p in parts) / n, sum(p[1] for p in parts), {}, {}


class OneSampleDropped(TorchBackend):
    def _accumulate(self, state: Any, batch: Any, step: int) -> Any:
        mask = batch["mask"].copy()
        mask[-1, -1] = 0
        return super()._accumulate(state, {**batch, "mask": mask}, step)


def replaced(**changes: Any) -> Any:
    """A backend that carries out another program than it was given."""

    def make(program: Program) -> Backend:
        return TorchBackend(dataclasses.replace(program, **changes))

    return make


MUTANTS: dict[str, tuple[Any, Rule | None]] = {
    "gradient x 1.01": (ScaledGradient, None),
    "mean of means": (MeanOfMeans, None),
    "one sample dropped": (OneSampleDropped, None),
    "wrong beta2": (replaced(optimizer=AdamW(lr=3e-3, b2=0.951, weight_decay=0.1)), None),
    "missing clip (SGD)": (replaced(clip_norm=None), RULES["SGD"]),
    "missing clip (AdamW)": (replaced(clip_norm=None), None),
    "another seed for dropout": (replaced(seed=1), None),
}


@functools.cache
def clipped(rule: Rule | None) -> tuple[Recipe, parity.Batches, parity.Trace]:
    recipe = apply_overrides(small("tiny-lm", "AdamW", 4), ["clip_norm=0.1"])
    recipe = dataclasses.replace(recipe, optimizer=rule) if rule else recipe
    given = parity.batches(recipe, 6)
    for batch in given:
        batch["mask"][0, :, ::2] = 0  # microbatches of unequal weight, as padded ones have
    return recipe, given, parity.trace(JaxBackend, recipe, given)


@pytest.mark.parametrize("rule", [None, RULES["SGD"]], ids=["AdamW", "SGD"])
def test_the_honest_backend_passes_what_mutants_fail(rule: Rule | None) -> None:
    recipe, given, baseline = clipped(rule)
    verdict = parity.compare(baseline, parity.trace(TorchBackend, recipe, given), bound=parity.bound_of(recipe, given))
    assert not verdict.failures, str(verdict)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_turns_the_check_red(mutant: str) -> None:
    make, rule = MUTANTS[mutant]
    recipe, given, baseline = clipped(rule)
    verdict = parity.compare(baseline, parity.trace(make, recipe, given), bound=parity.bound_of(recipe, given))
    assert verdict.failures, str(verdict)
