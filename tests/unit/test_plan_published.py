"""Published speeds: the fitted factors are those of the rows, the errors are leave-one-out, the page is current."""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks import plan_published
from benchmarks.plan_published_rows import ROWS
from portatrain.plan.clusters.names import parse
from portatrain.plan.cost.efficiency import TYPICAL_ERROR, of


def test_the_shipped_factors_are_what_the_rows_say() -> None:
    assert plan_published.stale() == []


def test_a_row_is_met_at_its_own_factor() -> None:
    for row in ROWS:
        assert abs(plan_published.predict(row, plan_published.own_factor(row))[0] / row.tokens - 1) < 0.005


def test_no_row_is_fitted_to_itself() -> None:
    for row in ROWS:
        same = [r for r in ROWS if r.chip == row.chip and r is not row]
        basis = same or [r for r in ROWS if r.vendor == row.vendor and r is not row]
        expected = statistics.geometric_mean([plan_published.own_factor(r) for r in basis])
        assert plan_published.check(row).factor == round(expected, 3)


def test_the_median_error_is_under_15_percent() -> None:
    errors = [abs(plan_published.check(row).error) for row in ROWS]
    assert statistics.median(errors) < 0.15
    assert round(statistics.median(errors), 3) == TYPICAL_ERROR


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
    page = Path(__file__).parents[2] / "docs" / "measured" / "plan-published.md"
    assert page.read_text(encoding="utf-8") == plan_published.report()
