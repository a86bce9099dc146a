"""Cancel RUN: a running attempt saves a checkpoint and ends, and the jobs are removed from their schedulers.

`launch resume` continues the run later.

examples:
  launch cancel tiny-lm
  launch cancel tiny-lm --no-wait
"""

from __future__ import annotations

import argparse
import sys
import time

from portatrain.commands import options
from portatrain.errors import UserError
from portatrain.runs import jobs
from portatrain.runs.history import committed
from portatrain.runs.open import find
from portatrain.runs.run_dir import RunDir

WAIT_S = 120.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_run(parser)
    parser.add_argument("--no-wait", action="store_true", help="do not wait until the attempt has ended")


def run(args: argparse.Namespace) -> int:
    found = find(args.run, args.runs)
    if found.is_done:
        raise UserError(
            f"run {found.path.name}", expected="a run that is not over", got="one that is finished", do="Nothing to do."
        )
    # The mark comes first, so that an attempt that ends from now on knows that it was not preempted. A running attempt
    # looks for the mark every two seconds, on any cluster.
    try:
        if not found.marked("CANCELLED"):
            found.put("CANCELLED", {"unix_s": time.time()})
    except OSError as error:
        raise UserError(
            f"run directory {found.where}",
            expected="permission to write there",
            got=str(error),
            do="Ask its owner to cancel it.",
        ) from error
    owner = found.owner()
    if not args.no_wait and owner is not None:
        _wait(found, first_s=20.0)
    problems = take_out(found)
    if not args.no_wait and owner is not None and not _wait(found, first_s=WAIT_S):
        print(f"still held by process {owner.pid} on {owner.host} after {WAIT_S:.0f} s", file=sys.stderr)
        problems += 1
    if found.marked("DONE"):
        print(f"{found.path.name}: finished before it could be cancelled")
        return 0
    step = committed(found)
    newest = f"step {step}" if step is not None else "none"
    if args.no_wait and found.owner() is not None:
        print(f"{found.path.name}: asked to save and stop, which takes a while; newest checkpoint: {newest}")
    else:
        print(f"{found.path.name}: cancelled; newest checkpoint: {newest}")
    return 1 if problems else 0


def take_out(run: RunDir) -> int:
    """Cancel every job of the run in its scheduler; return the number of failures."""
    from launchers.base import launcher

    problems = 0
    for job in jobs.of(run.where):
        if job.id is None:
            continue
        try:
            launcher(job.engine).cancel(job)
        except UserError as error:
            print(f"job {job.number} ({job.engine} {job.id}): {error}", file=sys.stderr)
            problems += 1
    return problems


def _wait(run: RunDir, *, first_s: float) -> bool:
    """Wait until no process holds the claim; return True if that happened within `first_s`."""
    until_s, told = time.monotonic() + first_s, False
    while run.owner() is not None:
        if time.monotonic() > until_s:
            return False
        if not told:
            print("waiting for the attempt to save and stop ...", file=sys.stderr, flush=True)
            told = True
        time.sleep(0.1 if run.locks else 1.0)
    return True
