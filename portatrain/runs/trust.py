"""Say which checkpoints of a run are not trusted: those that an attempt saved after the last agreement of its referee.

They follow from the record: an event `referee_disagreed` of attempt K names the step of the last agreement, and every
later checkpoint that attempt K or one before it has committed may have wrong numbers. A checkpoint of the same step
that a later attempt commits replaces it, and is trusted.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from portatrain.checkpoint.locations import Location
from portatrain.errors import UserError
from portatrain.runs.events import Kind, of_kind
from portatrain.system import json_files


class Record(Protocol):
    """What is read of a run."""

    def attempt_numbers(self) -> list[int]: ...

    def rows(self, number: int, name: str) -> list[dict[str, Any]]: ...


def disagreements(run: Record) -> list[dict[str, Any]]:
    """Return the events `referee_disagreed` of all attempts, each with its `attempt`. Damaged files are left out."""
    found: list[dict[str, Any]] = []
    for number in run.attempt_numbers():
        with contextlib.suppress(UserError):
            found += [{**row, "attempt": number} for row in of_kind(run.rows(number, "events"), Kind.DISAGREED)]
    return found


def doubted(found: Iterable[Mapping[str, Any]], location: Location) -> dict[int, str]:
    """Return the committed checkpoints at `location` that are not trusted: step -> the reason, in words."""
    reasons: dict[int, str] = {}
    known = [event for event in found if isinstance(event.get("agreed"), int)]
    for step in location.steps() if known else ():
        after = [event for event in known if step > event["agreed"]]
        if after and location.committed(step):
            attempt = _attempt_of(location.commit(step))
            for event in after:
                if attempt is None or attempt <= event["attempt"]:
                    reasons[step] = (
                        f"it was saved after step {event['agreed']}, the last agreement before the referee found "
                        f"{event.get('what')} at step {event.get('step')} in attempt {event['attempt']}"
                    )
    return reasons


def in_words(event: Mapping[str, Any]) -> str:
    """Return a sentence for an event `referee_disagreed`."""
    what = str(event.get("what", "a difference"))
    return f"the referee found {what} at step {event.get('step')}: {named(event)}"


def named(event: Mapping[str, Any]) -> str:
    """Return the devices that an event `referee_disagreed` accuses, in words."""
    devices = event.get("devices")
    rows = [d for d in devices if isinstance(d, Mapping)] if isinstance(devices, list) else []
    each = ", ".join(f"{d.get('device')} (process {d.get('process')} on {d.get('host')})" for d in rows)
    if not each:
        return "no device is named"
    text = f"device {each}" if len(rows) == 1 else f"devices {each}"
    if event.get("certain"):
        return text
    return f"probably {text}" if len(rows) == 1 else f"one of {text}"


def _attempt_of(commit: bytes) -> int | None:
    """Return the number of the attempt whose save a COMMIT names; None if it names none."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        save = re.fullmatch(r"a(\d+)", str(json_files.loads(commit)["save"]))
        return int(save[1]) if save else None
    return None
