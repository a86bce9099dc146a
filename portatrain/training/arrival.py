"""Check that a run goes on from its own newest checkpoint, before an attempt begins and after the state is restored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from portatrain.backends import rounding
from portatrain.backends.base import Backend
from portatrain.checkpoint import fingerprints
from portatrain.checkpoint.format_layout import check_tensors
from portatrain.checkpoint.interop.hub_start import first_weights
from portatrain.checkpoint.interop.trusted_code import is_trusted
from portatrain.checkpoint.locations import location_of, newest_committed
from portatrain.checkpoint.newest import Reader
from portatrain.checkpoint.restore import restored
from portatrain.checkpoint.saver import check_newest
from portatrain.data import OpenData
from portatrain.recipe import Recipe
from portatrain.recipe.same import deciding_changes
from portatrain.runs import changes
from portatrain.runs.commits import check_not_missing
from portatrain.runs.run_dir import RunDir
from portatrain.training import continuity
from portatrain.training.continuity import Bounds


def check_before(run: RunDir, backend: Backend, recipe: Recipe, data: OpenData, *, accept_drift: bool) -> None:
    """Raise an error if the newest checkpoint is missing or is not of this run. Process 0 calls it; nothing is written.

    `accept_drift`: only a newer format, another step and another model are refused.
    """
    where, there = run.checkpoints(), run.looked_at()
    if not accept_drift:
        check_not_missing(there, location_of(where))
    begun = (there.path / "run.json").exists()
    asked = changes.wanted(there.path, run.where, recipe, there.committed) if begun else None
    data_now = continuity.fingerprints_of(data.train, data.validation)
    check_newest(
        where,
        backend.program,
        recipe,
        data_now,
        accept_drift=accept_drift,
        without=there.doubted(),
        changed=lambda meta: changes.pending(there.path, meta, recipe, asked=asked),
    )
    if recipe.init is not None and newest_committed(location_of(where)) is None:
        first_weights(recipe, backend.program)  # reports a folder of another model before anything is written


def arrive(
    backend: Backend,
    reader: Reader,
    recipe: Recipe,
    record: Callable[[Any], Mapping[str, Any]],
    *,
    positions: int,
    accept_drift: bool,
) -> tuple[Any, dict[str, Any], Bounds]:
    """Restore an open checkpoint and run the continuity check; return the state, the verdict and the bounds.

    `record` returns the record of a state, with a probe. `positions`: the tokens, or samples, of the next step.
    """
    check_tensors(reader, backend.program, axes=not accept_drift)
    definition = backend.program.definition
    state = restored(backend, reader)
    fields = [f"recipe.{name}" for name in deciding_changes(reader.meta, recipe, trusted=is_trusted)]
    if fingerprints.unknown_algorithm(reader.meta):
        fields.append("fingerprints.algorithm")  # a newer release wrote it; what cannot be compared is not equal
    changed, now = _changed(backend, state, reader.meta), record(state)
    bounds = Bounds.of(definition, recipe.precision, positions)
    error = rounding.step_error(definition, positions, recipe.precision)

    def again(seed: int) -> Mapping[str, Any]:
        nonlocal state
        state = None  # there may be memory for one state
        state = restored(backend, reader, rounding.moving(definition.params, error, seed))
        return record(state)

    found = judge(reader.meta, now, bounds, again, changed, fields)
    if "measured" in found:
        state = None
        state = restored(backend, reader)
    return state, found, bounds


def judge(
    meta: Mapping[str, Any],
    now: Mapping[str, Any],
    bounds: Bounds,
    again: Callable[[int], Mapping[str, Any]],
    changed: Sequence[str] | None = None,
    fields: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the verdict on a checkpoint with this `meta`; `now` is the record of its restored state.

    If only figures that pass through the model are beyond `bounds`, the model may be one that amplifies rounding. So
    its parameters are moved by as much as rounding moves the result of an operation: `again` does so with a seed, and
    returns a record. The differences that this makes raise the bounds. The state and the exact part have no part in it.
    """
    found = continuity.verdict(meta, now, bounds, changed, fields)
    if not continuity.rounding_may_explain(found):
        return found
    moved = [continuity.compare(now["probe"], again(seed)["probe"]) for seed in range(continuity.MEASURED_DRAWS)]
    return {**continuity.verdict(meta, now, bounds.raised(moved), changed, fields), "measured": True}


def _changed(backend: Backend, state: Any, meta: Mapping[str, Any]) -> list[str] | None:
    """Return the tensors of which a bit differs from its fingerprint in `meta`; None if none can be compared."""
    saved = fingerprints.saved_in(meta)
    if saved is None or not fingerprints.can_compare(backend):
        return None
    return fingerprints.compare(backend, state, saved)
