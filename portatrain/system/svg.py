"""Draw curves as SVG text, with scales, axes and lines, without any package."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from sys import float_info

POINTS = 600
"""The largest number of columns of a curve; if there are more steps, a column shows their mean and their range."""

COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#9d755d", "#eeca3b")

Point = tuple[float, float]

STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#555}text.title{font-weight:600;font-size:15px;fill:#222}"
    ".grid{stroke:#ddd;stroke-width:.7}.curve{fill:none;stroke-width:1.8}.raw{fill:none;stroke-width:.8;opacity:.35}"
)
"""The style of a picture in its own file; a report has another style."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Maps values from `low` to `high` to pixels from `start` to `end`, logarithmically if `log`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * ((value / 2 - low / 2) / (high / 2 - low / 2))

    def ticks(self, about: int) -> list[float]:
        """Return round numbers within the scale; on a logarithmic scale, 1, 2 and 5 times the powers of ten."""
        if not self.log:
            return ticks(self.low, self.high, about)
        least, most = (float_info.min_10_exp, float_info.max_10_exp - 1)
        powers = range(max(least, math.floor(math.log10(self.low))), min(most, math.ceil(math.log10(self.high))) + 1)
        few = [10.0**p for p in powers if self.low <= 10.0**p <= self.high]
        many = [m * 10.0**p for p in powers for m in (1, 2, 5) if self.low <= m * 10.0**p <= self.high]
        return few if len(few) >= 3 else many


def padded(values: Sequence[float]) -> tuple[float, float]:
    """Return the range of `values`, with a margin on both sides."""
    low, high = min(values), max(values)
    if high - low < 1e-12 * max(abs(high), 1e-300):
        return low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    pad = 0.04 * high - 0.04 * low
    return max(low - pad, -float_info.max), min(high + pad, float_info.max)


def frame(x: Scale, y: Scale, *, x_label: str, y_label: str, x_ticks: int = 8, y_ticks: int = 5) -> list[str]:
    """Return grid lines, tick labels and axis labels as SVG; `y.start` is the bottom edge."""
    out = []
    for value in y.ticks(y_ticks):
        at = y(value)
        out.append(f'<line x1="{x.start:.1f}" x2="{x.end:.1f}" y1="{at:.1f}" y2="{at:.1f}" class="grid"/>')
        out.append(f'<text x="{x.start - 6:.1f}" y="{at + 4:.1f}" text-anchor="end">{short(value)}</text>')
    for value in x.ticks(x_ticks):
        at = x(value)
        out.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y.start:.1f}" y2="{y.end:.1f}" class="grid"/>')
        if x_label:
            out.append(f'<text x="{at:.1f}" y="{y.start + 18:.1f}" text-anchor="middle">{short(value)}</text>')
    middle = (y.start + y.end) / 2
    out.append(
        f'<text x="16" y="{middle:.1f}" text-anchor="middle" transform="rotate(-90 16 {middle:.1f})">'
        f"{escape(y_label)}</text>"
    )
    if x_label:
        across = (x.start + x.end) / 2
        out.append(f'<text x="{across:.1f}" y="{y.start + 38:.1f}" text-anchor="middle">{escape(x_label)}</text>')
    return out


def polyline(points: Sequence[Point], x: Scale, y: Scale, *, colour: str, kind: str = "curve") -> str:
    """Return an SVG line through `points`."""
    line = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
    return f'<polyline points="{line}" class="{kind}" stroke="{colour}"/>'


def document(title: str, width: int, height: int, parts: Sequence[str]) -> str:
    """Return an SVG file with a white background and `title` at the top."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(title)}"><style>{STYLE}</style>'
        f'<rect width="{width}" height="{height}" fill="#fff"/>'
        f'<text x="{width / 2:.1f}" y="22" text-anchor="middle" class="title">{escape(title)}</text>'
        + "\n".join(parts)
        + "</svg>\n"
    )


def columns(points: Sequence[Point], most: int = POINTS) -> list[tuple[float, float, float, float]]:
    """Group neighbouring points into at most `most` columns; return (step, minimum, mean, maximum) of each."""
    n = -(-len(points) // most) if points else 1
    found = []
    for i in range(0, len(points), n):
        part = points[i : i + n]
        values = [v for _, v in part]
        found.append((sum(x for x, _ in part) / len(part), min(values), sum(values) / len(values), max(values)))
    return found


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return about `about` round numbers within [low, high]."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    step = 10.0 ** math.floor(math.log10(span / about))
    step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= about)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """Return `value` with four digits, and with k, M or G from ten thousand on."""
    if value and abs(value) >= 1e4:
        for bound, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= bound:
                return f"{value / bound:.4g}{letter}"
    return f"{value:.4g}"
