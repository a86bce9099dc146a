"""Define the options that several commands share, and check their values."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from portatrain.errors import UserError
from portatrain.recipe import Recipe, apply_overrides, load_recipe
from portatrain.system.paths import place
from portatrain.system.urls import is_remote


def add_recipe(parser: argparse.ArgumentParser, *, required: bool = True, default: str = "") -> None:
    """Add RECIPE and --set. default: what is taken without RECIPE, in words."""
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        nargs=None if required else "?",
        help=f"a Python file, or the name of a shipped recipe (tiny-lm){f' (default: {default})' if default else ''}",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="FIELD=VALUE",
        action="append",
        default=[],
        help="change a field of the recipe: --set steps=100 --set model.layers=8; or replace it by another class: "
        "--set optimizer=Lion --set data=TextFiles --set data.paths=FOLDER",
    )


def add_init(parser: argparse.ArgumentParser) -> None:
    """Add --init, which sets the recipe's field of that name."""
    parser.add_argument(
        "--init",
        dest="overrides",
        metavar="FOLDER",
        action="append",
        default=[],
        type=lambda text: f"init={folder(text).absolute()}",
        help="begin with the weights of a folder of transformers (config.json and .safetensors): fine-tune. The same "
        "as --set init=FOLDER; `portatrain init my_recipe.py --from FOLDER` writes a recipe for the folder's model",
    )


def add_changes(parser: argparse.ArgumentParser) -> None:
    """Add --set for a run that has a recipe."""
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="FIELD=VALUE",
        action="append",
        default=[],
        help="change a field of the run's recipe: --set optimizer.lr=1e-4 (docs/reference/changes.md has all fields)",
    )


def folder(text: str) -> Path:
    """Return a folder, for `type=`. Raises UserError for a URL, because its path would be a folder named 's3:'."""
    if is_remote(text):
        raise UserError(
            text,
            expected="a folder of this machine",
            got="a URL of an object store",
            do="This command works on local files; `portatrain train --run-dir` and `launch --runs` take URLs.",
        )
    return Path(place(text))


def add_runs(parser: argparse.ArgumentParser, use: str = "with") -> None:
    """Add --runs. `use`: 'with' if a command reads runs that are there, 'for' if it begins them."""
    parser.add_argument(
        "--runs",
        metavar="DIR",
        type=place,
        default="runs",
        help=f"the folder or object-store URL {use} run directories (default: runs)",
    )


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add RUN and --runs."""
    parser.add_argument("run", metavar="RUN", type=place, help="the name of a run, or its run directory")
    add_runs(parser)


def add_backend(parser: argparse.ArgumentParser, default: str = "jax if installed, else torch") -> None:
    """Add --backend."""
    parser.add_argument(
        "--backend", metavar="NAME", help=f"jax, torch, or another installed backend (default: {default})"
    )


def add_track(parser: argparse.ArgumentParser, more: str = "") -> None:
    """Add --track."""
    parser.add_argument(
        "--track",
        metavar="NAME",
        action="append",
        default=[],
        help="also send metrics to this tracker: wandb, tensorboard, trackio, mlflow, FILE.py:CLASS, or one that an "
        f"installed package registers (docs/start/tracker.md); repeat it for several{more}",
    )


def check_track(what: str, names: Iterable[str]) -> tuple[str, ...]:
    """Return `names` without repetitions, with absolute paths of files; UserError for an unknown tracker."""
    from portatrain.training.metrics.trackers import resolved

    return resolved(what, names)


def add_profile(parser: argparse.ArgumentParser) -> None:
    """Add --profile."""
    parser.add_argument(
        "--profile",
        metavar="FIRST:LAST",
        help="trace the steps FIRST to LAST, both included, into the attempt's folder, for Perfetto or xprof, and list "
        "the ten most expensive operations",
    )


def check_profile(given: str | None, last_step: int) -> None:
    """Raise UserError unless `given` is None or a range of the steps 1 to `last_step`."""
    if given is not None:
        from portatrain.training.profiling import StepRange

        StepRange.parse(given, last_step)


def resolved_recipe(args: argparse.Namespace) -> Recipe:
    """Return the recipe that the user named, with the overrides of --set."""
    return apply_overrides(load_recipe(args.recipe, cwd=Path.cwd()), args.overrides)


def resolved_backend(name: str | None) -> str:
    """Return the backend `name`, or the default one; UserError unless it is known and installed."""
    from portatrain.backends.base import check_backend, default_backend

    return default_backend() if name is None else check_backend(name)


def positive(what: str, value: int | None) -> None:
    """Raise UserError unless ``value`` is None or at least 1."""
    if value is not None and value < 1:
        raise UserError(what, expected="a whole number of at least 1", got=str(value), do="Choose a larger one.")
