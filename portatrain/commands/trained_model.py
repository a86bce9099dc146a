"""The options of commands that use a trained model, and how they find it."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from portatrain.commands import options
from portatrain.commands.ckpt import load_recipe_file
from portatrain.system.paths import place
from portatrain.system.urls import is_remote

if TYPE_CHECKING:
    from portatrain.recipe import Recipe
    from portatrain.training.trained import TrainedModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add RUN and the options that choose weights and backend."""
    parser.add_argument(
        "model",
        metavar="RUN",
        type=place,
        help="the name of a run, its run directory or URL, a checkpoint's folder, or a folder of transformers",
    )
    options.add_runs(parser)
    parser.add_argument("--step", metavar="N", type=int, help="step of the checkpoint (default: the newest)")
    parser.add_argument("--ema", action="store_true", help="use the averaged weights")
    parser.add_argument(
        "--recipe",
        metavar="FILE",
        help="the recipe file that defines the model (default: the one that the run recorded)",
    )
    options.add_backend(parser)


def where(args: argparse.Namespace) -> str:
    """Return the path or URL of the model that the user named."""
    if is_remote(args.model) or Path(args.model).exists():
        return str(args.model)
    from portatrain.runs.open import find

    return str(find(args.model, args.runs).where)


def loaded(args: argparse.Namespace, path: str, recipe: Recipe | None = None) -> TrainedModel:
    """Return the model at `path` with the options of `add_arguments`."""
    from portatrain.training.trained import load

    backend = options.resolved_backend(args.backend)
    load_recipe_file(path, args.recipe)
    return load(path, step=args.step, backend=backend, recipe=recipe, ema=args.ema)


class Told:
    """Lines of progress on standard error, every two seconds."""

    def __init__(self) -> None:
        self._last_s = time.monotonic()

    def __call__(self, text: Callable[[], str]) -> None:
        if time.monotonic() > self._last_s + 2:
            self._last_s = time.monotonic()
            print(text(), file=sys.stderr, flush=True)
