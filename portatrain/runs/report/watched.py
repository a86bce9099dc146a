"""What was watched, on the page of one run and of several: statistics by layer, and the numbers of models and hooks.

A page stays readable, and of a few MiB, for a model of 100 layers. Every tensor or module has one row in a table, with
the least, the middle and the largest of its layers. Charts are drawn for the first `CHARTS` of a kind: a curve for each
layer if these are few, else the least, the middle and the largest one, and beside it the values over the layers.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from portatrain.runs.history import History
from portatrain.runs.report.curves import Curve, curves_chart, key
from portatrain.runs.report.tables import section, table
from portatrain.system.svg import Point

KINDS = {
    "rms": "Activations: root of the mean square",
    "logit": "Attention: largest logit",
    "dead": "Dead units: their share",
    "grad": "Norms of gradients",
    "update": "Norms of updates",
    "params": "Norms of parameters",
}
"""The kinds of statistics, in the order of the page; the first three are shown open."""
OPEN = ("rms", "logit", "dead")
CHARTS = 12
"""Names of a kind that have charts; those after them are in the table."""
SINGLE = 8
"""A tensor of up to so many layers has a curve for each of them."""
TIMES = 3
"""Steps whose values over the layers are shown."""
SCALARS = 40
"""Charts of the numbers of models and hooks."""

Values = Mapping[int, Sequence[float]]
"""step -> a number for each layer."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """The statistic `name`, such as 'grad/blocks/attn/wq', in the order of its layers; `layers`: their names, [''] for
    a tensor outside of a Stack."""

    name: str
    layers: Sequence[str]
    values: Values

    def layer(self, number: int) -> list[Point]:
        return [(float(step), row[number]) for step, row in self.values.items()]

    def over(self, of: int) -> list[Point]:
        """Return the least (0), the middle (1) or the largest (2) layer of every step."""
        return [(float(step), _spread(row)[of]) for step, row in self.values.items()]


def watched(run: History) -> str:
    """Return the sections of the page of one run; '' if nothing was watched."""
    found = series(run)
    out = []
    for kind, title in KINDS.items():
        mine = [one for one in found if one.name.startswith(f"{kind}/")]
        if mine:
            charts = [chart for one in mine[:CHARTS] for chart in _charts(one)]
            left = f"<p class=sub>{len(mine) - CHARTS} more are in the table alone.</p>" if len(mine) > CHARTS else ""
            shown = " open" if kind in OPEN else ""
            body = f'<div class="wide">{_table(mine)}</div>{"".join(charts)}{left}'
            out.append(f"<details{shown}><summary>{escape(title)} ({len(mine)})</summary>{body}</details>")
    made = section("Statistics", "".join(out)) if out else ""
    numbers = scalars(run)
    charts = [_single(name, points) for name, points in list(numbers.items())[:SCALARS]]
    return made + (section("Numbers of the model and of hooks", "".join(charts) + _left(numbers)) if charts else "")


def several_watched(runs: Sequence[tuple[str, History]]) -> str:
    """Return the sections of the page of several runs (label, run): a curve for each run, of its largest layer."""
    each = [(label, {one.name: one for one in series(run)}, scalars(run)) for label, run in runs]
    out = []
    for kind, title in KINDS.items():
        names = list(dict.fromkeys(name for _, found, _ in each for name in found if name.startswith(f"{kind}/")))
        charts = []
        for name in names[:CHARTS]:
            curves = [
                Curve(number=n, label=label, points=found[name].over(2) if name in found else ())
                for n, (label, found, _) in enumerate(each)
            ]
            charts.append(curves_chart(f"{name}, largest layer", curves, x_label="steps"))
        if charts:
            left = f"<p class=sub>{len(names) - CHARTS} more are not shown.</p>" if len(names) > CHARTS else ""
            shown = " open" if kind in OPEN else ""
            out.append(
                f"<details{shown}><summary>{escape(title)} ({len(names)})</summary>{''.join(charts)}{left}</details>"
            )
    made = section("Statistics", "".join(out)) if out else ""
    every = dict.fromkeys(name for *_, numbers in each for name in numbers)
    charts = [
        curves_chart(
            name,
            [
                Curve(number=n, label=label, points=numbers.get(name, ()), dots=len(numbers.get(name, ())) < 40)
                for n, (label, _, numbers) in enumerate(each)
            ],
            x_label="steps",
        )
        for name in list(every)[:SCALARS]
    ]
    return made + (section("Numbers of the model and of hooks", "".join(charts) + _left(every)) if charts else "")


def series(run: History) -> list[Series]:
    """Return the statistics of a run, in the order of its rows: of the model."""
    steps: dict[str, dict[int, dict[str, float]]] = {}
    for row in run.curve:
        for name, value in (row.get("statistics") or {}).items():
            whole, _, last = name.rpartition("/")
            numbered = last.replace(".", "").isdigit() and whole.count("/") > 0
            of, layer = (whole, last) if numbered else (name, "")
            steps.setdefault(of, {}).setdefault(row["step"], {})[layer] = value
    found = []
    for name, rows in steps.items():
        layers = list(dict.fromkeys(layer for row in rows.values() for layer in row))
        values = {step: [row.get(layer, math.nan) for layer in layers] for step, row in rows.items()}
        found.append(Series(name=name, layers=layers, values=values))
    return found


def scalars(run: History) -> dict[str, list[Point]]:
    """Return the values of `ops.aux` and the numbers of hooks' events, by name, over the steps."""
    found: dict[str, list[Point]] = {}
    for row in run.curve:
        for name, value in (row.get("aux") or {}).items():
            found.setdefault(name, []).append((float(row["step"]), value))
    for name, points in run.reported.items():
        found[name] = [(float(step), value) for step, value in points]
    return found


