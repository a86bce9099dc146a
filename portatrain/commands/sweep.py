"""Train RECIPE once for every point of a grid, and compare the runs.

Each point is a run like any other, begun as `launch` begins it, and called after its values: tiny-lm-lr0.001-layers4.
On this machine (--cluster local) one is trained after the other, or --jobs N at once; a scheduler gets all at once. The
command says how far they are until the last one has ended, and then writes the page of `portatrain compare`.

The same command goes on where it was: it leaves finished runs alone, waits for those that are still being trained, and
resumes all others from their newest checkpoints. So it may be killed at any moment. Ctrl-C saves and stops the runs of
this machine; jobs of a scheduler go on.

examples:
  portatrain sweep tiny-lm --grid optimizer.lr=1e-3,3e-3,1e-2
  portatrain sweep tiny-lm --grid optimizer.lr=1e-3,3e-3 --grid model.layers=2,4 --set steps=200 --jobs 2
  portatrain sweep my_recipe.py --grid optimizer=AdamW,Lion --run rules --dry-run
  portatrain sweep llama3-1b --grid optimizer.lr=3e-4,6e-4 --cluster lab-h100 --run rates
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from portatrain.commands import options, submit
from portatrain.system.exit_codes import FOUND, INTERRUPTED, OK
from portatrain.system.urls import is_remote

if TYPE_CHECKING:
    from portatrain.commands.sweep_runs import PointRun

EVERY_S, TOLD_EVERY_S = 0.5, 10.0
SAVING_S = 120.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_recipe(parser)
    options.add_init(parser)
    parser.add_argument(
        "--grid",
        metavar="FIELD=VALUE,...",
        action="append",
        default=[],
        required=True,
        help="the values of a field of the recipe, as --set takes them; repeat it for more fields: every combination "
        "is a point. Commas within brackets belong to a value",
    )
    parser.add_argument(
        "--cluster", metavar="NAME[,NAME...]", default="local", help="as for launch (default: local, this machine)"
    )
    parser.add_argument(
        "--jobs", metavar="N", type=int, help="train N runs at once (default: 1 on this machine; else all)"
    )
    parser.add_argument("--run", metavar="NAME", help="the runs are called NAME-... (default: the recipe's name)")
    options.add_runs(parser, "for")
    parser.add_argument("--out", metavar="FILE", type=Path, help="the page (default: NAME-compare.html in DIR)")
    options.add_backend(parser)
    parser.add_argument("--mesh", metavar="AXES", help="fsdp=4,tensor=2 (default: the planned one)")
    parser.add_argument("--devices", metavar="N", type=int, help="each run uses N devices; on a CPU, simulated ones")
    parser.add_argument("--max-restarts", metavar="N", type=int, default=3, help="as for launch (default: 3)")
    options.add_track(parser)
    parser.add_argument("--no-check", action="store_true", help="skip `portatrain check`, as for launch")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and what would be done; start nothing")


def run(args: argparse.Namespace) -> int:
    from launchers import targets
    from launchers.base import launcher
    from portatrain.commands import sweep_points as plan
    from portatrain.commands.sweep_runs import PointRun
    from portatrain.recipe import apply_overrides, load_recipe

    options.positive("--jobs", args.jobs)
    options.positive("--devices", args.devices)
    options.check_track("--track", args.track)
    fields = plan.grid(args.grid, args.overrides)
    recipe = load_recipe(args.recipe, cwd=Path.cwd())
    base = args.run or apply_overrides(recipe, args.overrides).name
    submit.run_path(base, args.runs)  # raises for a name that no run may have
    points = plan.points(base, recipe, fields, args.overrides)
    args.clusters = list(dict.fromkeys(name.strip() for name in args.cluster.split(",") if name.strip()))
    wanted = targets.targets(args.clusters, args.recipe, mesh=args.mesh, devices=args.devices, backend=args.backend)
    at_once = args.jobs or (len(points) if all(t.engine and launcher(t.engine).queues for t in wanted) else 1)
    runs = [PointRun(point, submit.run_path(point.name, args.runs), args) for point in points]
    for one in runs:
        one.check()  # before any begins
    if args.dry_run:
        return _dry_run(runs, args)
    counts = Counter(one.look() for one in runs)
    print(
        f"sweep {base}: {len(runs)} runs, {min(at_once, len(runs))} at once; {counts['done']} done, {counts['active']} "
        f"being trained, {counts['stopped']} to resume, {counts['new']} new",
        flush=True,
    )
    with _terminated_as_interrupted():
        try:
            _train(runs, at_once)
        except KeyboardInterrupt:
            return _stop(runs)
    return _end(runs, args, base)


def _dry_run(runs: Sequence[PointRun], args: argparse.Namespace) -> int:
    what = {"done": "is done", "active": "is being trained", "stopped": "would be resumed", "new": "would begin"}
    for one in runs:
        words = ["launch", "--cluster", args.cluster, args.recipe, "--run", one.point.name]
        words += [word for given in one.point.overrides for word in ("--set", given)]
        print(f"{shlex.join(words)}    # {what[one.look()]}")
    return OK


def _train(runs: Sequence[PointRun], at_once: int) -> None:
    """Start or resume what is not done, `at_once` at a time, until all have ended."""
    left = [one for one in runs if one.look() in ("stopped", "new")]
    active = [one for one in runs if one.look() == "active"]
    for one in active:
        _say(runs, one, "is being trained already; waiting for it")
    checked, told_s = False, time.monotonic()
    while left or active:
        began_s = time.monotonic()
        for one in [one for one in active if one.look() != "active"]:
            active.remove(one)
            if one.look() == "done" or one.started:
                _say(runs, one, one.ended())
            else:  # another process had it, and left it
                left.insert(0, one)
        while left and len(active) < at_once:
            one = left.pop(0)
            _say(runs, one, one.start(check=not checked))
            checked = True
            active.append(one)
        if active and time.monotonic() > told_s + TOLD_EVERY_S:
            told_s = time.monotonic()
            done = sum(one.look() == "done" for one in runs)
            print(f"{done} of {len(runs)} done; {'; '.join(one.progress() for one in active[:4])}", flush=True)
        # Looking at many runs takes a while: not more than a tenth of the time.
        time.sleep(max(EVERY_S, 9 * (time.monotonic() - began_s)) if left or active else 0)


def _say(runs: Sequence[PointRun], one: PointRun, what: str) -> None:
    print(f"[{runs.index(one) + 1}/{len(runs)}] {one.point.name} {what}", flush=True)


def _stop(runs: Sequence[PointRun]) -> int:
    """Save and stop what this machine trains; return the exit code."""
    here = [one for one in runs if one.look() == "active" and one.stop()]
    until_s = time.monotonic() + SAVING_S
    if here:
        print(f"\nsaving and stopping {', '.join(one.point.name for one in here)} ...", file=sys.stderr, flush=True)
    while any(one.look() == "active" for one in here) and time.monotonic() < until_s:
        time.sleep(0.2)
    on = [one.point.name for one in runs if one.look() == "active"]
    more = f" Still being trained: {', '.join(on)}." if on else ""
    print(f"\ninterrupted: the same command goes on from here.{more}", file=sys.stderr)
    return INTERRUPTED


def _end(runs: Sequence[PointRun], args: argparse.Namespace, base: str) -> int:
    from portatrain.commands import compare
    from portatrain.runs.comparison import read

    out = args.out or (Path() if is_remote(args.runs) else Path(args.runs)) / f"{base}-compare.html"
    found = compare.compared(read([one.where for one in runs]))
    compare.write(found, out)
    compare.show(found)
    print(f"{out}: {len(runs)} runs")
    failed = [one for one in runs if one.look() != "done"]
    for one in failed:
        print(f"{one.point.name} {one.ended()}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} of {len(runs)} did not finish; the same command tries them again", file=sys.stderr)
    return FOUND if failed else OK


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C within the block."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
