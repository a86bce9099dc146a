"""Schedules at their boundaries, as values written by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portatrain.errors import UserError
from portatrain.optim.schedules import WSD, Constant, Cosine, Linear, Schedule

COS = [0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(5)]


@pytest.mark.parametrize(
    ("schedule", "steps", "expected"),
    [
        (Constant(), 3, [1, 1, 1, 1, 1]),
        (Constant(warmup=4), 6, [0.25, 0.5, 0.75, 1, 1, 1, 1]),
        (Linear(), 4, [0.75, 0.5, 0.25, 0, 0, 0]),
        (Linear(warmup=2, min_ratio=0.2), 6, [0.5, 1, 0.8, 0.6, 0.4, 0.2, 0.2]),
        (Cosine(warmup=2), 6, [0.5, 1, *COS[1:4], 0, 0]),
        (Cosine(warmup=2, min_ratio=0.1), 6, [0.5, 1, *(0.1 + 0.9 * c for c in COS[1:4]), 0.1, 0.1]),
        (WSD(warmup=2, decay=2), 6, [0.5, 1, 1, 1, 0.5, 0, 0]),
        (WSD(warmup=2, decay=2, min_ratio=0.5), 6, [0.5, 1, 1, 1, 0.75, 0.5, 0.5]),
        (WSD(decay=4, shape="sqrt"), 5, [1, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75), 0, 0]),
        (WSD(), 20, [1] * 18 + [0.5, 0, 0]),
        (WSD(decay=0), 3, [1, 1, 1, 1]),
        (Linear(warmup=3), 3, [1 / 3, 2 / 3, 1, 1]),  # a run that is all warm-up ends at 1
        (WSD(warmup=1, decay=2), 3, [1, 0.5, 0, 0]),
        (Cosine(), 1, [0, 0]),
    ],
    ids=str,
)
def test_values(schedule: Schedule, steps: int, expected: list[float]) -> None:
    got = [schedule(step, steps) for step in range(1, len(expected) + 1)]
    assert got == pytest.approx(expected, rel=1e-15, abs=1e-16)
    exact = {0, 0.25, 0.5, 1}  # boundaries are met to the last bit
    assert all(g == e for g, e in zip(got, expected, strict=True) if e in exact and not isinstance(schedule, Cosine))


MAKE: list[Callable[..., Schedule]] = [Constant, Linear, Cosine, WSD]


@given(st.sampled_from(MAKE), st.integers(1, 10**7), st.floats(0, 1), st.floats(0, 1), st.integers(1, 10**8))
def test_every_schedule_stays_in_its_limits(make, steps: int, part: float, ratio: float, step: int) -> None:
    warmup = int(part * 0.9 * steps)
    schedule = make(warmup=warmup) if make is Constant else make(warmup=warmup, min_ratio=ratio)
    end = 1.0 if make is Constant or (make is WSD and steps < 10) or warmup == steps else ratio
    assert schedule(steps, steps) == end
    assert schedule(steps + step, steps) == end
    value = schedule(step, steps)
    assert 0 <= value <= 1
    if warmup:
        assert schedule(warmup, steps) == 1 and schedule(1, steps) == 1 / warmup
    if min(step, steps) > warmup:
        assert value >= min(end, 1)
        assert schedule(step + 1, steps) <= value


@pytest.mark.parametrize(
    ("make", "fields", "named"),
    [
        *((make, {"warmup": bad}, "warmup") for make in MAKE for bad in (-1, 1.5, "10", True, None)),
        *((make, {"min_ratio": bad}, "min_ratio") for make in MAKE[1:] for bad in (-0.1, 1.1, math.nan, "0")),
        *((WSD, {"decay": bad}, "decay") for bad in (-1, 0.5)),
        (WSD, {"shape": "exp"}, "shape"),
    ],
)
def test_bad_fields_are_user_errors(make, fields: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=rf"\b{named}\b") as caught:
        make(**fields)
    assert caught.value.expected and caught.value.got and caught.value.do


@pytest.mark.parametrize(
    ("schedule", "step", "steps", "words"),
    [
        (Constant(warmup=11), 1, 10, "at most the 10 steps"),
        (Cosine(), 1, 0, "at least 1 step"),
        (WSD(warmup=6, decay=5), 1, 10, r"6 \+ 5"),
        (WSD(warmup=10), 1, 10, r"10 \+ 1"),
        (Linear(), 0, 10, "1 or more"),
    ],
)
def test_what_does_not_fit_the_run_is_a_user_error(schedule: Schedule, step: int, steps: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        schedule(step, steps)
