"""Evaluate a trained model without dropout: its loss, perplexity or bits per byte, and every metric that it records.

By default the data is the validation split of the run, as the run's own evaluations read it. --set data... takes other
data, and then all of it. The loss is the mean over the targets that count.

--tasks evaluates on tasks of EleutherAI's lm-evaluation-harness instead (pip install 'portatrain[lm-eval]'), those of
--task-folder or of the package. Nothing is downloaded. Results are recorded in the run, at the step of the checkpoint.

examples:
  portatrain eval runs/first
  portatrain eval first --step 2000 --ema --json
  portatrain eval runs/first --set data=TextFiles --set data.paths=my/texts
  portatrain eval exported --set data.paths=my/texts --batches 20
  portatrain eval first --tasks sums,facts --task-folder my_tasks
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portatrain.commands import eval_tasks, options, trained_model
from portatrain.errors import UserError
from portatrain.system import json_files

if TYPE_CHECKING:
    from portatrain.data import OpenData, Split
    from portatrain.recipe import Recipe

SPLITS = ("validation", "train", "all")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    trained_model.add_arguments(parser)
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="FIELD=VALUE",
        action="append",
        default=[],
        help="change the data: --set data=TextFiles --set data.paths=FOLDER, --set data.seq_len=512",
    )
    parser.add_argument("--split", choices=SPLITS, help="default: validation; with --set all, which holds nothing out")
    parser.add_argument(
        "--batch", metavar="N", type=int, help="samples of a batch (default: those of a step; with --tasks 8)"
    )
    parser.add_argument("--batches", metavar="N", type=int, help="evaluate the first N batches only")
    eval_tasks.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    options.positive("--batch", args.batch)
    options.positive("--batches", args.batches)
    eval_tasks.check(args)
    if args.tasks is not None:
        return eval_tasks.run(args)
    for text in args.overrides:
        if not text.startswith(("data=", "data.")):
            raise UserError(
                f"--set {text}", expected="a field of data", got=text, do="The weights decide everything else."
            )
    path = trained_model.where(args)
    model = trained_model.loaded(args, path)
    recipe = _with_data(model.recipe, args)
    name = args.split or _default(args)
    split = _split(_opened(path, recipe, same=recipe.data == model.recipe.data), name, recipe)
    batch = args.batch or recipe.batch
    total = -(-split.windows // batch)
    total = min(total, args.batches or total)
    told, began_s, done = trained_model.Told(), time.perf_counter(), [0]

    def tell() -> bool:
        told(lambda: f"{done[0]} of {total} batch{'es' * (total != 1)}")
        done[0] += 1
        return False

    found = model.evaluate_split(split, batch=batch, batches=args.batches, stopped=tell)
    loss, samples, metrics = found
    result: dict[str, Any] = {
        "loss": loss,
        **_perplexity(recipe, loss),
        **metrics,
        "samples": samples,
        "split": name,
        "step": model.step,
        "backend": model.backend,
        "seconds": round(time.perf_counter() - began_s, 3),
    }
    if args.json:
        print(json.dumps(json_files.strict(result)))
        return 0
    for name, value in result.items():
        print(f"{name.replace('_', ' '):<16} {f'{value:.6g}' if isinstance(value, float) else value}")
    return 0


def _perplexity(recipe: Recipe, loss: float) -> dict[str, float]:
    """Return the perplexity, by name, if the loss is a mean over targets; that of preferences is one over pairs."""
    from portatrain.data.spec import Preferences

    of_targets = recipe.data.tokens_per_sample() and not isinstance(recipe.data, Preferences)
    return {"perplexity": math.exp(min(loss, 700.0))} if of_targets else {}


def _default(args: argparse.Namespace) -> str:
    return "all" if args.overrides else "validation"


def _with_data(recipe: Recipe, args: argparse.Namespace) -> Recipe:
    from portatrain.recipe import apply_overrides

    made = apply_overrides(recipe, args.overrides)
    if (args.split or _default(args)) != "all":
        return made
    nothing = {"validation": 0.0, "validation_paths": ()}
    names = {f.name for f in dataclasses.fields(made.data)}
    held = {name: value for name, value in nothing.items() if name in names}
    return dataclasses.replace(made, data=dataclasses.replace(made.data, **held))


def _opened(path: str, recipe: Recipe, *, same: bool) -> OpenData:
    """Open the data: those of the run from what it packed, others from their source, in memory."""
    from portatrain.data import open_data
    from portatrain.runs.open import open_run
    from portatrain.system.urls import is_remote

    folder = None
    if same and is_remote(path):
        folder = open_run(path).data()
    elif same:
        near = Path(path).absolute()
        found = next((f for f in (near, *near.parents[:2]) if (f / "run.json").is_file()), None)
        folder = None if found is None or not (found / "data").is_dir() else found / "data"
    if folder is None:
        print("reading the data", file=sys.stderr)
    return open_data(recipe.data, seed=recipe.seed, pack_dir=folder)


def _split(data: OpenData, name: str, recipe: Recipe) -> Split:
    if name != "validation":
        return data.train
    if data.validation is not None:
        return data.validation
    raise UserError(
        f"recipe {recipe.name}: data",
        expected="a validation split",
        got="none, since nothing is held out",
        do="Give --split train, or other data with --set data.paths=...",
    )
