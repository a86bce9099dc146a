"""Compare the records of two runs: recipes, packages, curves, and the probes of checkpoints of the same step.

A loss or a norm may differ by what rounding makes of it (`continuity.Bounds`), which grows with the square root of the
steps if errors are independent from step to step. Training amplifies them, so a difference that appears late may still
be rounding: only a replay decides. Learning rates, positions in the data and hashes of batches must be equal.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from portatrain.checkpoint.errors import explained
from portatrain.checkpoint.locations import location_of
from portatrain.checkpoint.newest import Reader
from portatrain.errors import UserError
from portatrain.model.module import Definition
from portatrain.recipe import Recipe
from portatrain.recipe.same import changed_fields
from portatrain.runs import rows
from portatrain.runs.run_dir import RunDir
from portatrain.system import json_files
from portatrain.training import continuity
from portatrain.training.continuity import Bounds

SETTINGS = ("backend", "mesh", "device", "devices", "framework", "python", "host", "data", "code_sha256")
EXACT = ("lr", "tokens", "skipped")
"""Columns of metrics.jsonl that no rounding touches."""


@dataclass(frozen=True, kw_only=True)
class Sign:
    """A difference that rounding does not explain. values: of both runs. difference: relative to the first value; None
    if the values must be equal. saved: it is in the checkpoint of that step, and otherwise in the curve."""

    step: int
    what: str
    values: tuple[Any, Any]
    difference: float | None = None
    bound: float = 0.0
    saved: bool = False

    def __str__(self) -> str:
        text = f"step {self.step}, {self.what}: {_shown(self.values[0])} and {_shown(self.values[1])}"
        return text + ("" if self.difference is None else f", apart {self.difference:.2g}, bound {self.bound:.2g}")


@dataclass(frozen=True, kw_only=True)
class Records:
    """What the records of two runs say.

    Attributes:
        fields: dotted field of the recipe -> both values, in force at the first sign or at the last common step.
        settings, packages: name -> both values, of the attempts that trained that step.
        steps: the first and the last step that both curves have.
        checkpoints: the steps of committed checkpoints that both have.
        signs: the differences, the first step first; of one step the most exact first.
    """

    names: tuple[str, str]
    fields: Mapping[str, tuple[Any, Any]]
    settings: Mapping[str, tuple[Any, Any]]
    packages: Mapping[str, tuple[Any, Any]]
    steps: tuple[int, int]
    checkpoints: Sequence[int]
    signs: Sequence[Sign]
    notes: Sequence[str] = field(default_factory=list)

    @property
    def first(self) -> Sign | None:
        return self.signs[0] if self.signs else None

    def as_json(self) -> dict[str, Any]:
        """Return the comparison as plain data."""
        pairs = {name: {k: list(v) for k, v in getattr(self, name).items()} for name in ("fields", "settings")}
        return json_files.strict(
            {
                "runs": list(self.names),
                "recipe": pairs["fields"],
                "settings": pairs["settings"],
                "packages": {k: list(v) for k, v in self.packages.items()},
                "steps": list(self.steps),
                "checkpoints": list(self.checkpoints),
                "first": None if self.first is None else vars(self.first),
                "signs": [vars(sign) for sign in self.signs],
                "notes": list(self.notes),
            }
        )


def compare_records(runs: tuple[RunDir, RunDir], recipes: tuple[Recipe, Recipe]) -> Records:
    """Return what the records of two runs say. `recipes`: those that they have now.

    Raises:
        UserError: the runs train different models, or have no step in common.
    """
    names = names_of(runs)
    definitions = (recipes[0].describe(), recipes[1].describe())
    check_models(names, definitions)
    curves = tuple({row["step"]: row for row in run.curve()} for run in runs)
    common = sorted(curves[0].keys() & curves[1].keys())
    if not common:
        raise _no_step(names, curves)
    bounds = [_bounds(recipe, definition) for recipe, definition in zip(recipes, definitions, strict=True)]
    signs = list(_of_curves(curves, common, bounds))
    shared = common_checkpoints(runs)
    metas = [(_meta(runs[0], step), _meta(runs[1], step)) for step in shared]
    signs += [sign for step, pair in zip(shared, metas, strict=True) for sign in _of_checkpoint(step, pair, bounds)]
    signs.sort(key=lambda sign: (sign.step, sign.difference is not None))
    at = signs[0].step if signs else common[-1]
    about = [_attempt_of(run, curve, at) for run, curve in zip(runs, curves, strict=True)]
    packages = [one.get("packages") or {} for one in about]
    notes = []
    if not any(a.get("probe") and b.get("probe") for a, b in metas):
        notes.append(
            "no step has a probe in both runs, so records name no tensor: train with probe_every=1 and the same "
            "checkpoint_every, and keep checkpoints with checkpoint_keep_every"
        )
    if not all(packages):
        notes.append("a run was trained before versions of packages were recorded; only its framework is known")
    return Records(
        names=names,
        fields=changed_fields(recipes[0].to_json(), recipes[1]),
        settings=_pairs(about, [name for name in SETTINGS if any(name in one for one in about)]),
        packages=_pairs(packages, sorted(packages[0].keys() & packages[1].keys())),
        steps=(common[0], common[-1]),
        checkpoints=shared,
        signs=signs,
        notes=notes,
    )


def not_reproduced(
    names: tuple[str, str],
    curves: Sequence[Sequence[Mapping[str, Any]]],
    recipes: tuple[Recipe, Recipe],
    replayed: Sequence[tuple[int, tuple[float, float]]],
) -> str:
    """Return a sentence on the first recorded loss that a replay does not give again; '' if it gives all of them.

    `replayed`: (step, losses of both runs) of each step that was replayed here.
    """
    recorded = [{row["step"]: json_files.number(row.get("loss")) for row in curve} for curve in curves]
    bounds = [_bounds(recipe, recipe.describe()).replay for recipe in recipes]
    for step, losses in replayed:
        for name, curve, loss, bound in zip(names, recorded, losses, bounds, strict=True):
            was = curve.get(step)
            if was is None or was == loss or (math.isnan(was) and math.isnan(loss)):
                continue
            if not abs(was - loss) <= bound * max(abs(was), 1e-30):
                return (
                    f"a defect outside of the recipe: {name} recorded the loss {was:.8g} at step {step}, and its "
                    f"recipe gives {loss:.8g} here, so the machine, the packages or the code of that attempt is wrong"
                )
    return ""


def names_of(runs: tuple[RunDir, RunDir]) -> tuple[str, str]:
    """Return the names of two runs; their places if the names are the same."""
    a, b = runs
    return (a.path.name, b.path.name) if a.path.name != b.path.name else (str(a.where), str(b.where))


def check_models(names: tuple[str, str], definitions: tuple[Definition, Definition]) -> None:
    """Raise UserError unless two models have the same parameters, each with its shape."""
    a, b = ({n: t.shape for n, t in d.params.items()} for d in definitions)
    other = [n for n in (*a, *(n for n in b if n not in a)) if a.get(n) != b.get(n)]
    if other:
        shown = ", ".join(f"{n} ({_shape(a.get(n))} and {_shape(b.get(n))})" for n in other[:3])
        raise UserError(
            f"{names[0]} and {names[1]}",
            expected="two runs of one model, with the same parameters",
            got=f"different models: {shown}{f' and {len(other) - 3} more' if len(other) > 3 else ''}",
            do="Compare two runs of one model; `portatrain show` lists the parameters of a recipe.",
        )


def common_checkpoints(runs: tuple[RunDir, RunDir]) -> list[int]:
    """Return the steps of committed checkpoints that both runs have."""
    found = []
    for run in runs:
        with explained():
            location = location_of(run.checkpoints())
            found.append({step for step in location.steps() if location.committed(step)})
    return sorted(found[0] & found[1])


def _of_curves(
    curves: Sequence[Mapping[int, Mapping[str, Any]]], common: Sequence[int], bounds: Sequence[Bounds]
) -> Iterator[Sign]:
    """Yield the first sign of every column."""
    for column in EXACT:
        for step in common:
            a, b = (curve[step].get(column) for curve in curves)
            if a is not None and b is not None and a != b:
                yield Sign(step=step, what=f"column {column}", values=(a, b))
                break
    for column, name in (("loss", "replay"), ("grad_norm", "grad")):
        for step in common:
            a, b = (json_files.number(curve[step].get(column)) for curve in curves)
            # `replay` gathers the errors of REPLAY_STEPS steps; `grad` is of one.
            per_step = max(getattr(one, name) for one in bounds)
            per_step /= math.sqrt(continuity.REPLAY_STEPS) if name == "replay" else 1.0
            allowed = per_step * math.sqrt(step)
            apart = 0.0 if a == b or (math.isnan(a) and math.isnan(b)) else abs(a - b) / max(abs(a), 1e-30)
            if not apart <= allowed:
                words = "the loss" if column == "loss" else "the norm of the gradient"
                yield Sign(step=step, what=words, values=(a, b), difference=apart, bound=allowed)
                break


def _of_checkpoint(step: int, pair: tuple[Mapping, Mapping], bounds: Sequence[Bounds]) -> Iterator[Sign]:
    """Yield what the records in two checkpoints of one step have otherwise."""
    a, b = pair
    for name in continuity.exact_differences(a, b):
        values: list[Any] = []
        for meta in pair:
            value: Any = meta
            for part in name.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
            values.append(value)
        yield Sign(step=step, what=f"{name} in the checkpoint", values=(values[0], values[1]), saved=True)
    if not a.get("probe") or not b.get("probe"):
        return
    for kind, (apart, where) in continuity.compare(a["probe"], b["probe"]).items():
        # A state is the sum of the updates of all steps.
        allowed = max(getattr(one, "update" if kind == "state" else kind) for one in bounds) * math.sqrt(step)
        if not apart <= allowed:
            mine, theirs = (_norm(meta["probe"], kind, where) for meta in pair)
            layer = ""
            if mine.shape and mine.shape == theirs.shape:
                at = int(np.argmax(np.abs(mine - theirs) / np.maximum(np.abs(mine), 1e-30)))
                mine, theirs, layer = mine.flat[at], theirs.flat[at], f", layer {at}"
            values = [float(x) if np.ndim(x) == 0 else str(x) for x in (mine, theirs)]
            yield Sign(
                step=step,
                what=f"{_WORDS[kind]}, {where}{layer}",
                values=(values[0], values[1]),
                difference=apart,
                bound=allowed,
                saved=True,
            )


_WORDS = {
    "loss": "the probe's loss",
    "mean": "the probe's mean loss",
    "state": "the norm of a tensor",
    "grad": "the norm of the next step's gradient",
    "update": "the norm of the next step's update",
}


def _norm(probe: Mapping[str, Any], kind: str, where: str) -> np.ndarray:
    if kind in ("loss", "mean"):
        losses = continuity.as_numbers(probe["losses"])
        number = where.rpartition(" ")[2]
        return np.asarray(losses[int(number)] if number.isdigit() else losses.mean())
    return continuity.as_numbers(probe["norms"].get(where))


def _bounds(recipe: Recipe, definition: Definition) -> Bounds:
    return Bounds.of(definition, recipe.precision, recipe.batch * (recipe.data.tokens_per_sample() or 1))


def _meta(run: RunDir, step: int) -> Mapping[str, Any]:
    with explained(), contextlib.closing(location_of(run.checkpoints()).open(step)) as store:
        return Reader(store).meta


def _attempt_of(run: RunDir, curve: Mapping[int, Mapping[str, Any]], step: int) -> dict[str, Any]:
    """Return attempt.json of the attempt that trained `step`, or the one after it."""
    at = min((s for s in curve if s >= step), default=max(curve))
    return rows.attempt_info(run.path / "attempts" / str(curve[at]["attempt"]) / "attempt.json")


def _pairs(about: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    found = {name: (about[0].get(name), about[1].get(name)) for name in names}
    return {name: pair for name, pair in found.items() if pair[0] != pair[1]}


def _no_step(names: tuple[str, str], curves: Sequence[Mapping[int, Any]]) -> UserError:
    spans = [f"steps {min(c)} to {max(c)}" if c else "no recorded step" for c in curves]
    return UserError(
        f"{names[0]} and {names[1]}",
        expected="runs with a step in common",
        got=f"{spans[0]} in {names[0]}, {spans[1]} in {names[1]}",
        do="Train one of them further, or fork both from one checkpoint: portatrain fork RUN --at STEP --run NEW.",
    )


def _shape(shape: Sequence[int] | None) -> str:
    return "none" if shape is None else str(list(shape))


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.8g}"
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
