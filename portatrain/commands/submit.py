"""Train RECIPE on a cluster. The cluster `local` is this machine, in the foreground.

--cluster takes a list of acceptable clusters, best first. The command plans each of them, and refuses those that the
recipe cannot run on, with the reason. It submits a job to each of the rest. The first job to start claims the run; if
it is preempted, the next one resumes from its checkpoint. A cluster is a name of the catalog (tpu-v5p-256, h100-64) or
of your clusters.toml, which also names the `engine` that starts jobs. The run directory runs/NAME records everything.

A recipe with a model, data source or rule of your own is first checked at small size (`portatrain check`), and
again after an edit of its file; --no-check skips it.

examples:
  launch --cluster local tiny-lm
  launch --cluster local tiny-lm --set data=TextFiles --set data.paths=my/texts --track tensorboard
  launch --cluster local tiny-vit --run first-vit --backend torch --devices 2 --detach
  launch --cluster tpu-v5p-256,h100-64 llama3-8b --run long --max-restarts 10
  launch --cluster tpu-v5p-256 llama3-8b --dry-run
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from launchers import targets
from portatrain.commands import options
from portatrain.commands.unseen import check_unseen
from portatrain.errors import UserError
from portatrain.system.text import counted
from portatrain.system.urls import is_remote


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_recipe(parser)
    options.add_init(parser)
    parser.add_argument(
        "--cluster",
        metavar="NAME[,NAME...]",
        required=True,
        help="the acceptable clusters, best first; local is this machine",
    )
    parser.add_argument(
        "--run", metavar="NAME", help="the name of the run (default: the recipe's, with a number if taken)"
    )
    options.add_runs(parser, "for")
    options.add_backend(parser)
    parser.add_argument("--mesh", metavar="AXES", help="fsdp=4,tensor=2 (default: the planned one)")
    parser.add_argument("--devices", metavar="N", type=int, help="use N devices; on a CPU, N simulated ones")
    parser.add_argument("--detach", action="store_true", help="--cluster local: train in the background")
    parser.add_argument(
        "--max-restarts",
        metavar="N",
        type=int,
        default=3,
        help="a job gives up after N restarts in a row without a new checkpoint (default: 3)",
    )
    options.add_profile(parser)
    options.add_track(parser, " (default: `track` of the cluster in clusters.toml)")
    parser.add_argument(
        "--no-check", action="store_true", help="skip `portatrain check` for a recipe that has not been checked here"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted, without submitting it")


def run(args: argparse.Namespace) -> int:
    names = list(dict.fromkeys(name.strip() for name in args.cluster.split(",") if name.strip()))
    if not names:
        raise UserError("--cluster", expected="a name", got=repr(args.cluster), do="Use --cluster local.")
    options.positive("--devices", args.devices)
    if args.max_restarts < 0:
        raise UserError("--max-restarts", expected="0 or more", got=str(args.max_restarts), do="Choose a larger one.")
    backend = options.resolved_backend(args.backend) if args.backend and names == ["local"] else args.backend
    wanted = targets.targets(names, args.recipe, mesh=args.mesh, devices=args.devices, backend=backend)
    track = options.check_track("--track", args.track)
    track_of = {t.name: track or options.check_track(f"cluster {t.name}: track", t.track) for t in wanted}
    recipe = options.resolved_recipe(args)
    options.check_profile(args.profile, recipe.steps)
    run_name = _run_name(args.run, args.runs, recipe.name)

    from launchers.base import Job, launcher
    from portatrain.runs import changes
    from portatrain.runs.open import open_run

    given = run_path(run_name, args.runs)
    run_dir = given if is_remote(given) else str(Path(given).absolute())
    run = open_run(run_dir)
    recipe = changes.settled(run.path, recipe)
    run.check(recipe)
    _check_not_submitted(run_dir)
    fitting = wanted if args.dry_run else targets.fitting(wanted, recipe)
    source = str(Path(args.recipe).resolve()) if args.recipe.endswith(".py") or "/" in args.recipe else args.recipe
    jobs = [
        Job(
            run_dir=run_dir if target.engine != "local" or args.detach else given,
            recipe=source if target.engine != "local" or args.detach else args.recipe,
            overrides=tuple(args.overrides),
            cluster=target.name,
            engine=target.engine,
            backend=target.backend,
            mesh=target.mesh,
            devices=target.devices,
            hosts=target.hosts,
            processes=target.processes,
            max_restarts=args.max_restarts,
            detached=target.engine != "local" or args.detach,
            cwd=os.getcwd(),
            options=target.options,
            cluster_shape=target.cluster_shape,
            track=track_of[target.name],
            profile=args.profile,
        )
        for target in fitting
    ]
    for job in jobs:
        if job.engine:  # --dry-run also shows clusters that have none
            launcher(job.engine).check_settings(job)
    if args.dry_run:
        targets.show(jobs, wanted, recipe)
        return 0
    for job in jobs:
        launcher(job.engine).check(job)
    check_unseen(recipe, args)
    if len(jobs) == 1 and not jobs[0].detached:
        from portatrain.commands import foreground

        return foreground.run(jobs[0])
    from launchers.submission import submit

    submit(run, recipe, jobs)
    name = run_name if args.runs == "runs" else run_dir
    print(f"\nrun directory    {run_dir}\nlaunch status {name}   launch logs -f {name}   launch cancel {name}")
    return 0


def _check_not_submitted(run_dir: str) -> None:
    from portatrain.runs import jobs

    there = jobs.of(run_dir)
    if there:
        name = Path(run_dir).name
        raise UserError(
            f"run {name}",
            expected="a name for a new run, or `launch resume` for an existing one",
            got=f"a run that has {counted(len(there), 'jobs')}",
            do=f"See `launch status {name}`; `launch resume {name}` continues it.",
        )


def _run_name(given: str | None, runs: str, recipe_name: str) -> str:
    """Return `given` if it is a valid folder name; by default the recipe's name, with the first unused number."""
    if given is not None:
        _check_name(given)
        return given
    names = [recipe_name, *(f"{recipe_name}-{number}" for number in range(2, 10_000))]
    if is_remote(runs):
        from portatrain.runs.remote_run_dir import run_names

        taken = set(run_names(runs))
        return next(name for name in names if name not in taken)
    return next(name for name in names if not Path(runs, name).exists())


def _check_name(given: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", given):
        raise UserError(
            f"--run {given!r}",
            expected="1 to 63 letters, digits, '.', '-' or '_', a letter or digit first",
            got=f"{len(given)} characters" if len(given) > 63 else repr(given),
            do="Choose a name such as tiny-lm-wide.",
        )


def run_path(name: str, runs: str) -> str:
    """Return the path or URL of the run `name` in `runs`; UserError for a name that no run may have."""
    _check_name(name)
    return f"{runs.rstrip('/')}/{name}" if is_remote(runs) else str(Path(runs) / name)
