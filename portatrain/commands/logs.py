"""Print the output of one process of an attempt; with -f, follow it across attempts until the run is over.

examples:
  launch logs tiny-lm
  launch logs -f tiny-lm
  launch logs tiny-lm --attempt 2 --rank 1
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from portatrain.commands import options
from portatrain.errors import UserError
from portatrain.runs import jobs
from portatrain.runs.events import Kind, has
from portatrain.runs.history import WAITING, errors, read_history
from portatrain.runs.open import find
from portatrain.runs.run_dir import RunDir
from portatrain.system import json_files

POLL_S = 0.3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_run(parser)
    parser.add_argument(
        "-f",
        "--follow",
        action="store_true",
        help="follow until the run ends (with --attempt: until that attempt ends)",
    )
    parser.add_argument("--attempt", metavar="N", type=int, help="the attempt (default: the last one)")
    parser.add_argument("--rank", metavar="R", type=int, default=0, help="the rank of the process (default: 0)")


def run(args: argparse.Namespace) -> int:
    found = find(args.run, args.runs)
    found.refresh(logs=True)
    numbers = found.attempt_numbers()
    if args.attempt is not None and args.attempt not in numbers:
        raise UserError(
            f"run {found.path.name}: attempt {args.attempt}",
            expected=_range(numbers),
            got=str(args.attempt),
            do="See `launch status`.",
        )
    if not numbers and not args.follow:
        return _engine_logs(found)
    number = args.attempt or (numbers[-1] if numbers else 1)
    if not args.follow and not _check(found, number, args.rank):
        return _without_logs(found, number)
    while True:
        _print(found, number, args.rank, follow=args.follow)
        if not args.follow or args.attempt is not None:
            return 0
        number = _next(found, number)
        if not number:
            return 0
        print(f"--- attempt {number}", flush=True)


def _range(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return "1, the only one"
    return f"1 to {numbers[-1]}" if numbers else "an attempt that has begun (none has)"


def _log(run: RunDir, number: int, rank: int) -> Path:
    return run.path / "attempts" / str(number) / f"rank-{rank}.log"


def _without_logs(run: RunDir, number: int) -> int:
    """Print how a foreground attempt ended and why; its output went to its terminal and was not kept."""
    one = next(a for a in read_history(run).attempts if a.number == number)
    said = f"it ended: {one.ended}" if one.ended else "it is still running"
    print(f"attempt {number} ran in the foreground and wrote to its terminal; {said}")
    kept = errors(run.path / "attempts" / str(number))
    for path in kept:
        print(path.read_text(encoding="utf-8", errors="replace").rstrip())
    if one.why and not kept:
        print(one.why)
    return 0


def _check(run: RunDir, number: int, rank: int) -> bool:
    """Return True if that rank has output, False if no rank has any; UserError if only other ranks have some."""
    if _log(run, number, rank).is_file():
        return True
    folder = _log(run, number, rank).parent
    found = (json_files.digits(p.stem[5:]) for p in folder.glob("rank-*.log"))
    there = sorted(r for r in found if r is not None)
    if not there:
        return False
    raise UserError(
        f"run {run.path.name}, attempt {number}: rank {rank}",
        expected=f"one of {', '.join(map(str, there))}",
        got=str(rank),
        do="Give --rank.",
    )


def _print(run: RunDir, number: int, rank: int, *, follow: bool) -> None:
    path, at = _log(run, number, rank), 0
    while True:
        run.refresh(logs=True)
        over = _ended(run, number)  # checked before reading, so that no output written before the end is missed
        if path.is_file():
            with path.open("rb") as file:
                file.seek(at)
                while chunk := file.read(1 << 16):
                    at += len(chunk)
                    if sys.stdout.isatty():  # a file or a pipe gets the bytes as they are
                        print(chunk.decode(errors="replace"), end="")
                    else:
                        sys.stdout.buffer.write(chunk)
                sys.stdout.flush()
        if not follow or over:
            return
        time.sleep(POLL_S if run.locks else 10 * POLL_S)


def _ended(run: RunDir, number: int) -> bool:
    events = run.rows(number, "events") if number in run.attempt_numbers() else []
    if has(events, Kind.LEFT, Kind.GAVE_UP) or max(run.attempt_numbers(), default=0) > number:
        return True
    now = read_history(run)
    return now.over or (now.state in WAITING and bool(now.attempts))


def _next(run: RunDir, number: int) -> int:
    """Wait for the attempt after `number` and return its number; 0 if the run is over."""
    while True:
        run.refresh()
        later = [n for n in run.attempt_numbers() if n > number]
        if later:
            return later[0]
        now = read_history(run)
        if now.over or (now.state in WAITING and not _queued(run)):
            return 0
        time.sleep(POLL_S if run.locks else 10 * POLL_S)


def _queued(run: RunDir) -> bool:
    from launchers.base import launcher

    for job in jobs.of(run.where):
        try:
            if launcher(job.engine).describe(job).state in ("pending", "held", "running"):
                return True
        except UserError:
            continue
    return False


def _engine_logs(run: RunDir) -> int:
    from launchers.base import launcher

    for job in jobs.of(run.where):
        for line in launcher(job.engine).logs(job):
            print(line)
    return 0
