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


@pytest.mark.parametrize("every", [1, 3, 7, 20])
@pytest.mark.parametrize("back", [1, 5, 12])
def test_there_is_always_one_to_go_back_to(every: int, back: int) -> None:
    """However often a run saves, it can go back `back` steps before any step, and not much further than that."""
    rule, there, floor = Retention(last=1, back=back, floor=9), [9], 9
    for newest in range(9 + every, 100, every):
        there = sorted(rule.kept([*there, newest], {}))
        assert len(there) <= 3
        for spike in range(newest + 1, newest + every + 1):
            able = [step for step in there if floor <= step < max(spike - back, floor + 1)]
            assert able and spike - max(able) <= 2 * (back + every)