def _table(mine: Sequence[Series]) -> str:
    several = any(len(one.layers) > 1 for one in mine)
    head = ["", "first", "newest", *(("least layer", "middle", "largest layer") if several else ())]
    rows = []
    for one in mine:
        steps = list(one.values)
        first, newest = one.values[steps[0]], one.values[steps[-1]]
        cells = [one.name, _shown(_spread(first)[1]), _shown(_spread(newest)[1])]
        if len(one.layers) > 1:
            least, middle, largest = _spread(newest)
            cells += [_at(one, newest, least), _shown(middle), _at(one, newest, largest)]
        rows.append([*cells, *[""] * (len(head) - len(cells))])
    steps = sorted({step for one in mine for step in one.values})
    about = f"<p class=sub>Steps {steps[0]} and {steps[-1]}; of several layers the middle one.</p>"
    return about + table(head, rows)


def _charts(one: Series) -> list[str]:
    """Return one or two charts of a statistic."""
    if len(one.layers) <= SINGLE:
        curves = [
            Curve(
                number=n, label=f"layer {layer}" if layer else one.name, points=one.layer(n), dots=len(one.values) < 40
            )
            for n, layer in enumerate(one.layers)
        ]
        return [curves_chart(one.name, curves, x_label="steps") + (_legend(curves) if len(curves) > 1 else "")]
    names = ("least layer", "middle", "largest layer")
    curves = [Curve(number=n, label=name, points=one.over(n)) for n, name in enumerate(names)]
    steps = list(one.values)
    chosen = sorted({steps[round(i * (len(steps) - 1) / (TIMES - 1))] for i in range(TIMES)})
    deep = [
        Curve(number=n, label=f"step {step}", points=[(float(i), y) for i, y in enumerate(one.values[step])])
        for n, step in enumerate(chosen)
    ]
    return [
        curves_chart(one.name, curves, x_label="steps") + _legend(curves),
        curves_chart(f"{one.name}, over the layers", deep, x_label="layers") + _legend(deep),
    ]


def _single(name: str, points: Sequence[Point]) -> str:
    return curves_chart(name, [Curve(number=0, label=name, points=points, dots=len(points) < 40)], x_label="steps")


def _legend(curves: Sequence[Curve]) -> str:
    parts = (f'<span style="margin-right:1.4em">{key(one)}{escape(one.label)}</span>' for one in curves)
    return f"<p>{''.join(parts)}</p>"


def _left(names: Mapping[str, object]) -> str:
    if len(names) <= SCALARS:
        return ""
    return f"<p class=sub>Not drawn: {escape(', '.join(list(names)[SCALARS:]))}</p>"


def _spread(row: Sequence[float]) -> tuple[float, float, float]:
    """Return the least, the median and the largest number; NaN for all if one of them is."""
    if any(math.isnan(value) for value in row):
        return (math.nan,) * 3
    return min(row), statistics.median(row), max(row)


def _at(one: Series, row: Sequence[float], value: float) -> str:
    if math.isnan(value):
        return _shown(value)
    return f"{_shown(value)} ({one.layers[list(row).index(value)]})"


def _shown(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "not finite"
