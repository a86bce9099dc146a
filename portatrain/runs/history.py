"""The history of a run, derived once from its run directory: for `status`, `list`, `logs`, `reconcile` and the report.

QUEUED      no attempt has begun
STARTING    an attempt holds the claim and has not trained yet
RUNNING     an attempt holds the claim and trains
PREEMPTING  an attempt holds the claim, has been asked to stop and is saving
REQUEUED    the last attempt saved and ended; the scheduler starts the next one
STOPPED     the last attempt saved and ended, and nothing starts another one: `launch resume` does
SUCCEEDED   the run has the mark DONE
FAILED      ended by a user's mistake, or too many failures without progress
CANCELLED   a user cancelled the run
LOST        the last attempt ended without a record of why; the next one resumes from the last commit
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from portatrain.checkpoint.locations import location_of
from portatrain.errors import LONGEST, UserError
from portatrain.runs import changes, first_steps, profiles, reported, trust
from portatrain.runs import rows as typed
from portatrain.runs.changes import Change
from portatrain.runs.claim import Owner
from portatrain.runs.events import Event, Kind, comes_back, has, how_it_ended, last, of_kind, why_it_ended
from portatrain.runs.first_steps import FirstStep
from portatrain.runs.open import open_run
from portatrain.runs.profiles import ProfileHistory
from portatrain.runs.run_dir import RunDir, merge
from portatrain.runs.tasks import TaskResult
from portatrain.runs.tasks import results as task_results
from portatrain.system import json_files

OVER = ("SUCCEEDED", "FAILED", "CANCELLED")
STATES = ("QUEUED", "STARTING", "RUNNING", "PREEMPTING", "REQUEUED", "STOPPED", "LOST", *OVER)
WAITING = ("REQUEUED", "STOPPED", "LOST")
"""Of a run that is not over and that no attempt holds."""
LOST = "lost"
"""The end of an attempt that no longer holds the claim and of which no event tells how it ended."""

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class AttemptHistory:
    """One attempt. `steps`: (first, last) step of its rows; `kept`: the number of them on the run's curve."""

    number: int
    where: str
    """Cluster and host."""
    backend: str
    mesh: str
    device: str
    framework: str
    began_unix_s: float
    ended_unix_s: float
    """The time of its last write."""
    steps: tuple[int, int] | None
    kept: int
    again: int
    """The number of its steps that a later attempt trained again."""
    ended: str
    """The result of `events.how_it_ended`, or LOST; '' while the attempt continues."""
    why: str
    """The recorded reason for its end; '' if there is none."""
    verdict: str
    """The verdict of the continuity check at its start; '' if there was none."""
    step_s: float | None
    memory_bytes: int | None
    plan: Mapping[str, Any] | None
    """The plan, if one was recorded."""
    profiles: Sequence[ProfileHistory] = ()
    first_step: FirstStep | None = None
    cluster: str = ""
    devices: int = 1
    kind: str = ""
    """The name of its devices, as the framework gives it."""

    @property
    def runs_on(self) -> str:
        """Return backend, devices and mesh, in words."""
        return f"{self.backend or '?'} on {self.device}" + (f", {self.mesh}" if self.mesh not in ("", "1") else "")


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """The step at which an attempt resumed from a checkpoint. event: the recorded verdict with its numbers.

    retrained_s: the time of the steps after the checkpoint that an earlier attempt had trained already. gap_s: from
    the last row of the earlier attempt to the beginning of the first step here.
    """

    step: int
    earlier: int | None
    attempt: int
    event: Event
    retrained: int
    retrained_s: float
    gap_s: float | None


