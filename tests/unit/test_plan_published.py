"""Published speeds: the fitted numbers are those of the rows, errors are leave-one-out, blind predictions stay."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import pytest

from benchmarks import plan_blind, plan_published, plan_published_page
from benchmarks.plan_held_out import EIGHT, HELD_OUT
from benchmarks.plan_published import ROWS
from portatrain.plan.clusters.names import parse
from portatrain.plan.cost import interval
from portatrain.plan.cost.efficiency import TYPICAL_ERROR, of
from portatrain.plan.cost.shapes import PRESETS

ROOT = Path(__file__).parents[2]


def test_the_shipped_numbers_are_what_the_rows_say() -> None:
    assert plan_published.stale() == []


def test_a_row_is_met_at_its_own_factor() -> None:
    for row in ROWS:
        assert abs(plan_published.predict(row, plan_published.own_factor(row))[0] / row.tokens - 1) < 0.005


def test_no_row_is_fitted_to_itself() -> None:
    for row in ROWS:
        others = tuple(r for r in ROWS if r is not row)
        sorting = plan_published.sorting_of(others)
        basis = [r for r in others if r.chip == row.chip] or [r for r in others if r.vendor == row.vendor]
        own = [plan_published.own_factor(r, sorting[r.gathers] if plan_published.sorts(r) else None) for r in basis]
        assert plan_published.check(row).factor == round(statistics.geometric_mean(own), 3)


def test_the_eight_rows_enter_no_fit() -> None:
    assert len(EIGHT) == 8
    assert not {plan_blind.name(row) for row in EIGHT} & {plan_blind.name(row) for row in ROWS}


def test_a_prediction_that_was_kept_is_never_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {plan_blind.name(row): {"date": "then"} for row in HELD_OUT[1:]}
    monkeypatch.setattr(plan_blind, "KEPT", tmp_path / "blind.json")
    monkeypatch.setattr(plan_blind, "kept", lambda: dict(kept))
    monkeypatch.setattr(plan_blind, "predictions", lambda row: {"said": row.model})
    assert plan_blind.freeze("now") == [plan_blind.name(HELD_OUT[0])]
    text = (tmp_path / "blind.json").read_text(encoding="utf-8")
    assert text.count('"then"') == len(HELD_OUT) - 1 and text.count('"now"') == 1


def test_every_held_out_row_has_a_dated_prediction() -> None:
    have = plan_blind.kept()
    for row in HELD_OUT:
        said = have[plan_blind.name(row)]
        assert said["published"] == row.tokens and said["chips"] == row.on.chips and said["date"]


def test_the_eight_rows_are_predicted_within_the_goal() -> None:
    """Median under 10 %, none over 20 %, in the publisher's configuration and in the planner's own."""
    for way in ("planners", "publishers"):
        sizes = [abs(error) for error in plan_published_page.blind_errors(EIGHT, way=way, now=True)]
        assert statistics.median(sizes) < 0.10 and max(sizes) < 0.20


def test_the_median_error_is_under_10_percent() -> None:
    errors = [abs(plan_published.check(row).error) for row in ROWS]
    assert statistics.median(errors) < 0.10
    assert round(statistics.median(errors), 3) == TYPICAL_ERROR


def test_four_of_five_rows_lie_in_an_interval_made_without_them() -> None:
    inside = plan_published.held(ROWS)
    assert sum(at for _, _, at in inside) >= interval.LEVEL * len(inside)
    # The oracle: the smallest width that at least 0.8 (n + 1) of the other rows of the group lie in.
    for row, width, _ in inside:
        far = plan_published.check(row).far
        sizes = [abs(e) for other, e in plan_published.errors(far).items() if other is not row]
        enough = [w for w in sizes if sum(s <= w for s in sizes) >= interval.LEVEL * (len(sizes) + 1)]
        assert width == min(enough, default=max(sizes))


def test_the_farther_the_published_runs_the_wider_the_interval() -> None:
    near, far, farthest = interval.SPREADS
    assert 0 < near < far < farthest
    dense, experts = PRESETS["llama3-70b"], PRESETS["deepseek-v3"]
    for cluster, shape, precision, group, says in (
        ("tpu-7x-512", dense, "bf16", 0, "on this chip"),
        ("tpu-7x-512", experts, "bf16", 0, "on this chip"),
        ("tpu-7x-512", dense, "fp8", 1, "none in fp8"),
        ("tpu-v6e-256", experts, "bf16", 1, "none with such experts"),
        ("tpu-v4-256", dense, "bf16", 1, "other chips"),
        ("h100-64", PRESETS["llama3-8b"], "bf16", 1, "other chips"),
        ("tpu-v6e-256", PRESETS["llama3-405b"], "bf16", 1, "none near this size"),
        ("h100-64", experts, "bf16", 2, ""),
        ("mi300x-64", dense, "bf16", 2, "runs of other vendors"),
    ):
        found = interval.interval(parse(cluster).chip, shape, precision)
        assert (found.far, says in found.why) == (group, True), (cluster, shape.name, found)
        assert found.factor == math.exp(interval.SPREADS[group])
        low, high = found.around(3.0)
        assert low < 3.0 < high and math.isclose(low * high, 9.0)


def test_where_a_factor_comes_from() -> None:
    for cluster, basis, estimate in (
        ("tpu-v6e-256", "published runs on tpu-v6e", False),
        ("tpu-v4-256", "published runs on google", False),
        ("gb300-72", "published runs on nvidia", False),
        ("mi300x-8", "H100's", True),
        ("trn2-16", "mean", True),
    ):
        found = of(parse(cluster).chip)
        assert basis in found.basis and found.estimate == estimate


def test_the_page_is_what_the_command_prints() -> None:
    page = ROOT / "docs" / "measured" / "plan-published.md"
    assert page.read_text(encoding="utf-8") == plan_published_page.report()
