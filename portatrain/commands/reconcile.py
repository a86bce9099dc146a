"""Make the schedulers agree with the record of RUN, or with the records of all runs in the folder.

Releases a held job of a run that no job trains. Removes jobs of runs that are over, and portatrain's jobs that no run
has recorded. Names every unfinished run that no job will continue.

examples:
  launch reconcile
  launch reconcile tiny-lm
  launch reconcile --dry-run
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from portatrain.commands import options
from portatrain.errors import UserError
from portatrain.runs import jobs
from portatrain.runs.history import read_history
from portatrain.runs.open import find, names, open_run
from portatrain.runs.run_dir import RunDir


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", nargs="?", help="the name of a run, or its run directory (default: all)")
    options.add_runs(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the changes without making them")


def run(args: argparse.Namespace) -> int:
    found = [find(args.run, args.runs)] if args.run else [open_run(f"{args.runs}/{n}") for n in names(args.runs)]
    done = 0
    for one in found:
        try:
            for text in reconcile(one, dry_run=args.dry_run):
                print(f"{one.path.name}: {text}")
                done += 1
        except (UserError, OSError) as error:
            print(f"{one.path.name}: {error}", file=sys.stderr)
    if not done:
        print(f"{len(found)} run{'' if len(found) == 1 else 's'}: nothing to do")
    return 0


def reconcile(run: RunDir, *, dry_run: bool = False) -> Iterator[str]:
    """Reconcile `run`; yield a line for every change, also with `dry_run`, which changes nothing."""
    from launchers.base import launcher

    now, there = read_history(run), [job for job in jobs.of(run.where) if job.detached]
    by_name = {job.name: job for job in there}
    said = {}
    for engine in {job.engine for job in there}:
        prefix = next(iter(by_name)).rsplit("-", 1)[0] + "-"
        for name, id in launcher(engine).names(prefix).items():
            known = by_name.get(name)
            if known is None:
                yield f"job {id} ({engine}, {name}) is in no record: removed"
                if not dry_run:
                    orphan = jobs.Job(run_dir=run.where, recipe="", cluster="", engine=engine, id=id)
                    launcher(engine).cancel(orphan)
            elif known.id is None:
                yield f"job {known.number} was submitted as {id} before its launch was interrupted: recorded"
                by_name[name] = known if dry_run else known.submitted(id)
    for job in by_name.values():
        said[job.number] = launcher(job.engine).describe(job)
    alive = {n for n, s in said.items() if s.state in ("pending", "held", "running")}
    if now.over:
        for job in by_name.values():
            if job.number in alive and now.owner is None:
                yield f"is {now.state}; job {job.number} ({job.engine} {job.id}, {said[job.number].state}) removed"
                if not dry_run:
                    launcher(job.engine).cancel(job)
        return
    if now.owner is None:
        for job in by_name.values():
            if said[job.number].state == "held":
                yield f"no job trains it; job {job.number} ({job.engine} {job.id}) was held: released"
                if not dry_run:
                    launcher(job.engine).release(job)
        if not alive:
            yield f"is {now.state} and no scheduler has a job for it: continue it with `launch resume {run.path.name}`"
