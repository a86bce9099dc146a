"""Several curves on one chart, as inline SVG: of runs over steps, tokens, seconds, USD, and of sweeps over a field."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from portatrain.system.svg import COLOURS, Point, Scale, columns, frame, padded

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 1000, 300, 76, 14, 26, 46
MOST = 300
"""The largest number of points of a curve; neighbouring steps are drawn as their mean."""
WIDE = 20.0
"""Values whose largest is more than this multiple of the smallest are drawn on a logarithmic scale."""
DASHES = ("", "7 4", "2 3", "9 3 2 3")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The points of the run (or line of a sweep) number `number`, from 0; dots: mark each of its points."""

    number: int
    label: str
    points: Sequence[Point]
    dots: bool = False

    @property
    def colour(self) -> str:
        return COLOURS[self.number % len(COLOURS)]

    @property
    def dash(self) -> str:
        return DASHES[self.number // len(COLOURS) % len(DASHES)]


def curves_chart(title: str, curves: Sequence[Curve], *, x_label: str, log_x: bool = False) -> str:
    """Return an SVG of the curves. Values that are not finite are left out.

    The scale of y holds all values, unless the first tenth of each curve would take more than half of the height:
    then it holds the curves from there on, and what lies outside is cut off at the edge.
    """
    shown = [(one, _finite(one.points)) for one in curves]
    shown = [(one, points) for one, points in shown if points]
    if not shown:
        return f'<figure><figcaption>{escape(title)}</figcaption><p class="none">nothing recorded</p></figure>'
    drawn = [(one, [(c[0], c[2]) for c in columns(points, MOST)]) for one, points in shown]
    held = _held([[y for _, y in points] for _, points in drawn])
    low, high = padded(held)
    log = min(held) > 0 and max(held) > WIDE * min(held)
    if log:
        low, high = min(held) / 1.1, max(held) * 1.1
    left, right = (f(x for _, points in shown for x, _ in points) for f in (min, max))
    if log_x:
        left, right = left / 1.15, right * 1.15
    elif all(one.dots for one, _ in drawn) or left == right:
        left, right = padded([left, right])
    else:
        left = min(0.0, left)
    x = Scale(low=left, high=right, start=LEFT, end=WIDTH - RIGHT, log=log_x)
    y = Scale(low=low, high=high, start=HEIGHT - BOTTOM, end=TOP, log=log)
    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    out += frame(x, y, x_label=x_label, y_label="")
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    # A picture within the picture cuts off what lies outside of it.
    box = f'x="{LEFT}" y="{TOP}" width="{width}" height="{height}" viewBox="{LEFT} {TOP} {width} {height}"'
    out.append(f"<svg {box}>")
    for one, points in drawn:
        at = [(x(a), y(max(b, low / 2) if log else b)) for a, b in points]
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in at)
        dash = f' stroke-dasharray="{one.dash}"' if one.dash else ""
        out.append(
            f'<polyline points="{line}" class="line" stroke="{one.colour}"{dash}><title>{escape(one.label)}</title>'
            "</polyline>"
        )
        if one.dots or len(at) == 1:
            out += [
                f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="{one.colour}"><title>{escape(one.label)}: '
                f"{value:.5g} at {where:.6g}</title></circle>"
                for (a, b), (where, value) in zip(at, points, strict=True)
            ]
    out.append("</svg>")
    scale = ", logarithmic" if log else ""
    out.append(f'<text x="{LEFT}" y="14" class="title">{escape(title)}{scale}</text></svg>')
    return "".join(out)


def key(curve: Curve) -> str:
    """Return the sample of a curve's line for a legend."""
    dash = f' stroke-dasharray="{curve.dash}"' if curve.dash else ""
    return (
        f'<svg class="sample" viewBox="0 0 26 8"><line x1="0" x2="26" y1="4" y2="4" stroke="{curve.colour}" '
        f'stroke-width="3"{dash}/></svg>'
    )


def _held(curves: Sequence[Sequence[float]]) -> list[float]:
    """Return the values that the scale of y must hold."""
    values = [y for curve in curves for y in curve]
    tails = [y for curve in curves for y in curve[len(curve) // 10 :]]
    return values if max(values) - min(values) <= 2 * (max(tails) - min(tails)) else tails


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
