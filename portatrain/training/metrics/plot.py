"""The loss curve of a run as a picture."""

from __future__ import annotations

import itertools
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from portatrain.errors import UserError
from portatrain.runs.events import Kind
from portatrain.runs.run_dir import RunDir
from portatrain.system import json_files

LOSS_PNG = "loss.png"


def plot_run(run: RunDir) -> Path:
    """Draw loss, validation loss and learning rate of ``run`` into its loss.png.

    In bits per byte where the evaluations give them, else as they are. The ``references`` of its
    summary (label -> value in the same unit) are level lines, to compare with.

    Raises:
        UserError: matplotlib is missing, or the run has no step yet.
    """
    path = run.path / LOSS_PNG
    curve, evals = run.curve(), run.events(Kind.EVAL)
    unit, factor = _unit(evals)
    references = run.summary().get("references") or {}
    draw_curve(curve, evals, path, title=run.path.name, unit=unit, factor=factor, references=references)
    return path


def _unit(evals: Sequence[Mapping[str, Any]]) -> tuple[str, float]:
    """The unit of the loss axis, and what a loss is multiplied with to be in it."""
    for row in reversed(evals):
        bits = row.get("metrics", {}).get("bits_per_byte")
        if bits and row.get("loss") and math.isfinite(bits / row["loss"]):
            return "bits per byte", bits / row["loss"]
    return "loss", 1.0


def draw_curve(
    curve: Sequence[Mapping[str, Any]],
    evals: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    title: str,
    unit: str = "loss",
    factor: float = 1.0,
    references: Mapping[str, float],
) -> None:
    """Draw rows with step, loss, lr (``RunDir.curve``) and evaluations with step, loss as a PNG at ``path``.

    Losses are multiplied by ``factor``; ``references`` are in ``unit`` already.
    """
    try:
        # Not pyplot: it would choose a window system and keep global state.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "the loss curve", expected="matplotlib", got="no such package", do="pip install 'portatrain[plot]'"
        ) from None
    rows = [row for row in curve if math.isfinite(json_files.number(row.get("loss")))]
    if not rows:
        raise UserError(
            "the loss curve", expected="at least one step with a finite loss", got="none", do="Train first."
        )

    figure = Figure(figsize=(8, 5.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    steps, losses = [row["step"] for row in rows], [factor * row["loss"] for row in rows]
    top.plot(steps, losses, color="C0", alpha=0.3, linewidth=0.8)
    top.plot(steps, smooth(losses), color="C0", linewidth=1.6, label="training (smoothed)")
    shown = [row for row in evals if math.isfinite(json_files.number(row.get("loss")))]
    few = min((row.get("samples", 0) for row in shown), default=0)
    # Evaluations on the way see a part of the split, the last all of it: another set, so another mark.
    for style, label, of in (
        ("o-", "validation", [r for r in shown if r.get("samples", 0) == few]),
        ("D", "validation, whole split", [r for r in shown if r.get("samples", 0) != few]),
    ):
        if of:
            values = [factor * row["loss"] for row in of]
            top.plot([row["step"] for row in of], values, style, color="C1", markersize=4, label=label)
    levels = ((label, json_files.number(value)) for label, value in references.items())
    for index, (label, value) in enumerate(levels):
        top.axhline(value, color=f"C{2 + index}", linestyle="--", linewidth=1.2, label=f"{label}: {value:.3f}")
    top.set_ylabel(unit)
    top.set_title(title)
    top.grid(alpha=0.25)
    top.legend()
    bottom.plot([row["step"] for row in rows], [row.get("lr", math.nan) for row in rows], color="C3", linewidth=1.2)
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    bottom.grid(alpha=0.25)
    _save(figure, path)


def smooth(values: Sequence[float], *, reach: int | None = None) -> list[float]:
    """The mean over ``reach`` values to either side (a hundredth of all), fewer at both ends: without a lag."""
    reach = len(values) // 100 if reach is None else reach
    sums = [0.0, *itertools.accumulate(values)]
    result = []
    for index in range(len(values)):
        near = min(reach, index, len(values) - 1 - index)
        result.append((sums[index + near + 1] - sums[index - near]) / (2 * near + 1))
    return result


def _save(figure: Any, path: Path) -> None:
    handle, temporary = tempfile.mkstemp(prefix=".plot.", suffix=".png", dir=path.parent)
    os.close(handle)
    try:
        figure.savefig(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
