"""Say which checkpoint a run must have according to its record, so that a missing one is not taken for a new run."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from portatrain.checkpoint.locations import FolderLocation, Location, newest_committed
from portatrain.errors import StorageError, UserError
from portatrain.runs.events import Kind
from portatrain.runs.run_dir import RunDir

AT_STEP = (Kind.COMMITTED, Kind.RESUMED, Kind.STOPPED, Kind.INTERRUPTED, Kind.PREEMPTED, Kind.WENT_BACK)
"""The events that say that there was a commit of their step when they were written."""

BEGUN_FROM = "begun_from"
"""The field of run.json that an import or a fork writes, before its checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """The newest commit of which the record of a run knows. attempt: the one that wrote of it; 0: import or fork."""

    step: int
    attempt: int


def newest_recorded(run: RunDir) -> Recorded | None:
    """Return the last commit that the record of a run names; None if it names none.

    The last one counts and not the largest step: a run that passed over a damaged checkpoint goes on before it. Events
    that cannot be read are left out. What a supervisor or an import wrote counts if no attempt wrote of a commit.
    """
    info = run.run_info() if "run.json" in (run.entries() or ()) else {}
    seen = Recorded(step=0, attempt=0) if isinstance(info.get(BEGUN_FROM), dict) else None
    for number in reversed(run.attempt_numbers()):
        rows: list[dict[str, Any]] = []
        with contextlib.suppress(UserError):
            rows = run.rows(number, "events")
        for event in reversed(rows):
            kind, step = event.get("event"), event.get("step")
            if kind in AT_STEP and isinstance(step, int):
                return None if kind == Kind.WENT_BACK and not step else Recorded(step=step, attempt=number)
            if kind == Kind.LEFT and isinstance(event.get("committed"), int) and not (seen and seen.attempt):
                seen = Recorded(step=event["committed"], attempt=number)  # what the supervisor saw by names
    return seen


def check_not_missing(run: RunDir, location: Location) -> None:
    """Raise an error if `location` lacks the newest checkpoint of which the record of `run` knows, and all after it."""
    known = newest_recorded(run)
    if known is None:
        return
    there = newest_committed(location)
    if there is not None and there >= known.step:
        return
    if not known.attempt:
        raise UserError(
            f"run directory {run.where}",
            expected="the checkpoint of the import or fork that the run begins from",
            got="none: the import did not end",
            do="Import or fork again into another folder, or remove this one and do it again.",
        )
    if isinstance(location, FolderLocation):  # a link is no storage that is away: another attempt finds it again
        from portatrain.checkpoint.errors import explained  # with NumPy: not needed to read a record

        with explained():
            location.refuse_links(known.step)
    raise StorageError(
        f"checkpoints in {location.name}",
        expected=f"the checkpoint of step {known.step}, which attempt {known.attempt} had",
        got="no checkpoint at all" if there is None else f"none after step {there}",
        do="See that the storage is there (a mount, a bucket, a copy that is not complete); nothing was changed. To go "
        f"on {'from step 1' if there is None else f'from step {there}'} all the same, give --accept-drift REASON, or "
        "begin a new run.",
    )
