"""A bisection of other models and optimizers: planted faults are named, and sound sides differ by rounding."""

from __future__ import annotations

import dataclasses

import pytest

from portatrain.testing.bisect.report import Replay
from portatrain.testing.bisect.sides import Side
from portatrain.testing.bisect.step import replay
from portatrain.testing.recipe_check.small import batches_of

torch = pytest.importorskip("torch")

from tests.support.planted_families import FAMILIES, MODELS  # noqa: E402  # needs torch

QUICK = (
    "weights of experts swapped",
    "down of the first expert twice",
    "factors scaled by another alpha",
    "a frozen table trained",
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


@pytest.mark.soak
@pytest.mark.usefixtures("compiled_quickly")
@pytest.mark.parametrize("what", MODELS)
def test_clean_pairs(what: str) -> None:
    """torch in fp32 beside jax, torch in bfloat16, and jax in bfloat16."""
    made = MODELS[what]()
    low = dataclasses.replace(made, precision="bf16")
    for other in (
        Side(name="jax", recipe=made),
        Side(name="bf16", recipe=low, backend="torch"),
        Side(name="jax in bf16", recipe=low),
    ):
        found = replayed(Side(name="torch", recipe=made, backend="torch"), other)
        assert found.good, (other.name, found.sentence)