@dataclass(frozen=True, kw_only=True)
class History:
    """The history of one run; `curve` and `evals` have the rows that `RunDir` returns."""

    run: str
    where: str
    state: str
    owner: Owner | None
    step: int
    steps: int
    loss: float | None
    tokens_per_s: float | None
    committed: int | None
    """The step of the newest committed checkpoint."""
    lost_s: float
    """Wall time, in total, from each attempt's last kept step to the start of the next attempt's first kept step."""
    trained_again: int
    """The number of repeated steps; a step that was trained three times counts twice."""
    attempts: Sequence[AttemptHistory]
    why: str
    """The reason that the last attempt or its supervisor recorded for its end."""
    recipe: Mapping[str, Any]
    recipe_sha256: str
    curve: Sequence[Row]
    evals: Sequence[Event]
    resume_points: Sequence[ResumePoint]
    unit: str = "tokens"
    """What `tokens_per_s` counts."""
    parent: Mapping[str, Any] | None = None
    """The run that it was forked from, as in run.json: run, where, step, fields; None if it is no fork."""
    changes: Sequence[Change] = ()
    """The changes of the recipe, in order; of a fork the first one is the fork."""
    measured: Sequence[Event] = ()
    """What changes of the trajectory did by themselves: the events `change_measured`."""

    tasks: Sequence[TaskResult] = ()
    """The results of evaluation tasks, by task and step."""
    disagreements: Sequence[Event] = ()
    """The events `referee_disagreed`: the devices that a referee named, or suspects."""
    reported: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    """The numbers of events that hooks recorded, by 'kind/field': (step, value), as `runs/reported.py` says."""
    doubted: Mapping[int, str] = field(default_factory=dict)
    """The checkpoints that are not trusted since then, with the reasons (`runs/trust.py`)."""

    @property
    def validation_loss(self) -> float | None:
        """The loss of the newest evaluation; None if there was none."""
        losses = [event.get("loss") for event in self.evals]
        return next((float(loss) for loss in reversed(losses) if isinstance(loss, (int, float))), None)

    @property
    def validation_metrics(self) -> dict[str, float]:
        """The metrics of the newest evaluation; {} if there was none."""
        return dict(self.evals[-1].get("metrics") or {}) if self.evals else {}

    @property
    def over(self) -> bool:
        """True if no job will continue the run without a user."""
        return self.state in OVER

    @property
    def skipped(self) -> list[int]:
        """The steps of the curve without an update, because a loss or gradient was not finite or a spike."""
        return [row["step"] for row in self.curve if row.get("skipped")]

    @property
    def spikes(self) -> list[int]:
        """Those of `skipped` with finite numbers."""
        odd = {r["step"] for r in self.curve for key in ("loss", "grad_norm") if not math.isfinite(r.get(key) or 0.0)}
        return [step for step in self.skipped if step not in odd]

    def as_json(self) -> dict[str, Any]:
        """Return the output of `status --json`, as strict JSON data."""
        names = (
            "run",
            "state",
            "step",
            "steps",
            "loss",
            "validation_loss",
            "validation_metrics",
            "tokens_per_s",
            "committed",
            "lost_s",
        )
        shown = ("number", "where", "backend", "mesh", "began_unix_s", "steps", "kept", "ended", "why", "verdict")
        return json_files.strict(
            {
                **{name: getattr(self, name) for name in (*names, "trained_again", "why")},
                "parent": None if self.parent is None else {k: self.parent.get(k) for k in ("run", "where", "step")},
                "changes": [{"step": c.step, "fields": c.fields, "reason": c.reason} for c in self.changes],
                "tasks": [asdict(one) for one in self.tasks],
                "disagreements": list(self.disagreements),
                "doubted": {str(step): why for step, why in self.doubted.items()},
                "owner": None if self.owner is None else asdict(self.owner),
                "attempts": [{name: getattr(one, name) for name in shown} for one in self.attempts],
            }
        )


def read_history(where: RunDir | Path | str) -> History:
    """Return the history of a run. Raises UserError if the record is damaged or `where` is not a run directory."""
    if not isinstance(where, RunDir):
        where = _checked(where)
    run = where
    owner, numbers = run.owner(), run.attempt_numbers()
    events = {n: run.rows(n, "events") for n in numbers}
    rows = {n: run.rows(n, "metrics") for n in numbers}
    curve = merge(rows)  # from the rows already read, because a running attempt may append more in the meantime
    attempts = [
        _attempt(run, n, events[n], rows[n], curve, alive=owner is not None and n == numbers[-1]) for n in numbers
    ]

    def said(kind: Kind) -> list[Event]:
        return [{**e, "attempt": n} for n in numbers for e in of_kind(events[n], kind)]

    disagreements = said(Kind.DISAGREED)
    info = run.run_info() if (run.path / "run.json").exists() else {}
    changed = changes.of(run.path) if info else []
    recipe = changed[-1].recipe if changed else info.get("recipe", {})
    return History(
        run=run.path.name,
        where=run.where,
        state=_state(run, owner, attempts, events, rows),
        owner=owner,
        step=curve[-1]["step"] if curve else 0,
        steps=recipe.get("steps") or 0,
        loss=curve[-1].get("loss") if curve else None,
        tokens_per_s=_rate(rows[numbers[-1]] if numbers else []),
        committed=committed(run),
        lost_s=_lost_s(attempts, curve),
        trained_again=sum(len(r) for r in rows.values()) - len(curve),
        attempts=attempts,
        why=attempts[-1].why if attempts else "",
        recipe=recipe,
        recipe_sha256=changed[-1].recipe_sha256 if changed else info.get("recipe_sha256", ""),
        curve=curve,
        evals=said(Kind.EVAL),
        resume_points=_resume_points(attempts, rows, events),
        unit=_unit(recipe, events[numbers[-1]] if numbers else ()),
        parent=changes.parent_of(info),
        changes=changed,
        disagreements=disagreements,
        doubted=trust.doubted(disagreements, location_of(run.checkpoints())),
        measured=said(Kind.CHANGE_MEASURED),
        tasks=task_results(run, said(Kind.TASK)),
        reported=reported.numbers(events, rows, {one.number: one.began_unix_s for one in attempts}),
    )


