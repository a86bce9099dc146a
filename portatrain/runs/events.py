"""The events of an attempt: the lines of events.jsonl, their kinds, and what they say of its end.

A hook or a recipe may record kinds of its own; those that portatrain itself writes and reads stand in `Kind`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

Event = Mapping[str, Any]


class Kind(StrEnum):
    """The kinds of events. The file holds the text, so a reader of JSON needs none of this."""

    LANDED = "landed"
    """The supervisor has begun the attempt: job, engine, cluster, host, what the scheduler's environment says."""
    START = "start"
    """The loop of the attempt begins: the fields of `RunInfo`."""
    CLAIM_TAKEN_OVER = "claim_taken_over"
    """The owner before had died: its host, pid and when it took the claim."""
    CODE_DIFFERS = "code_differs"
    """The code is not the one that the run began with."""
    ENVIRONMENT_DIFFERS = "environment_differs"
    """Installed packages are not those that the run began with."""
    KERNELS = "kernels"
    """The implementation of each operation that runs, and why not the others (`backends/kernels.py`)."""
    CHECKPOINT_DAMAGED = "checkpoint_damaged"
    """A checkpoint was passed over."""
    WARNING = "warning"
    """Something that a user probably did not mean, such as an axis that no mapping names."""
    RESUMED = "resumed"
    """The verdict of the continuity check, with its numbers."""
    SAVES_EXCEED_MEMORY = "saves_exceed_memory"
    """Training waits for a save to be written, as its copies do not fit into memory."""
    SAVING = "saving"
    """A save of `step` has begun."""
    SAVE_SKIPPED = "save_skipped"
    """The save before is still being written."""
    SKIPPED = "skipped"
    """The update of a step was left out, as its loss or gradient was not finite."""
    EVAL = "eval"
    """An evaluation: the fields of `EvalRecord`."""
    EVALUATING = "evaluating_the_whole_validation_split"
    """The last evaluation begins."""
    SCORING = "scoring_a_byte_3-gram_model_on_the_same_split"
    """`TrigramBaseline` begins."""
    SINK_FAILED = "sink_failed"
    """A sink raised an error and gets no more metrics: which, and why."""
    HOOK_FAILED = "hook_failed"
    """A hook raised an error after the last step: which, in which method, and why. The run is done all the same."""
    STOPPING = "stopping"
    """The attempt was asked to end: how, in which phase of which step."""
    STOPPED = "stopped"
    """It has saved at --stop-at."""
    INTERRUPTED = "interrupted"
    """It has saved after Ctrl-C."""
    PREEMPTED = "preempted"
    """It has saved after a signal or a notice."""
    HANG = "hang"
    """A process did not move on, and ended the attempt."""
    END = "end"
    """The last word of the loop: its status and results, and `why` where it failed."""
    LEFT = "left"
    """The last word of the supervisor: the outcome as it saw it, exit code and why."""
    GAVE_UP = "gave_up"
    """The supervisor makes no more attempts: why."""


def of_kind(events: Sequence[Event], kind: Kind) -> list[Event]:
    """Return the events of one kind, in order."""
    return [event for event in events if event.get("event") == kind]


def last(events: Sequence[Event], kind: Kind) -> Event | None:
    """Return the last event of a kind; None if there is none."""
    return next((event for event in reversed(events) if event.get("event") == kind), None)


def has(events: Sequence[Event], *kinds: Kind) -> bool:
    """Return whether there is an event of one of these kinds."""
    return any(event.get("event") in kinds for event in events)


def how_it_ended(events: Sequence[Event]) -> str:
    """Return how an attempt ended: 'done', 'preempted', 'stopped', 'interrupted', 'cancelled', 'failed' or 'hung'.

    The supervisor's word counts, else the attempt's own; '' if neither was written.
    """
    for kind, key in ((Kind.LEFT, "outcome"), (Kind.END, "status")):
        found = last(events, kind)
        if found is not None:
            return str(found.get(key) or "")
    return "hung" if has(events, Kind.HANG) else ""


def why_it_ended(events: Sequence[Event]) -> str:
    """Return the last reason that an attempt, or its supervisor, gave; '' if there is none."""
    for event in reversed(events):
        if event.get("event") in (Kind.END, Kind.LEFT, Kind.GAVE_UP) and event.get("why"):
            return str(event["why"])
    hang = last(events, Kind.HANG)
    behind = None if hang is None else hang.get("behind")
    return str(behind.get("text", "")) if isinstance(behind, Mapping) else ""
