"""The rule for spikes: its limits against NumPy, and the same from every checkpoint."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from portatrain.backends.base import backend_class, missing
from portatrain.errors import UserError
from portatrain.recipe import Spikes
from portatrain.system import json_files
from portatrain.training.spike_guard import SpikeGuard
from tests.support import small_recipe

BACKEND = "torch" if not missing("torch") else "jax"


def expected(values: np.ndarray, width: float) -> float:
    middle = np.median(values)
    return middle + width * max(1.4826 * np.median(np.abs(values - middle)), 0.01 * abs(middle))


@pytest.mark.parametrize("seed", range(4))
def test_limits_are_median_and_mad_of_the_window(seed: int) -> None:
    draw = np.random.default_rng(seed)
    seen = [(step, *draw.normal(3, 0.2, 2)) for step in range(1, 41) if step % 7]
    rule = Spikes(window=12, least=8, loss=5.0, grad_norm=7.0)
    for step in range(1, 43):
        known = np.array([one for one in seen if one[0] <= step - 2][-12:])
        if len(known) < 8:
            assert rule.limits(step, [one for one in seen if one[0] < step]) == (math.inf, math.inf)
            continue
        wanted = expected(known[:, 1], 5.0), expected(known[:, 2], 7.0)
        # Both are sums of a few float64 numbers of about 3.
        np.testing.assert_allclose(rule.limits(step, [one for one in seen if one[0] < step]), wanted, rtol=1e-14)


def test_a_flat_curve_has_a_band_and_only_large_values_are_beyond_it() -> None:
    seen = [(step, 2.0, -1.0) for step in range(1, 9)]
    assert Spikes(window=8, least=8).limits(10, seen) == pytest.approx((2.12, -0.94))
    assert Spikes(window=8, least=8, loss=None).limits(10, seen)[0] == math.inf


@pytest.mark.parametrize("cut", [0, 1, 5, 9, 17, 24])
def test_a_guard_from_any_checkpoint_decides_alike(cut: int) -> None:
    draw = np.random.default_rng(3)
    curve = draw.normal(2, 0.1, (30, 2)).astype(np.float32).astype(float)
    curve[10, 0], curve[20, 1], curve[15, 0] = 9.0, 9.0, math.nan
    rule = Spikes(window=8, least=4)

    def run(guard: SpikeGuard, first: int, last: int) -> list:
        found = []
        for step in range(first, last + 1):
            loss, norm = curve[step - 1].tolist()
            limits = guard.limits(step)
            skipped = not (loss <= limits[0] and norm <= limits[1])
            found.append((step, limits, guard.add(step, loss, norm, skipped=skipped)))
        return found

    whole = run(SpikeGuard(rule, BACKEND), 1, 30)
    assert [step for step, _, spike in whole if spike] == [11, 21]  # and not 16, which is not finite
    before, after = SpikeGuard(rule, BACKEND), SpikeGuard(rule, BACKEND)
    found = run(before, 1, cut)
    after.restore(json.loads(json.dumps(json_files.strict(before.meta()), allow_nan=False)))
    assert [*found, *run(after, cut + 1, 30)] == whole


def test_without_a_rule_there_are_no_limits_and_nothing_is_kept() -> None:
    guard = SpikeGuard(None, BACKEND)
    assert guard.add(1, 1.0, 1.0, skipped=False) is None and guard.add(2, 1e9, 1.0, skipped=True) is None
    assert guard.arguments(3) == {} and guard.meta() == {}


def test_the_rule_is_a_field_that_older_recipes_do_not_have() -> None:
    plain, ruled = small_recipe.make(), small_recipe.make(spikes=Spikes(window=32, least=16))
    assert "spikes" not in plain.to_json() and ruled.sha256 != plain.sha256
    assert type(plain).from_json(ruled.to_json()) == ruled


@pytest.mark.parametrize(
    ("fields", "hint"),
    [
        ({"window": 3}, "at least 4 steps"),
        ({"least": 200}, "from 4 to window=128"),
        ({"least": 2}, "from 4"),
        ({"loss": 0.0}, "a number above 0"),
        ({"grad_norm": math.inf}, "a number"),
        ({"loss": None, "grad_norm": None}, "a width for loss or grad_norm"),
        ({"window": 1.5}, "window"),
    ],
)
def test_mistakes(fields: dict, hint: str) -> None:
    with pytest.raises(UserError, match=hint):
        Spikes(**fields)


def test_a_backend_that_takes_no_limits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_class(BACKEND), "takes_limits", False)
    with pytest.raises(UserError, match="whose steps take limits"):
        SpikeGuard(Spikes(), BACKEND)
    SpikeGuard(None, BACKEND)
