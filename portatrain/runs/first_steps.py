"""Read how long an attempt took to its first step, for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from portatrain.runs.events import Event, Kind, last
from portatrain.runs.rows import LONGEST_S, MOST_STEPS
from portatrain.system.text import counted


@dataclass(frozen=True, kw_only=True)
class FirstStep:
    """The seconds from the start of the process to the end of the attempt's first step, and their parts.

    compiled: what was compiled and what came from the cache, in words; '' if that is unknown.
    """

    total_s: float
    parts: Mapping[str, float]
    compiled: str


def of_events(events: Sequence[Event]) -> FirstStep | None:
    """Return what an attempt recorded; None if it did not train a step or recorded something else."""
    event = last(events, Kind.FIRST_STEP)
    return None if event is None else of_event(event)


def of_event(event: Mapping[str, Any]) -> FirstStep | None:
    """Return the times of an event `first_step_done`; None if they are damaged."""
    total_s, parts = event.get("total_s"), event.get("parts")
    if not _is_time(total_s) or not isinstance(parts, Mapping):
        return None
    return FirstStep(
        total_s=float(total_s),
        parts={str(name)[:40]: float(value) for name, value in parts.items() if _is_time(value)},
        compiled=_compiled(event.get("programs_compiled"), event.get("programs_reused")),
    )


def in_words(event: Mapping[str, Any]) -> str:
    """Return an event `first_step_done` as one line."""
    found = of_event(event)
    if found is None:
        return "first step done"
    parts = ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in found.parts.items())
    compiled = f"; {found.compiled}" if found.compiled else ""
    return f"first step done {found.total_s:.1f} s after the start of the process: {parts}{compiled}"


def _compiled(programs: object, reused: object) -> str:
    if not _is_count(programs) or not _is_count(reused) or not (programs or reused):
        return ""
    return f"{counted(programs, 'programs')} compiled, {reused} from the cache"


def _is_time(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= LONGEST_S


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= MOST_STEPS
