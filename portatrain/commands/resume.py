"""Resume RUN from its newest checkpoint, on its previous clusters or on the clusters of --cluster.

Use it for a run that was stopped, cancelled or lost, or that failed. The run uses its own copy of the code, from its
run directory; --new-code replaces that by the code that is installed here, and records the change.

examples:
  launch resume tiny-lm
  launch resume tiny-lm --cluster lab-h100
  launch resume tiny-lm --cluster local --backend torch --devices 2 --detach
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from portatrain.commands import options
from portatrain.errors import UserError
from portatrain.recipe import Recipe, apply_overrides, load_recipe
from portatrain.runs import jobs, rows
from portatrain.runs.claim import in_use
from portatrain.runs.open import find
from portatrain.runs.run_dir import RunDir, code_sha256
from portatrain.system.urls import is_remote

LEAVING_S = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_run(parser)
    parser.add_argument(
        "--cluster", metavar="NAME[,NAME...]", help="the clusters to train on (default: the run's previous ones)"
    )
    options.add_backend(parser)
    parser.add_argument("--mesh", metavar="AXES", help="fsdp=4,tensor=2 (default: the planned one)")
    parser.add_argument("--devices", metavar="N", type=int, help="use N devices; on a CPU, N simulated ones")
    parser.add_argument("--detach", action="store_true", help="--cluster local: train in the background")
    parser.add_argument("--max-restarts", metavar="N", type=int, help="as for launch (default: the previous value)")
    options.add_profile(parser)
    parser.add_argument(
        "--new-code", action="store_true", help="use the code that is installed here instead of the run's copy"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted, without submitting it")


def run(args: argparse.Namespace) -> int:
    found = find(args.run, args.runs)
    _check(found)
    before = jobs.of(found.where) or [_of_foreground(found)]
    last = before[-1]
    _check_idle(found, [job for job in before if job.number])
    if args.new_code and last.source:
        before = [replace(job, recipe=last.source) for job in before]
    last = before[-1]
    recipe = apply_overrides(load_recipe(_here(last), cwd=Path(last.cwd or ".")), last.overrides)
    options.check_profile(args.profile, recipe.steps)
    if (found.path / "run.json").exists():
        found.check(recipe, cancelled_too=True)
        if last.code is None and not args.new_code:
            _check_code(found, recipe)
    new = _jobs(args, found, before, recipe)
    from launchers.base import launcher

    for job in new:
        launcher(job.engine).check(job)
    if args.dry_run:
        for job in new:
            print(launcher(job.engine).materialize(replace(job, number=job.number or last.number + 1)))
        return 0
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


def _here(job: jobs.Job) -> str:
    """Return the path of the job's recipe on this machine."""
    if not is_remote(job.recipe):
        return job.recipe
    from portatrain.runs.remote_run_dir import localized

    return localized([job.recipe], job.code)[0]


def _check(run: RunDir) -> None:
    if run.is_done:
        raise UserError(
            f"run {run.path.name}",
            expected="a run that is not over",
            got="one that is finished",
            do="Start another run with launch --run NAME.",
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


def _of_foreground(run: RunDir) -> jobs.Job:
    """Return a job for a run that has only been trained in the foreground, from the record of its last attempt."""
    for number in reversed(run.attempt_numbers()):
        path = run.path / "attempts" / str(number) / "attempt.json"
        source = rows.attempt_info(path).get("source")
        if source:
            given = {"run_dir": run.where, "cluster": "local", "engine": "local", "detached": False}
            return jobs.of_row(path, {**source, **given})
    raise UserError(
        f"run {run.path.name}",
        expected="a run that `launch` began",
        got="one that `portatrain train` began",
        do=f"Continue with: portatrain train RECIPE --run-dir {run.where}.",
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