def _unit(recipe: Mapping[str, Any], events: Sequence[Event]) -> str:
    """Return what the rates of a run count; a run that has not started has only its recipe."""
    started = last(events, Kind.START)
    if started is not None and "unit" in started:
        return str(started["unit"])
    return "tokens" if "seq_len" in recipe.get("data", {}) else "samples"


def _checked(where: Path | str) -> RunDir:
    run = open_run(where)
    if not (run.path / "run.json").exists():
        there = run.entries() is not None
        raise UserError(
            f"run directory {where}",
            expected="a run of portatrain, with a run.json",
            got="a file" if run.path.is_file() else "none in it" if there else "no such folder",
            do="Give the folder or URL that `portatrain train --run-dir` or `launch` made.",
        )
    return run


def committed(run: RunDir) -> int | None:
    """Return the step of the newest committed checkpoint, or None. Only the restore verifies its files."""
    return run.committed()


def kept_checkpoints(run: RunDir) -> list[dict[str, Any]]:
    """Return step, commit state and bytes of each checkpoint, from COMMIT and file sizes, without reading tensors."""
    location, doubted, found = location_of(run.checkpoints()), run.doubted(), []
    for step in location.steps():
        sizes = location.sizes(step)
        row: dict[str, Any] = {"step": step, "committed": "COMMIT" in sizes, "bytes": sum(sizes.values())}
        row["doubted"] = step in doubted
        if row["committed"]:
            try:
                row["save"] = str(json_files.loads(location.commit(step))["save"])
            except (ValueError, KeyError, TypeError, OSError):
                row["committed"] = False
        found.append(row)
    return found


def _state(
    run: RunDir,
    owner: Owner | None,
    attempts: Sequence[AttemptHistory],
    events: Mapping[int, Sequence[Event]],
    rows: Mapping[int, Sequence[Row]],
) -> str:
    newest = events[attempts[-1].number] if attempts else []
    left = has(newest, Kind.LEFT)
    if run.is_done:
        return "SUCCEEDED"
    if run.marked("CANCELLED"):
        return "PREEMPTING" if owner is not None and attempts and not left else "CANCELLED"
    if has(newest, Kind.GAVE_UP):
        return "FAILED" if owner is None else "STARTING"
    if owner is not None:
        if not attempts or left:
            return "STARTING"
        if has(newest, Kind.STOPPING):
            return "PREEMPTING"
        return "RUNNING" if rows[attempts[-1].number] else "STARTING"
    if not attempts:
        return "QUEUED"
    if attempts[-1].ended == "failed" and not left:
        return "FAILED"
    return "LOST" if attempts[-1].ended == LOST else "REQUEUED" if comes_back(newest) else "STOPPED"


