"""What a run directory says of its attempts: what ran where, how it went on at each seam, and what that cost."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portatrain.checkpoint.locations import location_of
from portatrain.errors import UserError
from portatrain.runs.open import open_run
from portatrain.runs.run_dir import RunDir
from portatrain.system import json_files


@dataclass(frozen=True, kw_only=True)
class AttemptFacts:
    """One attempt. first, last: the steps that it trained, None where none; of them `lost` were trained again later.

    ended: 'done', 'stopped', 'interrupted', 'preempted', 'failed', or 'lost' where nothing tells. began_s, ended_s:
    Unix times, the last one of the last that it wrote. plan: what was planned, if that was recorded.
    """

    number: int
    backend: str
    device: str
    mesh: str
    framework: str
    first: int | None
    last: int | None
    lost: int
    ended: str
    began_s: float
    ended_s: float
    step_s: float | None
    memory_bytes: int | None
    plan: Mapping[str, Any] | None

    @property
    def where(self) -> str:
        return f"{self.backend} on {self.device}" + (f", {self.mesh}" if self.mesh not in ("", "1") else "")


@dataclass(frozen=True, kw_only=True)
class Seam:
    """Where an attempt went on from a checkpoint. event: the verdict with its numbers, as recorded.

    retrained_s: the time of the steps after the checkpoint that an earlier attempt had trained already. gap_s: from
    the last that the earlier one wrote to the end of the first step here, less that step.
    """

    step: int
    earlier: int | None
    attempt: int
    event: Mapping[str, Any]
    retrained: int
    retrained_s: float
    gap_s: float | None


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """A run; `curve` and `evals` as `RunDir` gives them."""

    name: str
    state: str
    steps: int
    recipe: Mapping[str, Any]
    recipe_sha256: str
    curve: Sequence[Mapping[str, Any]]
    evals: Sequence[Mapping[str, Any]]
    attempts: Sequence[AttemptFacts]
    seams: Sequence[Seam]
    checkpoints: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    skipped: Sequence[int]

    @property
    def lost_s(self) -> float:
        return sum(s.retrained_s + (s.gap_s or 0.0) for s in self.seams)


def gather(where: Path | str) -> RunFacts:
    """Everything that the report shows. UserError for a folder or URL that is no run directory."""
    run = open_run(where)
    path = run.path
    if not (path / "run.json").is_file():
        there = run.entries() is not None
        raise UserError(
            f"run directory {where}",
            expected="a run of portatrain, with a run.json",
            got="a file" if path.is_file() else "none in it" if there else "no such folder",
            do="Give the folder or URL that `portatrain train --run-dir` or `launch` made.",
        )
    info, summary = run.run_info(), run.summary()
    numbers = run.attempt_numbers()
    rows = {n: run.rows(n, "metrics") for n in numbers}
    events = {n: run.rows(n, "events") for n in numbers}
    curve = run.curve()
    kept = {(row["attempt"], row["step"]) for row in curve}
    attempts = [_attempt(path, n, rows[n], events[n], kept) for n in numbers]
    return RunFacts(
        name=info.get("name", path.name),
        state=_state(run, attempts),
        steps=int(info["recipe"].get("steps", 0)),
        recipe=info["recipe"],
        recipe_sha256=info.get("recipe_sha256", ""),
        curve=curve,
        evals=run.events("eval"),
        attempts=attempts,
        seams=_seams(attempts, rows, events),
        checkpoints=_checkpoints(run),
        summary=summary,
        skipped=[row["step"] for row in curve if row.get("skipped")],
    )


def _state(run: RunDir, attempts: Sequence[AttemptFacts]) -> str:
    if run.is_done:
        return "done"
    if run.marked("CANCELLED"):
        return "cancelled"
    if run.owner() is not None or (run.path / "claim").exists():
        return "running, or ended without a word"
    return attempts[-1].ended if attempts else "not begun"


def _attempt(
    path: Path, number: int, rows: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]], kept: set
) -> AttemptFacts:
    folder = path / "attempts" / str(number)
    about = json_files.read_json(folder / "attempt.json") if (folder / "attempt.json").exists() else {}
    plan = json_files.read_json(folder / "plan.json") if (folder / "plan.json").exists() else None
    began_s = float(about.get("began_unix_s", 0.0))
    times = [float(e["unix_s"]) for e in events if e.get("unix_s")]
    if rows:
        times.append(began_s + float(rows[-1]["time_s"]))
    steady = [float(r["step_s"]) for r in rows[2:] if r.get("step_s") and not r.get("skipped")]
    peaks = [int(r["memory_bytes"]) for r in rows if r.get("memory_bytes")]
    ends = [e for e in events if e["event"] == "end"]
    devices = about.get("devices", 1)
    return AttemptFacts(
        number=number,
        backend=str(about.get("backend", "?")),
        mesh=str(about.get("mesh", "")),
        device=f"{devices} x {about.get('device', '?')}",
        framework=str(about.get("framework", "")),
        first=rows[0]["step"] if rows else None,
        last=rows[-1]["step"] if rows else None,
        lost=sum((number, r["step"]) not in kept for r in rows),
        ended=ends[-1]["status"] if ends else "lost",
        began_s=began_s,
        ended_s=max(times, default=began_s),
        step_s=statistics.median(steady) if steady else None,
        memory_bytes=max(peaks, default=None),
        plan=plan,
    )


def _seams(
    attempts: Sequence[AttemptFacts],
    rows: Mapping[int, Sequence[Mapping[str, Any]]],
    events: Mapping[int, Sequence[Mapping[str, Any]]],
) -> list[Seam]:
    found = []
    for at, attempt in enumerate(attempts):
        resumed = [e for e in events[attempt.number] if e["event"] == "resumed"]
        if not resumed:
            continue
        # The last verdict counts: 'unproven' at first, then what the steps trained again said.
        event, step = resumed[-1], int(resumed[0]["step"])
        earlier = next((a for a in reversed(attempts[:at]) if a.last is not None), None)
        again = [r for r in rows[earlier.number] if r["step"] > step] if earlier else []
        mine = rows[attempt.number]
        gap_s = None
        if earlier and mine:
            arrived_s = attempt.began_s + float(mine[0]["time_s"]) - float(mine[0].get("step_s", 0.0))
            left_s = earlier.began_s + float(rows[earlier.number][-1]["time_s"])
            gap_s = max(0.0, arrived_s - left_s)
        found.append(
            Seam(
                step=step,
                earlier=earlier.number if earlier else None,
                attempt=attempt.number,
                event=event,
                retrained=len(again),
                retrained_s=sum(float(r.get("step_s", 0.0)) for r in again),
                gap_s=gap_s,
            )
        )
    return found


def _checkpoints(run: RunDir) -> list[dict[str, Any]]:
    """Steps, whether committed, and bytes: from COMMIT and the sizes of the files, without reading them."""
    place, found = location_of(run.checkpoints()), []
    for step in place.steps():
        sizes = place.sizes(step)
        row: dict[str, Any] = {"step": step, "committed": "COMMIT" in sizes, "bytes": sum(sizes.values())}
        if row["committed"]:
            try:
                row["save"] = json.loads(place.commit(step))["save"]
            except (ValueError, KeyError):
                row["committed"] = False
        found.append(row)
    return found
