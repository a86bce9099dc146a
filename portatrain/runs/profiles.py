"""Read the profiles of an attempt from its events, for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from portatrain.runs.events import Event, Kind, of_kind
from portatrain.runs.rows import LONGEST_S, MOST_STEPS

LONGEST_ABOUT = 60


@dataclass(frozen=True, kw_only=True)
class ProfileHistory:
    """One profile: its steps, its files as paths below the attempt's folder, and rows of `COLUMNS`."""

    steps: str
    files: Sequence[str]
    operations: Sequence[Sequence[str]]


COLUMNS = ("operation", "calls", "time", "share", "shapes, or where it comes from")


def of_events(events: Sequence[Event]) -> list[ProfileHistory]:
    """Return the profiles that an attempt recorded. Of a damaged event it returns the parts that can be read."""
    return [_profile(event) for event in of_kind(events, Kind.PROFILED)]


def in_words(event: Mapping[str, Any], folder: str) -> list[str]:
    """Return the lines of an event `profiled` for a terminal: the first file, below `folder`, then a table."""
    made = _profile(event)
    rows = [COLUMNS, *made.operations]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS) - 1)]
    lines = [f"profile of {made.steps}: {', '.join(f'{folder}/{file}' for file in made.files[:1])}"]
    for row in rows:
        name, *numbers, about = row
        cells = [name.ljust(widths[0]), *(n.rjust(w) for n, w in zip(numbers, widths[1:], strict=True)), about]
        lines.append(f"  {'  '.join(cells)}".rstrip())
    return lines


def _profile(event: Mapping[str, Any]) -> ProfileHistory:
    first, last, files, operations = (event.get(key) for key in ("first", "last", "files", "operations"))
    return ProfileHistory(
        steps=f"step {first}" if first == last else f"steps {_text(first)} to {_text(last)}",
        files=[_text(file) for file in files] if isinstance(files, list) else [],
        operations=[_operation(row) for row in operations if isinstance(row, Mapping)]
        if isinstance(operations, list)
        else [],
    )


def _operation(row: Mapping[str, Any]) -> tuple[str, ...]:
    calls, time_s, share = row.get("calls"), row.get("time_s"), row.get("share")
    about = _text(row.get("about", ""))
    return (
        _text(row.get("name", "")),
        str(calls) if type(calls) is int and 0 <= calls <= MOST_STEPS else "",
        f"{1e3 * time_s:,.2f} ms" if _number(time_s) else "",
        f"{share:.1%}" if _number(share) else "",
        _cut(about),
    )


def _cut(about: str) -> str:
    """Return `about` at a length for a table: the beginning of shapes, the end of a path."""
    if len(about) <= LONGEST_ABOUT:
        return about
    return f"...{about[-LONGEST_ABOUT:]}" if "/" in about else f"{about[:LONGEST_ABOUT]}..."


def _text(value: object) -> str:
    return str(value)[:1000]


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= LONGEST_S
