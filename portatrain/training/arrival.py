"""Check that a run goes on from its own newest checkpoint, before an attempt begins and after the state is restored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from portatrain.backends.base import Backend
from portatrain.checkpoint import fingerprints
from portatrain.checkpoint.format_layout import check_tensors
from portatrain.checkpoint.locations import location_of
from portatrain.checkpoint.newest import Reader
from portatrain.checkpoint.restore import restored
from portatrain.checkpoint.saver import check_newest
from portatrain.data import OpenData
from portatrain.recipe import Recipe
from portatrain.recipe.same import deciding_changes
from portatrain.runs.commits import check_not_missing
from portatrain.runs.run_dir import RunDir
from portatrain.training import continuity


def check_before(run: RunDir, backend: Backend, recipe: Recipe, data: OpenData, *, accept_drift: bool) -> None:
    """Raise an error if the newest checkpoint is missing or is not of this run. Process 0 calls it; nothing is written.

    `accept_drift`: only a newer format, another step and another model are refused.
    """
    where = run.checkpoints()
    if not accept_drift:
        check_not_missing(run.looked_at(), location_of(where))
    data_now = continuity.fingerprints_of(data.train, data.validation)
    check_newest(where, backend.program, recipe, data_now, accept_drift=accept_drift)


def arrive(
    backend: Backend, reader: Reader, recipe: Recipe, record: Callable[[Any], Mapping[str, Any]], *, accept_drift: bool
) -> tuple[Any, dict[str, Any]]:
    """Restore the state in `reader` and run the continuity check; return the state and the verdict.

    `record` returns the record of a state, with a probe.
    """
    check_tensors(reader, backend.program, axes=not accept_drift)
    state = restored(backend, reader)
    fields = [f"recipe.{name}" for name in deciding_changes(reader.meta, recipe)]
    changed = _changed(backend, state, reader.meta)
    return state, continuity.verdict(reader.meta, record(state), recipe.precision, changed, fields)


def _changed(backend: Backend, state: Any, meta: Mapping[str, Any]) -> list[str] | None:
    """Return the tensors of which a bit differs from its fingerprint in `meta`; None if none can be compared."""
    saved = fingerprints.saved_in(meta)
    if saved is None or not fingerprints.can_compare(backend):
        return None
    return fingerprints.compare(backend, state, saved)
