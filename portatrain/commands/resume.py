"""Resume RUN from its newest checkpoint, on its previous clusters or on the clusters of --cluster.

Use it for a run that was stopped, cancelled or lost, or that failed. The run uses its own copy of the code, from its
run directory; --new-code replaces that by the code that is installed here, and records the change.

--set changes the recipe of the run from its newest checkpoint on. Some fields leave what was trained as it was (the
number of steps under a constant learning rate, evaluations, checkpoints): they need no reason, and a finished run goes
on. All others need --reason, and the record keeps both values, the reason, and what the change alone did to loss,
gradient and update. `portatrain fork` makes the change in a new run instead, and leaves this one as it is.

examples:
  launch resume tiny-lm
  launch resume tiny-lm --cluster lab-h100
  launch resume tiny-lm --cluster local --backend torch --devices 2 --detach
  launch resume tiny-lm --set steps=2000
  portatrain resume tiny-lm --set optimizer.lr=1e-4 --reason "spikes since step 800"
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from portatrain.checkpoint.locations import location_of
from portatrain.commands import options
from portatrain.commands.recorded import check_data, goes_on, recipe_file, recorded_jobs
from portatrain.errors import UserError
from portatrain.recipe import Recipe, apply_overrides, load_recipe
from portatrain.recipe.changing import Kind, changed, difference
from portatrain.runs import changes, jobs
from portatrain.runs.changes import Change
from portatrain.runs.claim import in_use
from portatrain.runs.open import find
from portatrain.runs.run_dir import RunDir, code_sha256
from portatrain.system.text import counted
from portatrain.system.urls import is_remote

LEAVING_S = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_run(parser)
    parser.add_argument(
        "--cluster", metavar="NAME[,NAME...]", help="the clusters to train on (default: the run's previous ones)"
    )
    previous = "that of the previous attempt; with --cluster, as for launch"
    options.add_backend(parser, previous)
    parser.add_argument("--mesh", metavar="AXES", help=f"fsdp=4,tensor=2 (default: {previous})")
    parser.add_argument(
        "--devices",
        metavar="N",
        type=int,
        help=f"use N devices; on a CPU, N simulated ones (default: {previous.replace('that', 'those')})",
    )
    parser.add_argument("--detach", action="store_true", help="--cluster local: train in the background")
    parser.add_argument("--max-restarts", metavar="N", type=int, help="as for launch (default: the previous value)")
    options.add_profile(parser)
    parser.add_argument(
        "--new-code", action="store_true", help="use the code that is installed here instead of the run's copy"
    )
    options.add_changes(parser)
    parser.add_argument("--reason", metavar="TEXT", help="why the run is changed; it is recorded")
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted, without submitting it")


def run(args: argparse.Namespace) -> int:
    found = find(args.run, args.runs)
    _check(found, changes_it=bool(args.overrides))
    before = recorded_jobs(found)
    if not before:
        raise UserError(
            f"run {found.path.name}",
            expected="a run that `launch` began",
            got="one that `portatrain train` began",
            do=f"Continue with: portatrain train RECIPE --run-dir {found.where}.",
        )
    last = before[-1]
    _check_idle(found, [job for job in before if job.number])
    if args.new_code and last.source:
        before = [replace(job, recipe=last.source) for job in before]
    last = before[-1]
    recipe = apply_overrides(load_recipe(recipe_file(last), cwd=Path(last.cwd or ".")), last.overrides)
    recipe = changes.settled(found.path, recipe)
    change = None
    if args.overrides:
        recipe, change = change_of(found, recipe, args.overrides, args.reason)
    options.check_profile(args.profile, recipe.steps)
    if change is None and (found.path / "run.json").exists():
        found.check(recipe, cancelled_too=True)
    if (found.path / "run.json").exists() and last.code is None and not args.new_code:
        _check_code(found, recipe)
    new = _jobs(args, found, before, recipe)
    from launchers.base import launcher
    from portatrain.backends.program import make_program

    for job in new:
        launcher(job.engine).check_settings(job)
        launcher(job.engine).check(job)
    if change is not None:
        for job in new:
            make_program(recipe, mesh=job.mesh or "")  # reports what does not fit before anything is recorded
        print(in_words(change))
    if args.dry_run:
        for job in new:
            print(launcher(job.engine).materialize(replace(job, number=job.number or last.number + 1)))
        return 0
    if change is not None:
        _record(found, change)
    found.remove("CANCELLED")
    if len(new) == 1 and not new[0].detached:
        from portatrain.commands import foreground

        return foreground.run(new[0])
    from launchers.submission import submit

    submit(found, recipe, new, code=None if args.new_code else last.code)
    return 0


def _check_code(run: RunDir, recipe: Recipe) -> None:
    """Raise UserError if a run without a copy of its code began with other code than the code here."""
    if run.run_info().get("code_sha256") != code_sha256(recipe):
        raise UserError(
            f"run {run.path.name}",
            expected="the code that it began with (portatrain, and the recipe's modules)",
            got="code that has been changed since",
            do="Restore that code, or continue with the code here: --new-code.",
        )


def change_of(run: RunDir, recipe: Recipe, overrides: Sequence[str], reason: str | None) -> tuple[Recipe, Change]:
    """Return the recipe that --set makes of `recipe`, and the change for the record.

    Raises:
        UserError: the change needs a reason, it changes nothing, or a run cannot be changed in that way.
    """
    step = run.committed() or 0
    new = changed(recipe, overrides, step)
    found = difference(recipe, new, step, since=changes.last_decided(run.path))
    if corpus := found.named(Kind.CORPUS):
        raise UserError(
            f"--set {corpus[0]}",
            expected="a change that keeps the corpus, which is packed in the folder of the run",
            got=f"another value of {', '.join(corpus)}",
            do=f"Go on with other data in a new run: portatrain fork {run.path.name} --at {step} --set ... --run NEW.",
        )
    if found.decides and not (reason or "").strip():
        why = f" ({found.unproved})" if found.unproved else ""
        raise UserError(
            f"run {run.path.name}: --set",
            expected="a reason, since this change affects all later steps",
            got=f"no reason for {', '.join(found.named())}{why}",
            do='Say why, for the record: --reason "...". Or leave this run as it is: portatrain fork '
            f"{run.path.name} --at {step} --set ... --run NEW.",
        )
    if run.is_done and new.steps <= step:
        raise UserError(
            f"run {run.path.name}",
            expected=f"more than the {counted(step, 'steps')} that it has trained, since it is finished",
            got=f"steps={new.steps}",
            do="Give more: --set steps=N.",
        )
    if step:
        goes_on(location_of(run.checkpoints()), step, new, recipe)
    check_data(new, run.data())
    return new, changes.change(found, new, step, reason=reason or "", overrides=overrides)


def _record(run: RunDir, change: Change) -> None:
    """Record a change, under the claim, unless the run went on in the meantime."""
    claim = run.acquire()
    try:
        with claim.guard():
            if (run.committed() or 0) != change.step:
                raise UserError(
                    f"run {run.path.name}",
                    expected=f"step {change.step} as its newest checkpoint",
                    got="a newer one: another process trained it in the meantime",
                    do="Stop it with `launch cancel`, then give the command again.",
                )
            run.change(change)
    finally:
        claim.release()


def in_words(change: Change) -> str:
    """Return a change for a person, one line a field."""
    rows = [f"  {name}: {was!r} -> {now!r}" for name, (was, now) in sorted(change.fields.items())]
    what = "from there on the run is another" if change.decides else "the past stays as it was"
    return "\n".join([f"changed after step {change.step} ({what})", *rows])


def _check(run: RunDir, *, changes_it: bool = False) -> None:
    if run.is_done and not changes_it:
        raise UserError(
            f"run {run.path.name}",
            expected="a run that is not over",
            got="one that is finished",
            do="Train it longer with --set steps=N, or start another run with launch --run NAME.",
        )
    owner = run.owner()
    if owner is not None:
        raise in_use(run.where, owner)


def _check_idle(run: RunDir, there: list[jobs.Job]) -> None:
    """Raise UserError if a scheduler still has a job of the run, because a second one would conflict with it."""
    from launchers.base import JobState, launcher

    for job in there:
        if job.id is None:
            continue
        until_s = time.monotonic() + LEAVING_S
        while True:
            try:
                said = launcher(job.engine).describe(job)
            except UserError as error:
                print(f"job {job.number} could not be asked for: {error}", file=sys.stderr)
                said = JobState(state="unknown")
            if said.state != "running" or time.monotonic() > until_s:
                break
            time.sleep(0.2)  # the job has released the claim and is about to end
        if said.state in ("pending", "held", "running"):
            raise UserError(
                f"run {run.path.name}",
                expected="a run without a job in a scheduler",
                got=f"job {job.number} ({job.engine} {job.id}), {said.state} {said.reason}".rstrip(),
                do=f"Wait for it; `launch reconcile {run.path.name}` releases a held one, `launch cancel` ends all.",
            )


def _jobs(args: argparse.Namespace, run: RunDir, before: list[jobs.Job], recipe: Recipe) -> list[jobs.Job]:
    from launchers import targets

    options.positive("--devices", args.devices)
    last = before[-1]
    restarts = last.max_restarts if args.max_restarts is None else args.max_restarts
    more: dict[str, Any] = {"max_restarts": restarts, "number": 0, "id": None, "submitted_unix_s": None}
    more["profile"] = args.profile  # the previous range is over, or would be profiled again
    if args.cluster is None:
        newest = {job.cluster: job for job in before}  # the newest job of each cluster
        changes: dict[str, Any] = {k: v for k in ("backend", "mesh", "devices") if (v := getattr(args, k)) is not None}
        if args.detach:
            changes["detached"] = True
        return [replace(job, **more, **changes) for job in newest.values()]
    names = list(dict.fromkeys(name.strip() for name in args.cluster.split(",") if name.strip()))
    wanted = targets.targets(names, last.recipe, mesh=args.mesh, devices=args.devices, backend=args.backend)
    return [
        replace(
            last,
            **more,
            cluster=t.name,
            engine=t.engine,
            backend=t.backend,
            mesh=t.mesh,
            devices=t.devices,
            hosts=t.hosts,
            processes=t.processes,
            options=t.options,
            cluster_shape=t.cluster_shape,
            track=last.track or t.track,
            cwd=last.cwd or os.getcwd(),
            detached=t.engine != "local" or args.detach,
            run_dir=run.where if is_remote(run.where) else str(run.path.absolute()),
        )
        for t in targets.fitting(wanted, recipe)
    ]
