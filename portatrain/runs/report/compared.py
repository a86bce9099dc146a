"""The page of several runs: one file, no script, no network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from portatrain.errors import visible
from portatrain.runs.comparison import Compared, Comparison, Sweep, numeric
from portatrain.runs.report.by_source import several_by_source
from portatrain.runs.report.by_task import several_by_task
from portatrain.runs.report.curves import Curve, curves_chart, key
from portatrain.runs.report.page import STYLE
from portatrain.runs.report.tables import section, table
from portatrain.runs.report.watched import several_watched
from portatrain.system.text import duration

MADE_BY = '<meta name="generator" content="portatrain compare">'
"""The line by which a file is known as such a page, which may be written again."""
MORE_STYLE = """
.best { font-weight: 600 }
"""
X_LABELS = {"step": "steps", "seconds": "seconds of training", "usd": "USD at list prices, for the seconds of training"}
WIDE_X = 8.0
"""Values of a field whose largest is at least this multiple of the smallest are drawn on a logarithmic scale."""


def page(found: Comparison) -> str:
    """Return the whole document."""
    title = f"{len(found.runs)} runs compared"
    lines = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8">{MADE_BY}',
        f"<title>{title}</title>",
        f"<style>{STYLE}{MORE_STYLE}</style></head><body>",
        f"<h1>{title}</h1>{_about(found)}",
        section("Runs", _runs(found)),
        *(_sweep(found, sweep) for sweep in found.sweeps),
        *(_curves(found, axis) for axis in found.axes),
        several_by_source([(one.label, one.run) for one in found.runs]),
        several_by_task([(one.label, one.run) for one in found.runs]),
        several_watched([(one.label, one.run) for one in found.runs]),
        _fields(found),
        _prices(found),
        "</body></html>",
        "",
    ]
    return visible("\n".join(line for line in lines if line) + "\n")


def _about(found: Comparison) -> str:
    best = found.best
    facts = [] if best is None else [f"{found.judged_by}: best {best.label}, {found.result(best):.5g}"]
    if found.common_step is not None:
        facts.append(f"all that have trained have reached step {found.common_step}")
    return f"<p class=sub>{' · '.join(map(escape, facts))}</p>"


def _runs(found: Comparison) -> str:
    priced = any(one.usd is not None for one in found.runs)
    loss = f"training loss at step {found.common_step}"
    head = ["run", "state", "step", loss, "validation loss", "training", "a second"]
    rows = []
    for number, one in enumerate(found.runs):
        name = f"<b>{escape(one.label)}</b>" if one is found.best else escape(one.label)
        cells = [
            key(_curve(number, one, "loss", "step")) + name,
            escape(one.run.state),
            f"{one.run.step} of {one.run.steps}",
            shown(one.loss_at(found.common_step)),
            shown(one.run.validation_loss),
            duration(one.seconds),
            "" if one.run.tokens_per_s is None else f"{one.run.tokens_per_s:.4g} {escape(one.run.unit)}",
        ]
        rows.append([*cells, shown(one.usd, 4)] if priced else cells)
    return table([*head, "USD, all attempts"] if priced else head, rows, raw=range(len(head) + 1))


def _curves(found: Comparison, axis: str) -> str:
    figures, label = [("loss", "training loss"), ("validation", "validation loss")], X_LABELS.get(axis, found.unit)
    if axis == "step":
        figures += [("grad_norm", "gradient norm, before clipping"), ("tokens_per_s", f"{found.unit} a second")]
    out = []
    for name, title in figures:
        curves = [_curve(number, one, name, axis) for number, one in enumerate(found.runs)]
        if any(curve.points for curve in curves):
            out.append(curves_chart(title, curves, x_label=label))
    left_out = [one.label for one in found.runs if not one.at(axis) and one.run.curve]
    if left_out and out:
        out.append(f"<p class=sub>not recorded for {escape(', '.join(left_out))}</p>")
    legend = _legend([_curve(number, one, "loss", "step") for number, one in enumerate(found.runs)])
    return section(f"Over {label}", legend + "".join(out)) if out else ""


def _legend(curves: Sequence[Curve]) -> str:
    parts = (f'<span style="margin-right:1.4em">{key(one)}{escape(one.label)}</span>' for one in curves)
    return f"<p>{''.join(parts)}</p>"


def _curve(number: int, one: Compared, name: str, axis: str) -> Curve:
    points = one.curve(name, axis)
    return Curve(number=number, label=one.label, points=points, dots=name == "validation" and len(points) < 40)


def _sweep(found: Comparison, sweep: Sweep) -> str:
    """Return the results of a sweep over one field: a chart if its values are numbers, and a table."""
    values = [numeric(value) for line in sweep.lines for value, _ in line.runs]
    chart, known = "", [value for value in values if value is not None]
    if len(known) == len(values):
        curves = []
        for number, line in enumerate(sweep.lines):
            points = [
                (number_of, result)
                for value, one in line.runs
                if (number_of := numeric(value)) is not None and (result := found.result(one)) is not None
            ]
            curves.append(Curve(number=number, label=_fixed(line.fixed), points=points, dots=True))
        log = min(known) > 0 and max(known) >= WIDE_X * min(known)
        if any(math.isfinite(y) for curve in curves for _, y in curve.points):
            chart = curves_chart(found.judged_by, curves, x_label=sweep.field, log_x=log)
        if len(curves) > 1:
            chart = _legend(curves) + chart
    rows = [
        (escape(_fixed(line.fixed)), escape(value), escape(one.label), shown(found.result(one)), escape(one.run.state))
        for line in sweep.lines
        for value, one in line.runs
    ]
    head = ("the other fields", sweep.field, "run", found.judged_by, "state")
    return section(f"Sweep over {sweep.field}", chart + table(head, rows, raw=range(5)))


def _fixed(fixed: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in fixed.items()) or "all the same"


def _fields(found: Comparison) -> str:
    """Return the table of the fields in which the recipes differ: a row a field, a column a run."""
    if not found.fields:
        return section("Fields that differ", "<p>None: the recipes are the same.</p>")
    rows = [[name, *(one.differs.get(name, "") for one in found.runs)] for name in found.fields]
    made = table(["field", *(one.label for one in found.runs)], rows)
    return section("Fields that differ", f'<div class="wide">{made}</div>')


def _prices(found: Comparison) -> str:
    rows = [
        (one.label, str(number), f"{price.usd_per_hour:.4g}", price.source)
        for one in found.runs
        for number, price in sorted(one.prices.items())
    ]
    return section("Prices", table(("run", "attempt", "USD an hour", "from"), rows)) if rows else ""


def shown(value: float | None, digits: int = 5) -> str:
    """Return a number for a table; '' if there is none."""
    return "" if value is None else "not finite" if not math.isfinite(value) else f"{value:.{digits}g}"
