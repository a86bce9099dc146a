"""Curves over steps as inline SVG: one chart a figure, a coloured band an attempt, a line a resume point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 1000, 210, 70, 14, 26, 22
POINTS = 600
"""Columns of a curve, at most: of more steps each column is a mean, with the range behind it."""
BANDS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#9d755d", "#eeca3b")
VERDICTS = {"continuous": "#2a7d2a", "broken": "#c22", "unproven": "#b58900", "imported": "#268bd2"}

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Band:
    """Steps [first, last] of attempt `number`; `text` is shown when pointed at."""

    number: int
    first: int
    last: int
    text: str

    @property
    def colour(self) -> str:
        return BANDS[(self.number - 1) % len(BANDS)]


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A resume point after `step`."""

    step: int
    verdict: str
    text: str


def columns(points: Sequence[Point], most: int = POINTS) -> list[tuple[float, float, float, float]]:
    """(step, least, mean, greatest) of at most `most` runs of neighbouring points."""
    n = -(-len(points) // most) if points else 1
    found = []
    for i in range(0, len(points), n):
        part = points[i : i + n]
        values = [v for _, v in part]
        found.append((sum(x for x, _ in part) / len(part), min(values), sum(values) / len(values), max(values)))
    return found


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers within [low, high]."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    step = 10.0 ** math.floor(math.log10(span / about))
    step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= about)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def chart(
    title: str,
    points: Sequence[Point],
    *,
    steps: int,
    bands: Sequence[Band],
    marks: Sequence[Mark],
    dots: Sequence[Point] = (),
    dots_are: str = "",
) -> str:
    """An SVG of `points` (step, value) over steps 0 to `steps`. Values that are not finite are left out."""
    points = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    dots = [(x, y) for x, y in dots if y is not None and math.isfinite(y)]
    if not points:
        return f'<figure><figcaption>{escape(title)}</figcaption><p class="none">nothing recorded</p></figure>'
    shown = columns(points)
    low = min([c[1] for c in shown] + [y for _, y in dots])
    high = max([c[3] for c in shown] + [y for _, y in dots])
    if high - low < 1e-12 * max(abs(high), 1e-300):
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    pad = 0.04 * (high - low)
    low, high = low - pad, high + pad

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / max(steps, 1)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for band in bands:
        out.append(
            f'<rect x="{x(band.first - 1):.1f}" y="{TOP}" width="{max(1.0, x(band.last) - x(band.first - 1)):.1f}" '
            f'height="{HEIGHT - TOP - BOTTOM}" fill="{band.colour}" fill-opacity="0.13"><title>{escape(band.text)}'
            "</title></rect>"
        )
    for value in ticks(low, high, 4):
        out.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" class="grid"/>')
        out.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{_short(value)}</text>')
    for step in ticks(0, steps, 10):
        out.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{_short(step)}</text>')
    if len(points) > len(shown):
        edge = [f"{x(c[0]):.1f},{y(c[3]):.1f}" for c in shown] + [f"{x(c[0]):.1f},{y(c[1]):.1f}" for c in shown[::-1]]
        out.append(f'<polygon points="{" ".join(edge)}" class="range"/>')
    line = " ".join(f"{x(c[0]):.1f},{y(c[2]):.1f}" for c in shown)
    out.append(f'<polyline points="{line}" class="curve"/>')
    for step, value in dots:
        out.append(
            f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="3" class="dot"><title>{escape(dots_are)} at step '
            f"{step:g}: {value:.5g}</title></circle>"
        )
    for mark in marks:
        at, colour = x(mark.step), VERDICTS.get(mark.verdict, "#555")
        out.append(
            f'<g><title>{escape(mark.text)}</title><line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP - 4}" '
            f'y2="{HEIGHT - BOTTOM}" stroke="{colour}" stroke-dasharray="4 3"/><path d="M {at - 5:.1f} {TOP - 12} h 10 '
            f'l -5 8 z" fill="{colour}"/></g>'
        )
    out.append(f'<text x="{LEFT}" y="14" class="title">{escape(title)}</text></svg>')
    return "".join(out)


def _short(value: float) -> str:
    if value and abs(value) >= 1e4:
        for bound, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= bound:
                return f"{value / bound:.4g}{letter}"
    return f"{value:.4g}"
