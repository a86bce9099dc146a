"""The validation loss of each source of a mixture: a section of the page of one run, and of the page of several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from portatrain.runs.history import History
from portatrain.runs.report.curves import Curve, curves_chart, key
from portatrain.runs.report.tables import section, table
from portatrain.system.svg import Point

TITLE = "Validation by source"


def by_source(run: History) -> str:
    """Return a chart with a curve for each source, and a table of the newest losses; '' if there are no sources."""
    names = source_names([run])
    if not names:
        return ""
    curves = [
        Curve(number=number, label=name, points=losses(run, name), dots=True) for number, name in enumerate(names)
    ]
    rows = []
    for curve in curves:
        step, loss = curve.points[-1]
        bits = dict(losses(run, curve.label, "bits_per_byte")).get(step)
        rows.append((key(curve) + escape(curve.label), _shown(loss), _shown(bits), f"{step:g}"))
    made = table(("source", "loss", "bits per byte", "at step"), rows, raw=(0,))
    return section(TITLE, curves_chart("validation loss of each source", curves, x_label="steps") + made)


def several_by_source(runs: Sequence[tuple[str, History]]) -> str:
    """Return a chart for each source with a curve for each run (label, run), and a table of the newest losses."""
    names = source_names([run for _, run in runs])
    if not names:
        return ""
    charts, rows = [], []
    for name in names:
        found = [losses(run, name) for _, run in runs]
        curves = [
            Curve(number=number, label=label, points=points, dots=True)
            for number, ((label, _), points) in enumerate(zip(runs, found, strict=True))
        ]
        charts.append(curves_chart(f"validation loss of {name}", curves, x_label="steps"))
        rows.append([name, *(_shown(points[-1][1]) if points else "" for points in found)])
    made = table(["source", *(label for label, _ in runs)], rows)
    return section(TITLE, f'<div class="wide">{made}</div>' + "".join(charts))


def losses(run: History, source: str, metric: str = "loss") -> list[Point]:
    """Return (step, value) of every evaluation of a source, in the order of the steps; of one step the newest."""
    name = f"{metric}/{source}"
    found = {
        e["step"]: float(e["metrics"][name]) for e in run.evals if name in (e.get("metrics") or {}) and "step" in e
    }
    return sorted((float(step), value) for step, value in found.items())


def source_names(runs: Sequence[History]) -> list[str]:
    """Return the sources that evaluations of these runs name, in the order of their first mention."""
    found = (name for run in runs for event in run.evals for name in event.get("metrics") or {})
    return list(dict.fromkeys(name.removeprefix("loss/") for name in found if name.startswith("loss/")))


def _shown(value: float | None) -> str:
    return "" if value is None else "not finite" if not math.isfinite(value) else f"{value:.5g}"
