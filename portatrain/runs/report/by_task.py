"""The results of evaluation tasks over the steps of a run: a section of the page of one run, and of several."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from portatrain.runs.history import History
from portatrain.runs.report.curves import Curve, curves_chart, key
from portatrain.runs.report.tables import section, table
from portatrain.system.svg import Point

TITLE = "Tasks"


def by_task(run: History) -> str:
    """Return a chart for each task with a curve for each metric, and a table of the newest results; '' without any."""
    out = []
    for label in labels([run]):
        curves = [
            Curve(number=number, label=metric, points=points(run, label, metric), dots=True)
            for number, metric in enumerate(metrics([run], label))
        ]
        rows = [
            (key(one) + escape(one.label), f"{one.points[-1][1]:.5g}", f"{one.points[-1][0]:g}")
            for one in curves
            if one.points
        ]
        made = table(("metric", "newest", "at step"), rows, raw=(0,))
        out.append(curves_chart(label, curves, x_label="steps") + made)
    return section(TITLE, "".join(out)) if out else ""


def several_by_task(runs: Sequence[tuple[str, History]]) -> str:
    """Return a chart for each task and metric with a curve for each run (label, run), and a table of the newest."""
    charts, rows = [], []
    for label in labels([run for _, run in runs]):
        for metric in metrics([run for _, run in runs], label):
            found = [points(run, label, metric) for _, run in runs]
            curves = [
                Curve(number=number, label=name, points=mine, dots=True)
                for number, ((name, _), mine) in enumerate(zip(runs, found, strict=True))
            ]
            charts.append(curves_chart(f"{label}: {metric}", curves, x_label="steps"))
            newest = (f"{mine[-1][1]:.5g} at step {mine[-1][0]:g}" if mine else "" for mine in found)
            rows.append([label, metric, *newest])
    if not rows:
        return ""
    made = table(["task", "metric", *(name for name, _ in runs)], rows)
    return section(TITLE, f'<div class="wide">{made}</div>' + "".join(charts))


def labels(runs: Sequence[History]) -> list[str]:
    """Return the tasks of these runs, in order."""
    return list(dict.fromkeys(one.label for run in runs for one in run.tasks))


def metrics(runs: Sequence[History], label: str) -> list[str]:
    """Return the metrics of a task, without standard errors."""
    found = (name for run in runs for one in run.tasks if one.label == label for name in one.metrics)
    return [name for name in dict.fromkeys(found) if "_stderr" not in name]


def points(run: History, label: str, metric: str) -> list[Point]:
    """Return (step, value) of a metric, in the order of the steps."""
    return [(float(one.step), one.metrics[metric]) for one in run.tasks if one.label == label and metric in one.metrics]
