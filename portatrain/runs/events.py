"""The events of an attempt: the lines of events.jsonl, their kinds, and how an attempt ended according to them.

`Kind` lists the kinds that portatrain itself writes and reads; a hook or a recipe may record others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

Event = Mapping[str, Any]


class Kind(StrEnum):
    """The kinds of events. The file has the text, so a reader of JSON does not need this class."""

    LANDED = "landed"
    """The supervisor has begun the attempt; with job, engine, cluster, host and the scheduler's variables."""
    START = "start"
    """The training loop begins; with the fields of `RunInfo`."""
    CLAIM_TAKEN_OVER = "claim_taken_over"
    """The previous owner of the claim had died; with its host, its PID and the time of its claim."""
    CODE_DIFFERS = "code_differs"
    """The code differs from the code at the start of the run."""
    RECIPE_CHANGED = "recipe_changed"
    """The recipe was changed on purpose after `step`; with the fields, each with both values, and the reason."""
    CHANGE_MEASURED = "change_measured"
    """What a change of the trajectory did by itself: the probe before it and after it, on one state."""
    ENVIRONMENT_DIFFERS = "environment_differs"
    """Versions of installed packages differ from those at the start of the run."""
    KERNELS = "kernels"
    """The chosen implementation of each operation, and the reasons against the others (`backends/choose_kernel.py`)."""
    COMPILE_CACHE = "compiled_programs_kept"
    """Compiled programs are kept in `folder`."""
    NO_COMPILE_CACHE = "no_compile_cache"
    """Compiled programs are not kept, because their folder cannot be written to; with the reason. The run goes on."""
    FIRST_STEP = "first_step_done"
    """The first step of the attempt is done; with the seconds since the process started, in parts."""
    PROFILED = "profiled"
    """A trace of the steps `first` to `last` is written; with its files and its ten most expensive operations."""
    PROFILE_SKIPPED = "profile_skipped"
    """The run resumed behind the steps of --profile."""
    PROFILE_FAILED = "profile_failed"
    """The profiler could not start, or could not write; with the reason. The run goes on."""
    CHECKPOINT_DAMAGED = "checkpoint_damaged"
    """A damaged checkpoint was skipped."""
    WARNING = "warning"
    """A probable mistake of the user, such as an axis that no mapping names, or what a data source passed over."""
    RESUMED = "resumed"
    """The run was resumed; with the verdict of the continuity check and its numbers."""
    SAVES_EXCEED_MEMORY = "saves_exceed_memory"
    """Training waits until a save has been written, because its host copies do not fit into memory."""
    SAVING = "saving"
    """A save of the state after `step` has begun."""
    COMMITTED = "save_committed"
    """The save of the state after `step` is committed. A later attempt expects its checkpoint (`runs/commits.py`)."""
    SAVE_SKIPPED = "save_skipped"
    """A save was skipped because the previous one is still being written."""
    DATA_WAIT = "waiting_for_data"
    """Process 0 has waited `waited_s` seconds for the batch of `step`, and waits on. If it waits for a shard of a
    packed store, standard error has its name."""
    SKIPPED = "skipped"
    """The update of a step was skipped because its loss or gradient was not finite."""
    SPIKE = "spike"
    """The update of a step was skipped because its loss or gradient norm was above the limits of the recipe's `spikes`;
    with both limits, and its samples as [first, one after the last]."""
    WENT_BACK = "went_back"
    """The run went back to the checkpoint of `step`, because of a spike, and leaves its samples out; with the step of
    the spike and the samples as [first, one after the last]. The attempt ends, and another one goes on."""
    AGREED = "referee_agreed"
    """A step was computed a second time, and all agreed; with what computed it, and the seconds that it took."""
    DISAGREED = "referee_disagreed"
    """The second computation of `step` differs, and the attempt ends; with what differs, the devices that are accused
    (with process and host), whether they are certain, and `agreed`, the step of the last agreement."""
    NOT_TRUSTED = "checkpoint_not_trusted"
    """The checkpoint of `step` was passed over, because it was saved after the last agreement before a disagreement."""
    EVAL = "eval"
    """An evaluation; with the fields of `EvalRecord`."""
    TASK = "task"
    """The result of an evaluation task on the live model; with the fields of `runs.tasks.TaskResult`."""
    EVALUATING = "evaluating_the_whole_validation_split"
    """The final evaluation begins."""
    SCORING = "scoring_a_byte_3-gram_model_on_the_same_split"
    """`TrigramBaseline` begins."""
    SINK_FAILED = "sink_failed"
    """A sink raised an error and gets no more metrics; with its name and the error."""
    HOOK_FAILED = "hook_failed"
    """A hook raised an error after the last step; with its name, the method and the error. The run is done anyway."""
    STOPPING = "stopping"
    """The attempt received a stop request; with its kind, the phase and the step."""
    STOPPED = "stopped"
    """The attempt has saved at --stop-at."""
    INTERRUPTED = "interrupted"
    """The attempt has saved after Ctrl-C."""
    PREEMPTED = "preempted"
    """The attempt has saved after a signal or a cloud notice."""
    CANCELLED = "cancelled"
    """The attempt has saved after `launch cancel`."""
    HANG = "hang"
    """A process made no progress, and its watchdog ended the attempt."""
    END = "end"
    """The training loop has ended; with its status and results, and `why` if it failed."""
    LEFT = "left"
    """The supervisor has seen the attempt end; with the outcome, the exit code and the reason."""
    GAVE_UP = "gave_up"
    """The supervisor makes no more attempts; with the reason."""


def of_kind(events: Sequence[Event], kind: Kind) -> list[Event]:
    """Return the events of one kind, in order."""
    return [event for event in events if event.get("event") == kind]


def last(events: Sequence[Event], kind: Kind) -> Event | None:
    """Return the last event of a kind; None if there is none."""
    return next((event for event in reversed(events) if event.get("event") == kind), None)


def has(events: Sequence[Event], *kinds: Kind) -> bool:
    """Return True if there is an event of one of these kinds."""
    return any(event.get("event") in kinds for event in events)


def comes_back(events: Sequence[Event]) -> bool:
    """Return whether a scheduler starts the run again after the attempt of these events: not if it ran in a terminal,
    or in the background of one machine."""
    landed = last(events, Kind.LANDED)
    return landed is not None and bool(landed.get("queues", landed.get("engine") != "local"))


def how_it_ended(events: Sequence[Event]) -> str:
    """Return how an attempt ended: 'done', 'preempted', 'stopped', 'interrupted', 'cancelled', 'went_back', 'failed' or
    'hung'.

    The supervisor's event takes precedence over the attempt's own; '' if there is neither.
    """
    for kind, key in ((Kind.LEFT, "outcome"), (Kind.END, "status")):
        found = last(events, kind)
        if found is not None:
            return str(found.get(key) or "")
    return "hung" if has(events, Kind.HANG) else ""


def why_it_ended(events: Sequence[Event]) -> str:
    """Return the last reason that the attempt or its supervisor recorded; '' if there is none."""
    for event in reversed(events):
        if event.get("event") in (Kind.END, Kind.LEFT, Kind.GAVE_UP) and event.get("why"):
            return str(event["why"])
    hang = last(events, Kind.HANG)
    behind = None if hang is None else hang.get("behind")
    return str(behind.get("text", "")) if isinstance(behind, Mapping) else ""
