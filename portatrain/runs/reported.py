"""The numbers that hooks record by `run.event`, as curves over the steps."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from typing import Any

from portatrain.runs.events import Event, Kind

OURS = frozenset(kind.value for kind in Kind)
"""The events of portatrain itself, which are no measurements."""
ABOUT = ("event", "unix_s", "step")
"""Fields that say which event, when and where."""

Row = Mapping[str, Any]


def scalars(kind: str, fields: Mapping[str, object]) -> dict[str, float]:
    """Return the numbers of an event by 'kind/field'; of portatrain's own events those of `task` alone.

    A dictionary of numbers is flattened: 'kind/field/name'. `step` says where the numbers belong, and is none.
    """
    found: dict[str, float] = {}
    if kind in OURS:
        return task(fields) if kind == Kind.TASK else found
    for field, value in fields.items():
        for name, number in value.items() if isinstance(value, dict) else (("", value),):
            if isinstance(number, (int, float)) and not isinstance(number, bool) and field not in ABOUT:
                found["/".join(part for part in (kind, field, str(name)) if part)] = float(number)
    return found


def task(fields: Mapping[str, object]) -> dict[str, float]:
    """Return the metrics of an event `task`, by 'task/LABEL/METRIC'."""
    metrics = fields.get("metrics")
    metrics = metrics if isinstance(metrics, Mapping) else {}
    label = f"{fields.get('task')}" + (f", {fields['shots']} shots" if fields.get("shots") else "")
    return {f"{Kind.TASK}/{label}/{name}": float(value) for name, value in metrics.items()}


def numbers(
    events: Mapping[int, Sequence[Event]], rows: Mapping[int, Sequence[Row]], began_unix_s: Mapping[int, float]
) -> dict[str, list[tuple[int, float]]]:
    """Return (step, value) by 'kind/field', in the order of the steps, from the events and rows of every attempt.

    An event without `step` belongs to the last step that was recorded before it. Of a step that was trained again the
    newest attempt counts, as on the curve.
    """
    found: dict[str, dict[int, float]] = {}
    for attempt in sorted(events):
        mine = rows.get(attempt, ())
        if mine:
            first = min(row["step"] for row in mine)
            found = {name: {s: v for s, v in points.items() if s < first} for name, points in found.items()}
        ended = [began_unix_s.get(attempt, 0.0) + float(row.get("time_s") or 0.0) for row in mine]
        for event in events[attempt]:
            if event.get("event") == Kind.TASK:  # a section of its own
                continue
            for name, value in scalars(str(event.get("event")), event).items():
                step = event.get("step")
                if step is None:
                    before = bisect.bisect_right(ended, event.get("unix_s") or 0.0)
                    step = mine[before - 1]["step"] if before else 0
                found.setdefault(name, {})[step] = value
    return {name: sorted(points.items()) for name, points in found.items() if points}
