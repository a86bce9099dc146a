"""The loss curve of a run as a picture, an SVG file that needs no package to write and any browser to see."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from portatrain.errors import UserError
from portatrain.runs.events import Kind
from portatrain.runs.run_dir import RunDir, merge
from portatrain.system import json_files
from portatrain.system.svg import COLOURS, Point, Scale, columns, document, frame, padded, polyline

LOSS_SVG = "loss.svg"
MOST_BYTES = 32 * 2**20
"""The bytes of metrics.jsonl that are drawn at most: about 80,000 steps."""
WIDTH, HEIGHT = 960, 640
TRAINING, VALIDATION, RATE = COLOURS[0], COLOURS[1], COLOURS[4]
REFERENCES = (COLOURS[2], COLOURS[3], COLOURS[6])


def plot_run(run: RunDir) -> Path:
    """Draw loss, validation loss and learning rate of `run` into its loss.svg; return the path of the file.

    The losses are in bits per byte if the evaluations give them, else as they are. The `references` of its summary
    (label -> value in the same unit) are level lines to compare with.

    Raises:
        UserError: the run has no step yet.
    """
    curve, evals = _curve(run), run.events(Kind.EVAL)
    unit, factor = _unit(evals)
    references = run.summary().get("references") or {}
    title = run.where.rstrip("/").rpartition("/")[2]
    run.put_text(LOSS_SVG, loss_curve(curve, evals, title=title, unit=unit, factor=factor, references=references))
    return run.path / LOSS_SVG


def draw(run: RunDir) -> None:
    """Draw the curve if there is one. A picture that cannot be written is said and ends nothing."""
    try:
        if any(path.stat().st_size for path in _files(run).values()):
            plot_run(run)
    except (UserError, OSError) as error:
        print(f"no loss curve: {error}", file=sys.stderr)


def _files(run: RunDir) -> dict[int, Path]:
    """The metrics of every attempt that has some."""
    found = {n: run.path / "attempts" / str(n) / "metrics.jsonl" for n in run.attempt_numbers()}
    return {n: path for n, path in found.items() if path.exists()}


def _curve(run: RunDir) -> list[dict[str, Any]]:
    """Return `run.curve()`. If the metrics exceed `MOST_BYTES`, return only every n-th step, because millions of rows
    fit neither a picture nor the memory of a host that trains."""
    files = _files(run)
    every = -(-sum(path.stat().st_size for path in files.values()) // MOST_BYTES)
    if every <= 1:
        return run.curve()
    attempts: dict[int, list[dict[str, Any]]] = {}
    for number, path in files.items():
        with path.open("rb") as lines:
            rows = (_row(line) for index, line in enumerate(lines) if index % every == 0)
            attempts[number] = [{key: row.get(key) for key in ("step", "loss", "lr")} for row in rows if row]
    return merge(attempts)


def _row(line: bytes) -> dict[str, Any]:
    """A line of metrics.jsonl; empty for one that a crash cut short."""
    try:
        return dict(json_files.loads(line))
    except (ValueError, TypeError):
        return {}


def _unit(evals: Sequence[Mapping[str, Any]]) -> tuple[str, float]:
    """Return the unit of the loss axis, and the factor that converts a loss to it."""
    for row in reversed(evals):
        bits = row.get("metrics", {}).get("bits_per_byte")
        if bits and row.get("loss") and math.isfinite(bits / row["loss"]):
            return "bits per byte", bits / row["loss"]
    return "loss", 1.0


def loss_curve(
    curve: Sequence[Mapping[str, Any]],
    evals: Sequence[Mapping[str, Any]],
    *,
    title: str,
    unit: str = "loss",
    factor: float = 1.0,
    references: Mapping[str, float],
) -> str:
    """Return an SVG of rows with step, loss, lr (`RunDir.curve`) and of evaluations with step, loss.

    Losses are multiplied by `factor`; `references` are in `unit` already.
    """
    rows = [row for row in curve if _finite(row.get("loss"))]
    if not rows:
        raise UserError(
            "the loss curve", expected="at least one step with a finite loss", got="none", do="Train first."
        )
    raw = [(float(row["step"]), factor * row["loss"]) for row in rows]
    mean = list(zip([step for step, _ in raw], smooth([loss for _, loss in raw]), strict=True))
    shown = [row for row in evals if _finite(row.get("loss"))]
    few = min((row.get("samples", 0) for row in shown), default=0)
    dots = [(float(row["step"]), factor * row["loss"]) for row in shown if row.get("samples", 0) == few]
    # Evaluations on the way see a part of the split, the last one may see all of it: another set, so another mark.
    whole = [(float(row["step"]), factor * row["loss"]) for row in shown if row.get("samples", 0) != few]
    rates = [(float(row["step"]), row["lr"]) for row in rows if _finite(row.get("lr"))]

    low, high = padded([loss for _, loss in [*raw, *dots, *whole]] + [v for v in references.values() if _finite(v)])
    x = Scale(low=0, high=max(raw[-1][0], 1), start=80, end=WIDTH - 20)
    y = Scale(low=low, high=high, start=450, end=40)
    parts = frame(x, y, x_label="", y_label=unit)
    parts.append(polyline(_drawn(raw), x, y, colour=TRAINING, kind="raw"))
    parts.append(polyline(_drawn(mean), x, y, colour=TRAINING))
    legend = [(TRAINING, "", "training (smoothed)")]
    if dots:
        parts.append(polyline(dots, x, y, colour=VALIDATION))
        parts += [_mark(x(step), y(loss), round_=True, text=f"step {step:g}: {loss:.4g}") for step, loss in dots]
        legend.append((VALIDATION, "", "validation"))
    if whole:
        parts += [_mark(x(step), y(loss), round_=False, text=f"step {step:g}: {loss:.4g}") for step, loss in whole]
        legend.append((VALIDATION, "diamond", "validation, whole split"))
    for (label, value), colour in zip(references.items(), itertools.cycle(REFERENCES), strict=False):
        if _finite(value):
            parts.append(
                f'<line x1="{x.start:.1f}" x2="{x.end:.1f}" y1="{y(value):.1f}" y2="{y(value):.1f}" '
                f'stroke="{colour}" stroke-width="1.4" stroke-dasharray="6 4" class="reference"/>'
            )
            legend.append((colour, "dashed", f"{label}: {value:.3f}"))
    parts += _legend(legend)
    if rates:
        low, high = padded([rate for _, rate in rates])
        under = Scale(low=min(low, 0.0), high=high, start=580, end=480)
        parts += frame(x, under, x_label="step", y_label="learning rate", y_ticks=3)
        parts.append(polyline(_drawn(rates), x, under, colour=RATE))
    return document(title, WIDTH, HEIGHT, parts)


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _drawn(points: Sequence[Point]) -> list[Point]:
    """At most as many points as there are pixels."""
    return [(step, middle) for step, _, middle, _ in columns(points)]


def _mark(x: float, y: float, *, round_: bool, text: str) -> str:
    title = f"<title>{escape(text)}</title>"
    if round_:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{VALIDATION}">{title}</circle>'
    return f'<path d="M {x:.1f} {y - 7:.1f} l 6 7 l -6 7 l -6 -7 z" fill="{VALIDATION}" class="whole">{title}</path>'


def _legend(entries: Sequence[tuple[str, str, str]]) -> list[str]:
    """(colour, kind of mark, label) of every line, in the upper right corner."""
    width = 52 + 6.4 * max(len(label) for _, _, label in entries)
    left, top = WIDTH - 30 - width, 48
    height = 12 + 20 * len(entries)
    out = [
        f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{height}" fill="#fff" fill-opacity=".85" '
        'stroke="#ccc"/>'
    ]
    for row, (colour, kind, label) in enumerate(entries):
        at = top + 16 + 20 * row
        if kind == "diamond":
            out.append(f'<path d="M {left + 20:.1f} {at - 6} l 5 6 l -5 6 l -5 -6 z" fill="{colour}"/>')
        else:
            dash = ' stroke-dasharray="6 4"' if kind == "dashed" else ""
            out.append(
                f'<line x1="{left + 8:.1f}" x2="{left + 32:.1f}" y1="{at}" y2="{at}" stroke="{colour}" '
                f'stroke-width="2"{dash}/>'
            )
        out.append(f'<text x="{left + 40:.1f}" y="{at + 4}">{escape(label)}</text>')
    return out


def smooth(values: Sequence[float], *, reach: int | None = None) -> list[float]:
    """The mean over ``reach`` values to either side (a hundredth of all), fewer at both ends: without a lag."""
    reach = len(values) // 100 if reach is None else reach
    sums = [0.0, *itertools.accumulate(values)]
    result = []
    for index in range(len(values)):
        near = min(reach, index, len(values) - 1 - index)
        result.append((sums[index + near + 1] - sums[index - near]) / (2 * near + 1))
    return result
