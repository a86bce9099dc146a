"""A bisection of other models and optimizers: planted faults are named, and sound sides differ by rounding."""

from __future__ import annotations

import dataclasses

import pytest

from portatrain.testing.bisect.report import Replay
from portatrain.testing.bisect.sides import Side
from portatrain.testing.bisect.step import replay
from portatrain.testing.recipe_check.small import batches_of
from tests.support.running import BACKENDS

torch = pytest.importorskip("torch")

from tests.support.planted_families import FAMILIES, MODELS  # noqa: E402  # needs torch

QUICK = (
    "weights of experts swapped",
    "down of the first expert twice",
    "factors scaled by another alpha",
    "a frozen table trained",
    "factor cut off",
    "no correction of the bias",
    "Muon's AdamW with another rate",
)
"""Those that a bisection once missed or named wrongly."""


def replayed(a: Side, b: Side, steps: int = 2) -> Replay:
    rows = list(batches_of(a.recipe, a.recipe.describe())[:steps])
    return replay((a, b), [(batch, batch) for batch in rows])


def check(fault: str) -> None:
    planted = FAMILIES[fault]
    made = planted.recipe()
    found = replayed(
        Side(name="right", recipe=made, backend="torch"), Side(name="wrong", recipe=made, make=planted.make)
    ).fault
    assert found is not None
    assert (found.stage, list(found.wrong), found.step) == (planted.stage, ["wrong"], planted.step)
    assert planted.where in found.what and planted.hint in found.hint


@pytest.mark.parametrize("fault", QUICK)
def test_a_planted_fault_is_named(fault: str) -> None:
    check(fault)


@pytest.mark.full
def test_every_planted_fault_is_named() -> None:
    for fault in FAMILIES.keys() - set(QUICK):
        try:
            check(fault)
        except Exception as error:
            error.add_note(f"the fault is: {fault}")
            raise


def test_another_expert_in_bfloat16_is_rounding() -> None:
    """Its router has two logits that differ by less than rounding, and takes the other one of the two experts."""
    made = MODELS["experts"]()
    low = dataclasses.replace(made, precision="bf16")
    found = replayed(Side(name="fp32", recipe=made, backend="torch"), Side(name="bf16", recipe=low, backend="torch"), 1)
    assert found.good, found.sentence
    assert found.rows[0].difference > found.rows[0].bound  # so it was looked at, operation by operation


def test_a_gradient_of_zero_may_be_anything_small() -> None:
    """A bias of keys adds the same to every score of a query: its gradient is zero, and rounding is what is left."""
    made = MODELS["learned positions"]()
    low = dataclasses.replace(made, precision="bf16")
    found = replayed(Side(name="fp32", recipe=made, backend="torch"), Side(name="bf16", recipe=low, backend="torch"), 1)
    assert found.good, found.sentence


def clean(what: str, steps: int, *pairs: tuple[str, str]) -> None:
    """Check that these pairs of sides, which are sound, are judged so."""
    made = MODELS[what]()
    low = dataclasses.replace(made, precision="bf16")
    sides = {
        "torch": Side(name="torch", recipe=made, backend="torch"),
        "jax": Side(name="jax", recipe=made),
        "torch in bf16": Side(name="torch in bf16", recipe=low, backend="torch"),
        "jax in bf16": Side(name="jax in bf16", recipe=low),
    }
    for pair in pairs:
        found = replayed(sides[pair[0]], sides[pair[1]], steps)
        assert found.good, (what, *pair, found.sentence)


@pytest.mark.full
@pytest.mark.skipif(len(BACKENDS) < 2, reason="one framework is installed")
@pytest.mark.usefixtures("compiled_quickly")
def test_a_gradient_that_no_trained_parameter_uses_may_be_missing() -> None:
    """Before the first factor of LoRA torch computes no gradient, and jax does."""
    clean("LoRA", 1, ("torch", "jax in bf16"))


@pytest.mark.soak
@pytest.mark.usefixtures("compiled_quickly")
@pytest.mark.parametrize("what", MODELS)
def test_clean_pairs(what: str) -> None:
    """torch in fp32 beside jax, torch in bfloat16 and jax in bfloat16, and both in bfloat16."""
    clean(what, 2, ("torch", "jax"), ("torch", "torch in bf16"), ("torch", "jax in bf16"))
    clean(what, 2, ("jax in bf16", "torch in bf16"))
