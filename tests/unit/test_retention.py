"""Which checkpoints stay."""

from __future__ import annotations

import pytest

from portatrain.errors import UserError
from portatrain.recipe.retention import Retention
from tests.support.small_recipe import make

LOSSES = {10: {"loss": 3.0}, 20: {"loss": 1.0}, 30: {"loss": 2.0}, 40: {}, 50: {"loss": float("nan")}}


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(), {40, 50}),
        (Retention(last=1), {50}),
        (Retention(last=9), {10, 20, 30, 40, 50}),
        (Retention(last=1, every=20), {20, 40, 50}),
        (Retention(last=1, best="min:loss"), {20, 50}),
        (Retention(last=1, best="max:loss"), {10, 50}),
        (Retention(last=1, best="max:accuracy"), {50}),
        (Retention(last=2, every=30, best="min:loss"), {20, 30, 40, 50}),
    ],
)
def test_what_is_kept(retention: Retention, kept: set[int]) -> None:
    assert retention.kept(LOSSES, LOSSES) == kept


def test_of_equals_the_newest_is_the_best() -> None:
    assert Retention(last=1, best="min:loss").kept([1, 2, 3], {1: {"loss": 1.0}, 2: {"loss": 1.0}}) == {2, 3}


@pytest.mark.parametrize("best", ["loss", "min:", "least:loss", ":loss"])
def test_a_goal_that_is_none_is_refused_with_the_recipe(best: str) -> None:
    with pytest.raises(UserError, match="min:NAME or max:NAME"):
        make(checkpoint_keep_best=best)
