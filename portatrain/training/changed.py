"""Arrive at a checkpoint that was saved before the run was changed on purpose, and measure what the change alone did.

A change that leaves the past as it was is no difference to the continuity check: it is made under the recipe before it.
A change of the trajectory has a verdict of its own, 'changed': every tensor that it keeps has the bits that were saved,
and the exact part is equal in what the change leaves. The probe of the checkpoint is the one before the change, and the
probe of the same state under the new recipe is the one after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from portatrain.backends import rounding
from portatrain.backends.base import Backend
from portatrain.backends.state import COUNT
from portatrain.checkpoint import fingerprints
from portatrain.checkpoint.carry import Carry, carry
from portatrain.checkpoint.newest import Reader
from portatrain.checkpoint.restore import restored
from portatrain.data import OpenData
from portatrain.recipe import Recipe
from portatrain.recipe.changing import BATCH
from portatrain.runs import changes
from portatrain.runs.changes import Pending
from portatrain.runs.run_dir import RunDir
from portatrain.system import json_files
from portatrain.training import continuity
from portatrain.training.arrival import arrive
from portatrain.training.continuity import Bounds
from portatrain.training.open_data import data_of

LEFT_OUT: Mapping[str, tuple[str, ...]] = {
    "seed": ("rng.seed", "rng.word", "data.next_batch"),
    "data": ("data.fingerprint", "data.validation", "data.next_batch"),
    **dict.fromkeys((*BATCH, "leave_out"), ("data.next_batch",)),
    **dict.fromkeys(("steps", "schedule", "optimizer"), ("schedule.learning_rate",)),
}
"""Field of a recipe -> the fields of the exact part that another value of it changes."""


Record = Callable[[Any, Recipe, OpenData], Mapping[str, Any]]
"""Returns the record of a state under a recipe and its data, with a probe."""


def arrive_at(
    backend: Backend, reader: Reader, recipe: Recipe, data: OpenData, run: RunDir, record: Record, *, accept_drift: bool
) -> tuple[Any, dict[str, Any], Bounds | None, dict[str, Any] | None]:
    """Restore an open checkpoint of `run` to go on under `recipe`; return the state, the verdict, the bounds of the
    continuity check, and what a change of the trajectory did; None where there is none."""
    pending = changes.pending(run.looked_at().path, reader.meta, recipe)
    if pending is not None and pending.decides:
        state, found, did = arrive_changed(backend, reader, pending, lambda state: record(state, recipe, data))
        return state, found, None, did
    definition, then = backend.program.definition, recipe if pending is None else pending.before
    theirs = data if then.data == recipe.data else data_of(then, definition, run.data())
    samples = then.batch_at(int(reader.meta["step"]) + 1)
    state, found, bounds = arrive(
        backend,
        reader,
        then,
        lambda state: record(state, then, theirs),
        positions=rounding.positions_in(definition, theirs.train.batch(0, 1)) * samples,
        accept_drift=accept_drift,
    )
    return state, found, bounds, None


def arrive_changed(
    backend: Backend, reader: Reader, pending: Pending, record: Callable[[Any], Mapping[str, Any]]
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Restore an open checkpoint under a changed recipe; return the state, the verdict, and what the change did.

    `record` returns the record of a state under the new recipe, with a probe.
    """
    carried = carry(reader, backend.program, pending.before)
    state = restored(backend, reader, carried=carried)
    saved = fingerprints.saved_in(reader.meta)
    bits: list[str] | None = None
    if saved is not None and fingerprints.can_compare(backend):
        bits = [name for name in fingerprints.compare(backend, state, saved) if name in carried.kept]
    now = record(state)
    found = verdict(reader.meta, now, pending.fields, bits, fresh=COUNT in carried.fresh)
    return state, found, {"state": _became(carried, reader.meta), **effect(reader.meta.get("probe"), now["probe"])}


def _became(carried: Carry, meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return what became of the state, as JSON; with the slots of a surgery before it."""
    found, operated = carried.as_json(), meta.get(changes.SURGERY)
    if isinstance(operated, Mapping):
        there = operated.get("slots")
        slots = ", ".join(f"{n} {fate}" for fate, n in there.items()) if isinstance(there, Mapping) else "none"
        then = "" if found["optimizer"] == "kept" else f", then {found['optimizer']}"
        found |= {"optimizer": f"{slots} by surgery {operated.get('name')}{then}"}
    return found


def verdict(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    fields: Iterable[str],
    bits: list[str] | None,
    *,
    fresh: bool = False,
) -> dict[str, Any]:
    """Return the verdict on a state that was carried over a change of these dotted `fields`: 'changed' or 'broken'.

    `before`: a checkpoint's meta; `now`: a record. `bits`: the kept tensors of which a bit differs; None if none could
    be compared. `fresh`: the count of applied steps starts at 0.
    """
    names = {name.split(".")[0] for name in fields}
    left_out = {at for name in names for at in LEFT_OUT.get(name, ())} | ({"applied"} if fresh else set())
    differs = [name for name in continuity.exact_differences(before, now) if name not in left_out]
    return {
        "verdict": "broken" if differs or bits else "changed",
        "differs": differs,
        "failed": [],
        "fields": sorted(fields),
        "tensors": "not compared" if bits is None else bits or "equal",
    }


def effect(was: Mapping[str, Any] | None, now: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a change did to the next step: loss, gradient and update before it and after it, and the tensors that
    it changed most. `was`: the probe before it; None if the checkpoint has none."""
    found: dict[str, Any] = {"before": None if was is None else _totals(was), "after": _totals(now)}
    if was is not None:
        compared = continuity.compare(_in_both(was, now), now)
        found["largest"] = {k: [json_files.strict(v), at] for k, (v, at) in compared.items() if k != "state"}
    return found


def _in_both(was: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return the probe `was` with the norms alone that `now` has of as many layers: surgery makes and drops tensors."""

    def layers(norm: Any) -> tuple[int, ...]:
        return continuity.as_numbers(norm).shape

    there = now["norms"]
    norms = {k: v for k, v in was["norms"].items() if k in there and layers(v) == layers(there[k])}
    return {**was, "norms": norms}


def _totals(probe: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the mean loss of the probe's samples, and the 2-norms of the whole gradient and update."""
    losses, norms = continuity.as_numbers(probe["losses"]), probe["norms"]
    found: dict[str, float | None] = {"loss": float(losses.mean())}
    for kind in ("grad", "update"):
        squares = [float((continuity.as_numbers(v) ** 2).sum()) for k, v in norms.items() if k.startswith(f"{kind}/")]
        found[f"{kind}_norm"] = math.sqrt(math.fsum(squares)) if squares else None
    return json_files.strict(found)
