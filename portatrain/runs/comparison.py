"""Compare runs by their records: fields that differ, curves over four axes, and the sweeps among them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from portatrain.errors import UserError
from portatrain.runs.differing import differences
from portatrain.runs.history import History, read_history
from portatrain.runs.open import open_run
from portatrain.system import json_files

AXES = ("step", "tokens", "seconds", "usd")
"""What a curve can be drawn over. `seconds`: of the steps on the curve; `usd`: these seconds at list prices."""
NAMES = ("name",)
"""Fields that tell runs apart and decide nothing."""

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Price:
    """The price of what an attempt ran on, in USD an hour for all its chips, and where that is from."""

    usd_per_hour: float
    source: str


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One of the runs. `differs`: the fields that differ, dotted path -> value; `prices`: by attempt, where known."""

    label: str
    run: History
    differs: Mapping[str, str] = field(default_factory=dict)
    prices: Mapping[int, Price] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """The seconds of the steps on the curve."""
        return sum(_step_s(row) for row in self.run.curve)

    @property
    def usd(self) -> float | None:
        """The price of all attempts from their start to their last write; None if one has no known price."""
        used = [one for one in self.run.attempts if one.steps is not None]
        if not used or any(one.number not in self.prices for one in used):
            return None
        hours = {one.number: max(0.0, one.ended_unix_s - one.began_unix_s) / 3600 for one in used}
        return sum(hours[n] * self.prices[n].usd_per_hour for n in hours)

    def at(self, axis: str) -> dict[int, float]:
        """Return step -> value of the axis after that step; {} if the record or the price does not give it."""
        if axis == "step":
            return {row["step"]: float(row["step"]) for row in self.run.curve}
        if axis == "tokens":
            return {row["step"]: float(row["tokens"]) for row in self.run.curve if row.get("tokens") is not None}
        rates = [1.0 if axis == "seconds" else self._rate(row["attempt"]) for row in self.run.curve]
        if any(rate is None for rate in rates):
            return {}
        sums = itertools.accumulate(
            _step_s(row) * rate for row, rate in zip(self.run.curve, rates, strict=True) if rate is not None
        )
        return {row["step"]: total for row, total in zip(self.run.curve, sums, strict=True)}

    def curve(self, key: str, axis: str = "step") -> list[Point]:
        """Return (value of the axis, `key`) of every step on the curve that has both; `validation`: of evaluations."""
        where = self.at(axis)
        if key == "validation":
            found = {e["step"]: e["loss"] for e in self.run.evals if e.get("step") and e.get("loss") is not None}
            return [(where[step], found[step]) for step in sorted(found) if step in where]
        return [(where[r["step"]], r[key]) for r in self.run.curve if r.get(key) is not None and r["step"] in where]

    def loss_at(self, step: int | None) -> float | None:
        """Return the training loss of a step; None if its row is missing."""
        return next((row.get("loss") for row in reversed(self.run.curve) if row["step"] == step), None)

    def _rate(self, attempt: int) -> float | None:
        """Return USD a second; None if it is not known."""
        price = self.prices.get(attempt)
        return None if price is None else price.usd_per_hour / 3600


