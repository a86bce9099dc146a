"""Train RECIPE on a cluster. `local` is this machine: it trains here, in the foreground.

The run directory is runs/NAME. At the end come the loss curve as a picture and the results.

examples:
  launch --cluster local tiny-lm
  launch --cluster local tiny-vit --run first-vit --backend torch
  launch --cluster local my_recipe.py --set steps=50 --dry-run
  launch --cluster tpu-v5p-256,h100-64 llama3-8b --dry-run
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from launchers.base import Job, launcher_class, launcher_names
from portatrain.commands import options
from portatrain.errors import UserError
from portatrain.recipe import Recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_recipe(parser)
    parser.add_argument(
        "--cluster",
        metavar="NAME[,NAME...]",
        required=True,
        help="where to train; the first that can, in this order",
    )
    parser.add_argument(
        "--run", metavar="NAME", help="name of the run (default: the recipe's, numbered if taken)"
    )
    parser.add_argument(
        "--runs", metavar="DIR", default="runs", help="the folder that run directories are in"
    )
    options.add_backend(parser)
    parser.add_argument("--dry-run", action="store_true", help="print what would be run, and stop")


def run(args: argparse.Namespace) -> int:
    names = [name.strip() for name in args.cluster.split(",") if name.strip()]
    if not names:
        raise UserError("--cluster", expected="a name", got=repr(args.cluster), do="Use --cluster local.")
    recipe = options.resolved_recipe(args)
    elsewhere = [name for name in names if name not in launcher_names()]
    if elsewhere:
        return _elsewhere(args, recipe, elsewhere)
    backend = options.resolved_backend(args.backend) if args.backend else None
    run_name = _run_name(args.run, Path(args.runs), recipe.name)

    from portatrain.run_dir import RunDir

    run_dir = Path(args.runs) / run_name
    RunDir(run_dir).check(recipe)
    job = Job(
        recipe=args.recipe,
        run_dir=str(run_dir),
        backend=backend,
        overrides=tuple(args.overrides),
        cluster=names[0],
    )
    launcher = launcher_class(names[0])()
    if args.dry_run:
        print(launcher.materialize(job))
        return 0
    return launcher.submit(job)


def _elsewhere(args: argparse.Namespace, recipe: Recipe, names: list[str]) -> int:
    """Clusters of the catalog or of clusters.toml: planned; nothing here can submit to them yet."""
    from portatrain.commands import dry_run

    wanted = dry_run.clusters(names, args.recipe, launcher_names())
    if not args.dry_run:
        raise UserError(
            f"cluster {names[0]!r}",
            expected=f"one that a launcher of this version submits to ({', '.join(launcher_names())})",
            got=f"{wanted[0].chips} chips of {wanted[0].chip.name}, which it can plan for and train on, not submit to",
            do="Add --dry-run for the plan; in a job that is already there, run: portatrain train "
            f"{args.recipe} --run-dir DIR.",
        )
    dry_run.show(recipe, wanted)
    return 0


def _run_name(given: str | None, runs: Path, recipe_name: str) -> str:
    """The name that was given, if it can be a folder's; else the recipe's, or the first free of name-2, name-3 ..."""
    if given is not None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", given):
            raise UserError(
                f"--run {given!r}",
                expected="1 to 63 letters, digits, '.', '-' or '_', a letter or digit first",
                got=f"{len(given)} characters" if len(given) > 63 else repr(given),
                do="Choose a name such as tiny-lm-wide.",
            )
        return given
    names = [recipe_name, *(f"{recipe_name}-{number}" for number in range(2, 10_000))]
    return next(name for name in names if not (runs / name).exists())
