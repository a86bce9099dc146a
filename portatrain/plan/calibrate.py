"""Fit efficiency factors to the user's own runs, to replace the factors from published runs.

The factors are stored in the user's config folder (``efficiency.json``), which `portatrain.plan.cost.efficiency.of`
reads first.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portatrain.errors import UserError
from portatrain.model.layout import Mesh
from portatrain.plan import recorded
from portatrain.plan.clusters.catalog import CHIPS
from portatrain.plan.cost import efficiency
from portatrain.recipe import Recipe
from portatrain.runs import rows
from portatrain.runs.run_dir import RunDir
from portatrain.system import json_files

LOW, HIGH = 0.005, 4.0


@dataclass(frozen=True, kw_only=True)
class Seen:
    """An attempt at a run: planned and measured seconds of a step, bytes at the peak, and the factor at which the
    plan would have been right; None if no factor makes it right."""

    where: str
    chip: str
    planned_s: float
    measured_s: float
    planned_bytes: float
    measured_bytes: float | None
    factor: float | None


@dataclass(frozen=True, kw_only=True)
class Change:
    """A chip's factor before and after, and the number of attempts behind it."""

    chip: str
    before: float
    before_from: str
    after: float
    attempts: int


def seen(run_dirs: Sequence[Path]) -> list[Seen]:
    """Return every attempt of the runs that was planned and that trained long enough to be measured.

    Raises:
      UserError: a folder that is no run directory, or none of the attempts can be used.
    """
    found: list[Seen] = []
    why: list[str] = []
    for folder in run_dirs:
        if not (folder / "run.json").is_file():
            raise UserError(
                f"--calibrate {folder}",
                expected="a run directory, with run.json in it",
                got="none",
                do="Name the folders that `portatrain train --run-dir` or `launch` made.",
            )
        run = RunDir(folder)
        recipe = run.recipe()
        for number in run.attempt_numbers():
            one = _attempt(run, recipe, number)
            if isinstance(one, Seen):
                found.append(one)
            else:
                why.append(f"{folder} attempt {number}: {one}")
    if not found:
        raise UserError(
            "--calibrate",
            expected="an attempt that was planned and took five steps or more",
            got="; ".join(why) or "no attempts",
            do="Train a little longer, on a chip of the catalog.",
        )
    return found


def fit(attempts: Sequence[Seen]) -> list[Change]:
    """Return the factor of every chip: the geometric mean over its attempts."""
    changes = []
    for chip in sorted({one.chip for one in attempts}):
        mine = [one.factor for one in attempts if one.chip == chip and one.factor is not None]
        if mine:
            before = efficiency.of(CHIPS[chip])
            after = float(f"{statistics.geometric_mean(mine):.4g}")
            changes.append(
                Change(chip=chip, before=before.value, before_from=before.basis, after=after, attempts=len(mine))
            )
    return changes


def keep(changes: Sequence[Change]) -> Path:
    """Write the factors to the user's config folder, beside the factors of other chips; return the file."""
    path = efficiency.own_file()
    known = json_files.read_object(path) if path.is_file() else {}
    known |= {one.chip: {"factor": one.after, "attempts": one.attempts} for one in changes}
    path.parent.mkdir(parents=True, exist_ok=True)
    json_files.write_json(path, known)
    return path


def _attempt(run: RunDir, recipe: Recipe, number: int) -> Seen | str:
    path = run.path / "attempts" / str(number) / "plan.json"
    if not path.is_file():
        return "no plan.json"
    plan = json_files.read_object(path)
    if not plan.get("planned"):
        return str(plan.get("why", "not planned"))
    try:
        step_s, total_bytes = _planned(plan)
    except ValueError as error:
        raise rows.damaged(path, error) from error
    measured = recorded.measured(run.rows(number, "metrics"))
    if measured is None:
        return "too few steps"
    mesh = Mesh.parse("" if plan["mesh"] == "1" else plan["mesh"])
    return Seen(
        where=f"{run.path.name}, attempt {number}",
        chip=plan["chip"],
        planned_s=step_s,
        measured_s=measured["step_s"],
        planned_bytes=total_bytes,
        measured_bytes=measured["memory_bytes"],
        factor=_factor(recipe, mesh, plan["device"], measured["step_s"]),
    )


def _planned(plan: Mapping[str, Any]) -> tuple[float, float]:
    """Return the planned seconds of a step and the bytes on a device; ValueError if plan.json is damaged."""
    made = plan.get("plan")
    if plan.get("chip") not in tuple(CHIPS) or not isinstance(made, dict):
        raise ValueError("no chip of the catalog, or no plan")
    if not isinstance(plan.get("mesh"), str) or not isinstance(plan.get("device"), str):
        raise ValueError("'mesh' or 'device' is no text")
    if not (step_s := rows.bounded(made.get("step_s"), "step_s", rows.LONGEST_S)):
        raise ValueError("'step_s' is 0")
    return step_s, rows.bounded(made.get("memory_total_bytes"), "memory_total_bytes", 1e30)


def _factor(recipe: Recipe, mesh: Mesh, device: str, measured_s: float) -> float | None:
    """Return the factor at which the planned time equals the measured one, to three digits."""

    def planned_s(value: float) -> float:
        return recorded.with_factor(recipe, mesh, device, value) or 0.0

    if planned_s(HIGH) > measured_s:  # memory or network alone take longer: the factor is not the cause
        return None
    low, high = LOW, HIGH
    while high / low > 1.0005:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if planned_s(middle) > measured_s else (low, middle)
    return (low * high) ** 0.5
