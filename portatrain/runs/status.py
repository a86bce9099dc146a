"""Where a run stands, derived from its run directory alone.

QUEUED      no attempt has begun
STARTING    an attempt holds the claim and has not trained yet
RUNNING     an attempt holds the claim and trains
PREEMPTING  an attempt holds the claim, has been asked to stop and is saving
REQUEUED    saved and left; the next attempt goes on from there
SUCCEEDED   DONE is there
FAILED      ended by a user's mistake, or too many failures without progress
CANCELLED   somebody asked that it end
LOST        an attempt ended without a word; the next one goes on from the last commit
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from portatrain.checkpoint.locations import location_of
from portatrain.errors import UserError
from portatrain.runs.claim import Owner
from portatrain.runs.open import open_run
from portatrain.runs.run_dir import RunDir, merge
from portatrain.system import json_files
from portatrain.system.urls import is_remote

STATES = ("QUEUED", "STARTING", "RUNNING", "PREEMPTING", "REQUEUED", "SUCCEEDED", "FAILED", "CANCELLED", "LOST")
OVER = ("SUCCEEDED", "FAILED", "CANCELLED")


@dataclass(frozen=True, kw_only=True)
class AttemptStatus:
    """One attempt. `steps`: (first, last) of its rows; `kept`: how many of them are on the run's curve."""

    number: int
    where: str
    backend: str
    mesh: str
    began_unix_s: float
    steps: tuple[int, int] | None
    kept: int
    ended: str
    """How it ended ('preempted', 'failed', ...); '' where nothing says so."""
    verdict: str
    """Of the continuity check on arrival; '' where there was none."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """One run."""

    run: str
    state: str
    owner: Owner | None
    step: int
    steps: int
    loss: float | None
    tokens_per_s: float | None
    committed: int | None
    """Step of the newest commit."""
    lost_s: float
    """Between the last kept step of each attempt and the first of the next."""
    trained_again: int
    """Steps that were trained more than once."""
    attempts: list[AttemptStatus] = field(default_factory=list)
    why: str = ""
    """What the last attempt said of its end."""

    @property
    def over(self) -> bool:
        """Whether nothing will go on by itself."""
        return self.state in OVER

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        from dataclasses import asdict

        return asdict(self)


def find(name: str, runs: str | Path) -> RunDir:
    """The run of that name in the folder `runs`, or at that path; UserError with the nearest names if there is none.
    Either may be a URL of an object store."""
    from portatrain.errors import choice

    if is_remote(name) or is_remote(runs):
        url = name if is_remote(name) else f"{str(runs).rstrip('/')}/{name}"
        if "run.json" in ((run := open_run(url)).entries() or ()):
            return run
        if is_remote(name):
            raise UserError(
                f"run {name}",
                expected="a run of portatrain, with a run.json",
                got="none below that URL",
                do="`launch list --runs URL` lists the runs below one.",
            )
    for path in (Path(runs) / name, Path(name)) if not is_remote(runs) else ():
        if _is_run(path):
            return RunDir(path)
    known = names(runs)
    if not known:
        raise UserError(
            f"run {name!r}",
            expected=f"a run in {runs}",
            got="none there",
            do="Give --runs DIR where your runs are elsewhere, or the run directory's path.",
        )
    raise choice(f"run {name!r} in {runs}", name, known)


def names(runs: str | Path) -> list[str]:
    """The runs in a folder, or below a URL; without those that are somebody else's and closed to us."""
    if is_remote(runs):
        from portatrain.runs.remote_run_dir import run_names

        return run_names(str(runs))
    folder = Path(runs)
    if not folder.is_dir():
        return []
    return sorted(p.name for p in folder.iterdir() if os.access(p, os.X_OK) and _is_run(p))


def _is_run(path: Path) -> bool:
    return (path / "run.json").exists() or (path / "jobs").is_dir()


def committed(run: RunDir) -> int | None:
    """The step of the newest checkpoint that has been committed; whether it verifies is for the restore to say."""
    place = location_of(run.checkpoints())
    return next((step for step in reversed(place.steps()) if place.committed(step)), None)