def _attempt(
    run: RunDir, number: int, events: Sequence[Event], rows: Sequence[Row], curve: Sequence[Row], *, alive: bool
) -> AttemptHistory:
    folder = run.path / "attempts" / str(number)
    about = typed.attempt_info(folder / "attempt.json")
    plan = json_files.read_object(folder / "plan.json") if (folder / "plan.json").exists() else None
    began_s: float = about.get("began_unix_s") or (events[0].get("unix_s") if events else None) or 0.0
    times = [e["unix_s"] for e in events if e.get("unix_s")] + [began_s + row.get("time_s", 0.0) for row in rows[-1:]]
    steady = [row["step_s"] for row in rows[2:] if row.get("step_s") and not row.get("skipped")]
    kept = sum(row["attempt"] == number for row in curve)
    verdict, error = last(events, Kind.RESUMED), _last_error(folder)
    return AttemptHistory(
        number=number,
        where=" ".join(str(about[k]) for k in ("cluster", "host") if about.get(k)),
        backend=str(about.get("backend", "")),
        mesh=str(about.get("mesh", "")),
        device=f"{about.get('devices', 1)} x {about.get('device', '?')}",
        framework=str(about.get("framework", "")),
        began_unix_s=began_s,
        ended_unix_s=max(times, default=began_s),
        steps=(rows[0]["step"], rows[-1]["step"]) if rows else None,
        kept=kept,
        again=len(rows) - kept,
        ended=how_it_ended(events) or ("" if alive else "failed" if error else LOST),
        why=why_it_ended(events) or error,
        verdict="" if verdict is None else str(verdict.get("verdict", "")),
        step_s=statistics.median(steady) if steady else None,
        memory_bytes=max((row["memory_bytes"] for row in rows if row.get("memory_bytes")), default=None),
        plan=plan,
        profiles=profiles.of_events(events),
        first_step=first_steps.of_events(events),
        cluster=str(about.get("cluster") or ""),
        devices=devices if isinstance(devices := about.get("devices"), int) and devices > 0 else 1,
        kind=str(about.get("device") or ""),
    )


def errors(folder: Path) -> list[Path]:
    """Return the error files in an attempt's folder, that of process 0 first."""
    found = [folder / "error.txt", *sorted(folder.glob("error-rank-*.txt"))]
    return [path for path in found if path.is_file()]


def _last_error(folder: Path) -> str:
    """Return the last line of the first error file; '' if there is none."""
    for path in errors(folder):
        lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if lines:
            return lines[-1].strip()[:LONGEST]
    return ""


def _rate(rows: Sequence[Row]) -> float | None:
    """Return tokens per second over the last ten steps, without the first step of an attempt, which compiles."""
    recent = [row for row in rows[1:][-10:] if row.get("step_s") and row.get("tokens_per_s")]
    if not recent:
        return None
    return sum(row["tokens_per_s"] * row["step_s"] for row in recent) / sum(row["step_s"] for row in recent)


def _lost_s(attempts: Sequence[AttemptHistory], curve: Sequence[Row]) -> float:
    began = {a.number: a.began_unix_s for a in attempts}
    spans: dict[int, tuple[float, float]] = {}
    for row in curve:
        n = row["attempt"]
        now_s = began[n] + row.get("time_s", 0.0)
        first_s = spans[n][0] if n in spans else now_s - row.get("step_s", 0.0)
        spans[n] = (first_s, now_s)
    ordered = [spans[n] for n in sorted(spans)]
    return sum(max(0.0, b[0] - a[1]) for a, b in itertools.pairwise(ordered))


def _resume_points(
    attempts: Sequence[AttemptHistory], rows: Mapping[int, Sequence[Row]], events: Mapping[int, Sequence[Event]]
) -> list[ResumePoint]:
    found = []
    for at, attempt in enumerate(attempts):
        resumed = of_kind(events[attempt.number], Kind.RESUMED)
        if not resumed:
            continue
        # The last verdict counts: it is 'unproven' until the repeated steps have been compared.
        event, step = resumed[-1], resumed[0].get("step") or 0
        earlier = next((a for a in reversed(attempts[:at]) if a.steps is not None), None)
        again = [r for r in rows[earlier.number] if r["step"] > step] if earlier else []
        mine = rows[attempt.number]
        gap_s = None
        if earlier and mine:
            arrived_s = attempt.began_unix_s + mine[0].get("time_s", 0.0) - mine[0].get("step_s", 0.0)
            gap_s = max(0.0, arrived_s - (earlier.began_unix_s + rows[earlier.number][-1].get("time_s", 0.0)))
        found.append(
            ResumePoint(
                step=step,
                earlier=earlier.number if earlier else None,
                attempt=attempt.number,
                event=event,
                retrained=len(again),
                retrained_s=sum(r.get("step_s", 0.0) for r in again),
                gap_s=gap_s,
            )
        )
    return found
