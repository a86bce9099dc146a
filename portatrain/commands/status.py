"""Show the state of RUN: step, loss, speed, time lost, jobs, and every attempt with its cluster and verdict.

The data comes from the run directory. With --ask, the schedulers' answers about the jobs are added, as a hint.

examples:
  launch status tiny-lm
  launch status tiny-lm --ask
  launch status runs/tiny-lm --json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from portatrain.commands import options
from portatrain.errors import UserError
from portatrain.runs import jobs, trust
from portatrain.runs.history import WAITING, History, errors, read_history
from portatrain.runs.open import find
from portatrain.system import terminal
from portatrain.system.text import age
from portatrain.system.urls import is_remote


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_run(parser)
    parser.add_argument("--ask", action="store_true", help="also ask the schedulers about the jobs")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(args: argparse.Namespace) -> int:
    found = find(args.run, args.runs)
    now = read_history(found)
    there: list[dict[str, object]] = [
        {"job": j.number, "engine": j.engine, "cluster": j.cluster, "id": j.id, **(_asked(j) if args.ask else {})}
        for j in jobs.of(found.where)
    ]
    if args.json:
        print(json.dumps({**now.as_json(), "jobs": there}, indent=1))
        return 0
    _print(now, there)
    return 0


def _asked(job: jobs.Job) -> dict[str, str]:
    from launchers.base import launcher

    try:
        said = launcher(job.engine).describe(job)
    except UserError as error:
        return {"scheduler": f"no answer: {error}"}
    return {"scheduler": " ".join(filter(None, (said.state, said.where, said.reason and f"({said.reason})")))}


def _print(now: History, there: list[dict[str, object]]) -> None:
    from rich.table import Table
    from rich.text import Text

    console = terminal.console(180)
    loss = f", loss {now.loss:.4f}" if now.loss is not None else ""
    rate = f", {now.tokens_per_s:,.0f} tokens/s" if now.tokens_per_s and now.state == "RUNNING" else ""
    console.print(f"{now.run}: {now.state}, step {now.step}/{now.steps}{loss}{rate}", highlight=False, markup=False)
    if now.parent is not None:
        text = f"forked from {now.parent.get('run')} at step {now.parent.get('step')}"
        console.print(text, highlight=False, markup=False)
    for change in now.changes[now.parent is not None :]:
        fields = ", ".join(f"{name} {was!r} to {new!r}" for name, (was, new) in sorted(change.fields.items()))
        why = f": {change.reason}" if change.reason else ""
        console.print(f"changed after step {change.step}{why}; {fields}", highlight=False, markup=False)
    if now.owner is not None:
        console.print(f"held by process {now.owner.pid} on {now.owner.host}", highlight=False, markup=False)
    saved = f"step {now.committed}" if now.committed is not None else "none"
    console.print(
        f"newest checkpoint: {saved}; between attempts: {now.lost_s:.0f} s; repeated steps: {now.trained_again}",
        highlight=False,
    )
    if now.why:
        console.print(f"last attempt: {now.why}", highlight=False, markup=False)
    for event in now.disagreements:
        console.print(f"attempt {event['attempt']}: {trust.in_words(event)}", highlight=False, markup=False)
    for step, why in now.doubted.items():
        console.print(f"checkpoint of step {step} is not trusted: {why}", highlight=False, markup=False)
    if now.attempts and now.attempts[-1].ended == "failed":
        kept = errors(Path(now.where, "attempts", str(now.attempts[-1].number)))
        if kept and not is_remote(now.where):
            console.print(f"full error: {kept[0]}", highlight=False, markup=False)
    if now.attempts:
        table = Table("attempt", "where", "backend", "mesh", "began", "steps", "kept", "resumed", "ended")
        for one in now.attempts:
            steps = f"{one.steps[0]}-{one.steps[1]}" if one.steps else "-"
            table.add_row(
                str(one.number),
                Text(one.where),
                Text(one.backend),
                Text(one.mesh),
                f"{age(one.began_unix_s)} ago",
                steps,
                str(one.kept),
                Text(one.verdict or "-"),
                Text(one.ended or "-"),
            )
        console.print(table)
        if any(one.again for one in now.attempts):
            console.print(
                "kept: the number of steps of the attempt that are on the run's curve; a later attempt repeated the "
                "others.",
                style="dim",
            )
    if there:
        table = Table("job", "engine", "cluster", "id", *(["scheduler"] if "scheduler" in there[0] else []))
        for job in there:
            table.add_row(*(Text(str(v if v is not None else "-")) for v in job.values()))
        console.print(table)
    if said := _next(now):
        console.print(said, style="dim", markup=False, highlight=False, soft_wrap=True)


def _next(now: History) -> str:
    """Return what a user can do with a run that ended before its last step; '' for any other run."""
    if now.state not in (*WAITING, "FAILED", "CANCELLED"):
        return ""
    place = f"step {now.committed}" if now.committed is not None else "the first step, because no checkpoint was saved"
    resumes = f"`launch resume {now.run}` continues from {place}"
    number = now.attempts[-1].number if now.attempts else None
    logs = [] if number is None or is_remote(now.where) else Path(now.where, "attempts", str(number)).glob("rank-*.log")
    shows = f"`launch logs {now.run}` shows the output" if any(logs) or is_remote(now.where) else ""
    if now.state == "FAILED":
        resumes = f"correct what failed, then {resumes}; with --new-code it uses the code that you changed"
    return "; ".join(part for part in (shows, resumes) if part) + "."