def status(run: RunDir) -> Status:
    """Where `run` stands now."""
    owner = run.owner()
    numbers = run.attempt_numbers()
    events = {n: run.rows(n, "events") for n in numbers}
    rows = {n: run.rows(n, "metrics") for n in numbers}
    curve = merge(rows)  # of the rows that were read: a run that goes on would add some in between
    attempts = [_attempt(run, n, events[n], rows[n], curve) for n in numbers]
    last = events[numbers[-1]] if numbers else []
    info = run.run_info() if (run.path / "run.json").exists() else {}
    trained = sum(len(r) for r in rows.values())
    return Status(
        run=run.path.name,
        state=_state(run, owner, numbers, last),
        owner=owner,
        step=curve[-1]["step"] if curve else 0,
        steps=info.get("recipe", {}).get("steps", 0),
        loss=curve[-1]["loss"] if curve else None,
        tokens_per_s=_rate(rows[numbers[-1]] if numbers else []),
        committed=committed(run),
        lost_s=_lost_s(attempts, rows, curve),
        trained_again=trained - len(curve),
        attempts=attempts,
        why=next((str(e["why"]) for e in reversed(last) if e.get("why")), ""),
    )


def _state(run: RunDir, owner: Owner | None, numbers: list[int], last: list[dict[str, Any]]) -> str:
    if run.is_done:
        return "SUCCEEDED"
    kinds = [event["event"] for event in last]
    if run.marked("CANCELLED"):
        return "PREEMPTING" if owner is not None and numbers and "left" not in kinds else "CANCELLED"
    if "gave_up" in kinds:
        return "FAILED" if owner is None else "STARTING"
    if owner is not None:
        if not numbers or "left" in kinds:
            return "STARTING"
        if "stopping" in kinds:
            return "PREEMPTING"
        return (
            "RUNNING"
            if (run.path / "attempts" / str(numbers[-1]) / "metrics.jsonl").exists()
            and run.rows(numbers[-1], "metrics")
            else "STARTING"
        )
    if not numbers:
        return "QUEUED"
    how = ended(last)
    if how == "failed":
        return "FAILED" if "left" not in kinds else "REQUEUED"
    return "REQUEUED" if how else "LOST"


def ended(events: list[dict[str, Any]]) -> str:
    """How an attempt ended, by its events: as its supervisor saw it, else as it said itself; '' where it did not."""
    for kind, key in (("left", "outcome"), ("end", "status")):
        for event in reversed(events):
            if event["event"] == kind:
                return str(event.get(key, ""))
    return "hung" if any(event["event"] == "hang" for event in events) else ""


def _attempt(
    run: RunDir, number: int, events: list[dict[str, Any]], rows: list[dict[str, Any]], curve: list[dict[str, Any]]
) -> AttemptStatus:
    path = run.path / "attempts" / str(number) / "attempt.json"
    about = json_files.read_json(path) if path.exists() else {}
    place = " ".join(str(about[k]) for k in ("cluster", "host") if about.get(k))
    seams = [e.get("verdict", "") for e in events if e["event"] == "resumed"]
    return AttemptStatus(
        number=number,
        where=place,
        backend=str(about.get("backend", "")),
        mesh=str(about.get("mesh", "")),
        began_unix_s=float(about.get("began_unix_s", events[0]["unix_s"] if events else 0.0)),
        steps=(rows[0]["step"], rows[-1]["step"]) if rows else None,
        kept=sum(row["attempt"] == number for row in curve),
        ended=ended(events),
        verdict=seams[-1] if seams else "",
    )


def _rate(rows: list[dict[str, Any]]) -> float | None:
    """Tokens a second over the last ten steps, the first of an attempt left out: it compiles."""
    recent = [row for row in rows[1:][-10:] if row.get("step_s")]
    if not recent:
        return None
    tokens = sum(row["tokens_per_s"] * row["step_s"] for row in recent)
    return tokens / sum(row["step_s"] for row in recent)


def _lost_s(attempts: list[AttemptStatus], rows: dict[int, list[dict[str, Any]]], curve: list[dict[str, Any]]) -> float:
    began = {a.number: a.began_unix_s for a in attempts}
    spans: dict[int, tuple[float, float]] = {}
    for row in curve:
        n = row["attempt"]
        now_s = began[n] + row["time_s"]
        first_s = spans[n][0] if n in spans else now_s - row.get("step_s", 0.0)
        spans[n] = (first_s, now_s)
    ordered = [spans[n] for n in sorted(spans)]
    return sum(max(0.0, b[0] - a[1]) for a, b in itertools.pairwise(ordered))
