"""A bisection of other models and optimizers: planted faults are named, and sound sides differ by rounding."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from portatrain.backends.reference.watched import watch_oracle
from portatrain.testing.bisect.choices import Choices, Open
from portatrain.testing.bisect.report import Replay, Stage
from portatrain.testing.bisect.sides import Running, Side
from portatrain.testing.bisect.step import replay
from portatrain.testing.recipe_check.small import batches_of
from tests.support.running import BACKENDS

torch = pytest.importorskip("torch")

from portatrain.backends.torch.one_device import OneDevice  # noqa: E402
from tests.support.planted_families import FAMILIES, MODELS  # noqa: E402  # needs torch

QUICK = (
    "weights of experts swapped",
    "down of the first expert twice",
    "factors scaled by another alpha",
    "a frozen table trained",
    "factor cut off",
    "factor of experts cut off",
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


@pytest.mark.full
@pytest.mark.skipif(len(BACKENDS) < 2, reason="one framework is installed")
@pytest.mark.usefixtures("compiled_quickly")
def test_a_compiled_step_may_choose_other_experts_than_its_operations() -> None:
    """In bfloat16 the program of the step rounds otherwise than the one that shows its operations."""
    clean("experts with losses", 1, ("jax in bf16", "torch in bf16"))


def test_choices_that_rounding_may_decide() -> None:
    """Two experts whose scores differ by a part in ten million, of every token that has one of them and not the
    other."""
    side = Running(Side(name="torch", recipe=MODELS["experts"](), backend="torch"))
    batch = side.recipe.microbatches(dict(next(iter(batches_of(side.recipe, side.definition)))))
    arrays = side.first_state()
    router = arrays["params/blocks/mlp/router/weight"]

    def choices() -> tuple[Choices, list[Open]]:
        made = Choices(side=side, arrays=arrays, batch=batch, step=1)
        return made, made.open()

    assert not choices()[1]
    router[:, :, 3] = router[:, :, 0] * (1 + 1e-7)
    made, found = choices()
    micro = {k: v[0] for k, v in batch.items()}
    given = side.definition, side.parameters(arrays), micro, side.context(micro, 1)
    calls = [(k, c.results[1]) for k, c in enumerate(watch_oracle(*given)[0]) if c.name == "top_k"]
    one_of_them = sum(int((np.isin(chosen, (0, 3)).sum(-1) == 1).sum()) for _, chosen in calls)
    assert len(found) == one_of_them > 10
    assert all({one.other, dict(calls)[one.call][one.at]} == {0, 3} for one in found)
    # Made otherwise, it moves the load by one token, and hardly the loss.
    losses = [
        side.objective(arrays, batch, 1, taken)(side.parameters(arrays)) for taken in ((), made.with_others(found[:1]))
    ]
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=1e-2)


class Larger(OneDevice):
    """Every gradient of a step is larger by 30 %."""

    def _accumulate(self, state: Any, batch: Any, step: int) -> Any:
        found = super()._accumulate(state, batch, step)
        torch._foreach_mul_(self._grads(state), 1.3)
        return found


def test_choices_that_rounding_may_decide_hide_no_wrong_sum() -> None:
    made = dataclasses.replace(MODELS["experts with losses"](), precision="bf16")
    wrong = Side(name="wrong", recipe=made, make=Larger)
    fault = replayed(Side(name="right", recipe=made, backend="torch"), wrong, 1).fault
    assert fault is not None and (fault.stage, fault.wrong) == (Stage.GRADIENT, ["wrong"])


@pytest.mark.soak
@pytest.mark.usefixtures("compiled_quickly")
@pytest.mark.parametrize("what", MODELS)
def test_clean_pairs(what: str) -> None:
    """torch in fp32 beside jax, torch in bfloat16 and jax in bfloat16, and both in bfloat16."""
    clean(what, 2, ("torch", "jax"), ("torch", "torch in bf16"), ("torch", "jax in bf16"))
    clean(what, 2, ("jax in bf16", "torch in bf16"))
