"""Curves over steps as inline SVG: one chart a figure, a coloured band an attempt, a line a resume point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from portatrain.system.svg import COLOURS, Point, Scale, columns, padded, short, ticks

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 1000, 210, 70, 14, 26, 22
VERDICTS = {
    "continuous": "#2a7d2a",
    "broken": "#c22",
    "unproven": "#b58900",
    "imported": "#268bd2",
    "changed": "#6c4ab6",
}


@dataclass(frozen=True, kw_only=True)
class Band:
    """Steps [first, last] of attempt `number`; `text` is shown when pointed at."""

    number: int
    first: int
    last: int
    text: str

    @property
    def colour(self) -> str:
        return COLOURS[(self.number - 1) % len(COLOURS)]


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A resume point after `step`."""

    step: int
    verdict: str
    text: str


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
    low, high = padded([c[1] for c in shown] + [c[3] for c in shown] + [y for _, y in dots])
    x = Scale(low=0, high=max(steps, 1), start=LEFT, end=WIDTH - RIGHT)
    y = Scale(low=low, high=high, start=HEIGHT - BOTTOM, end=TOP)

    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for band in bands:
        out.append(
            f'<rect x="{x(band.first - 1):.1f}" y="{TOP}" width="{max(1.0, x(band.last) - x(band.first - 1)):.1f}" '
            f'height="{HEIGHT - TOP - BOTTOM}" fill="{band.colour}" fill-opacity="0.13"><title>{escape(band.text)}'
            "</title></rect>"
        )
    for value in ticks(low, high, 4):
        out.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" class="grid"/>')
        out.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{short(value)}</text>')
    for step in ticks(0, steps, 10):
        out.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{short(step)}</text>')
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