@dataclass(frozen=True, kw_only=True)
class Line:
    """Runs that differ in one field alone, in the order of its values. `fixed`: the values of the other fields."""

    fixed: Mapping[str, str]
    runs: Sequence[tuple[str, Compared]]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The runs among the compared ones that show what `field` does: a line for each setting of the other fields."""

    field: str
    lines: Sequence[Line]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Several runs, compared. common_step: the last step that all that have trained have reached; None if none has."""

    runs: Sequence[Compared]
    common_step: int | None
    sweeps: Sequence[Sweep]

    @property
    def fields(self) -> list[str]:
        """The fields that differ, in the order of the recipe."""
        return _varying(self.runs)

    @property
    def axes(self) -> list[str]:
        """The axes over which at least one run has a curve."""
        return [axis for axis in AXES if any(one.at(axis) for one in self.runs)]

    def result(self, one: Compared) -> float | None:
        """Return the number by which a sweep is judged: the loss of the newest evaluation if every run that has trained
        was evaluated, else the training loss at `common_step`. A loss that is not finite is the worst: infinity."""
        found = one.run.validation_loss if self.validated else one.loss_at(self.common_step)
        return math.inf if found is not None and not math.isfinite(found) else found

    @property
    def validated(self) -> bool:
        """True if `result` is the validation loss."""
        trained = [one for one in self.runs if one.run.curve]
        return bool(trained) and all(one.run.validation_loss is not None for one in trained)

    @property
    def judged_by(self) -> str:
        """What `result` is, in words."""
        return "validation loss" if self.validated else f"training loss at step {self.common_step}"

    @property
    def best(self) -> Compared | None:
        """The run with the smallest result; None if no run has one."""
        known = [(found, at) for at, one in enumerate(self.runs) if (found := self.result(one)) is not None]
        return self.runs[min(known)[1]] if known and min(known)[0] < math.inf else None

    def as_json(self) -> dict[str, Any]:
        """Return the output of `compare --json`, as strict JSON data."""
        best = self.best
        runs = [
            {
                **one.run.as_json(),
                "label": one.label,
                "differs": dict(one.differs),
                "loss_at_common_step": one.loss_at(self.common_step),
                "result": self.result(one),
                "tokens": one.run.curve[-1].get("tokens") if one.run.curve else None,
                "seconds": one.seconds,
                "usd": one.usd,
                "prices": {str(n): {"usd_per_hour": p.usd_per_hour, "source": p.source} for n, p in one.prices.items()},
            }
            for one in self.runs
        ]
        sweeps = [
            {
                "field": sweep.field,
                "lines": [
                    {"fixed": dict(line.fixed), "runs": [{"value": v, "run": one.label} for v, one in line.runs]}
                    for line in sweep.lines
                ],
            }
            for sweep in self.sweeps
        ]
        found: dict[str, Any] = json_files.strict(
            {
                "fields": self.fields,
                "common_step": self.common_step,
                "judged_by": self.judged_by,
                "best": None if best is None else best.label,
                "runs": runs,
                "sweeps": sweeps,
            }
        )
        return found


def compare(runs: Sequence[History], prices: Sequence[Mapping[int, Price]] = ()) -> Comparison:
    """Return the comparison of runs. `prices`: for each run, the prices of its attempts.

    Raises:
        UserError: fewer than two runs, or one of them twice.
    """
    if len(runs) < 2:
        raise UserError(
            "runs to compare",
            expected="at least two",
            got=", ".join(run.run for run in runs) or "none",
            do="Name several, or give only --runs DIR for all runs of a folder. `portatrain report` shows one.",
        )
    labels = _labels(runs)
    given = prices or [{} for _ in runs]
    fields = differences([run.recipe for run in runs])
    made = [
        Compared(label=label, run=run, differs=differs, prices=price)
        for label, run, differs, price in zip(labels, runs, fields, given, strict=True)
    ]
    reached = [one.run.step for one in made if one.run.curve]
    return Comparison(runs=made, common_step=min(reached, default=None), sweeps=sweeps(made))


def read(places: Sequence[str]) -> list[History]:
    """Return the histories of runs. Raises UserError if one is no run, or damaged."""
    return [read_history(open_run(place)) for place in places]


def sweeps(runs: Sequence[Compared]) -> list[Sweep]:
    """Return, for each field that differs, the groups of runs that differ in it and in nothing else."""
    found, varying = [], [name for name in _varying(runs) if name not in NAMES]
    for name in varying:
        others = [other for other in varying if other != name and not other.startswith(f"{name}.")]
        groups: dict[tuple[str | None, ...], list[tuple[str, Compared]]] = {}
        for one in runs:
            if name in one.differs:
                at = tuple(one.differs.get(other) for other in others)
                groups.setdefault(at, []).append((one.differs[name], one))
        lines = [
            Line(
                fixed={other: value for other, value in zip(others, at, strict=True) if value is not None},
                runs=sorted(group, key=lambda pair: _order(pair[0])),
            )
            for at, group in groups.items()
            if len({value for value, _ in group}) > 1
        ]
        if lines:
            found.append(Sweep(field=name, lines=lines))
    return found


def numeric(text: str) -> float | None:
    """Return the number that a value is; None for another value."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _order(text: str) -> tuple[bool, float, str]:
    value = numeric(text)
    return value is None, value or 0.0, text


def _varying(runs: Sequence[Compared]) -> list[str]:
    return list(dict.fromkeys(name for one in runs for name in one.differs))


def _labels(runs: Sequence[History]) -> list[str]:
    """Return the names of the runs; of runs with one name their places, which must differ."""
    names = [run.run for run in runs]
    labels = [run.where if names.count(run.run) > 1 else run.run for run in runs]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError("runs to compare", expected="different runs", got=f"{label} twice", do="Name it once.")
    return labels


def _step_s(row: Mapping[str, Any]) -> float:
    return float(row.get("step_s") or 0.0)
