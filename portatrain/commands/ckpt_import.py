"""`portatrain ckpt import`: begin a run from a checkpoint in another format."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from portatrain.commands import options
from portatrain.commands.init import named
from portatrain.commands.init_from_hub import recipe_text
from portatrain.errors import UserError
from portatrain.recipe import Recipe, apply_overrides, load_recipe

RECIPE_FILE = "recipe.py"
"""The recipe of a run that was imported without one, in its directory."""


def bring(args: argparse.Namespace) -> int:
    from checkpoints_format import LocalStore
    from portatrain.checkpoint.interop.export_import import import_from
    from portatrain.checkpoint.interop.huggingface import hub_of, left_out
    from portatrain.checkpoint.locations import step_name
    from portatrain.runs.commits import BEGUN_FROM
    from portatrain.runs.run_dir import RunDir

    folder = Path(args.run_dir)
    written = None if args.recipe is not None else folder / RECIPE_FILE
    text = "" if written is None else _recipe_of(args, folder)
    recipe = options.resolved_recipe(args) if written is None else _loaded(text, args.overrides)
    made = not folder.exists()
    if not made and any(folder.iterdir()):
        raise UserError(
            f"run directory {folder}",
            expected="an unused name",
            got="a folder that is not empty",
            do="Choose another name; nothing in it was changed.",
        )
    run = RunDir(folder)
    run.check(recipe)
    try:
        # A run whose import was killed has run.json and no checkpoint, so that `train` does not take it for a new one.
        run.create(recipe, **{BEGUN_FROM: {"format": args.format, "path": str(args.source.absolute())}})
        step = import_from(
            args.source,
            args.format,
            recipe,
            lambda step: LocalStore(folder / "checkpoints" / step_name(step), create=True),
            accept_drift=args.accept_drift is not None,
        )
        if written is not None:
            written.write_text(text, encoding="utf-8")
    except BaseException:  # without its checkpoint, the run would start from random weights
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        for name in ("run.json", *((RECIPE_FILE,) if written else ())):
            (folder / name).unlink(missing_ok=True)
        if made:
            with contextlib.suppress(OSError):  # somebody put a file there
                folder.rmdir()
        raise
    words = ["portatrain", "train", args.recipe or str(written), "--run-dir", str(args.run_dir)]
    words += [word for override in args.overrides for word in ("--set", override)]
    if args.accept_drift is not None:
        words += ["--accept-drift", args.accept_drift]
    if written is not None:
        model = type(recipe.model)
        print(
            f"{written}: the recipe that config.json implies, a {model.__name__} of {model.__module__}. To import with "
            f"other data or another rate, give --set, or RECIPE: `portatrain init my_recipe.py --from {args.source}` "
            "writes one to edit."
        )
    if args.format == "huggingface" and (said := left_out(args.source, hub_of(recipe))):
        print(said)
    print(f"{args.run_dir}: a checkpoint of step {step}. Continue with: {shlex.join(words)}")
    return 0


def _recipe_of(args: argparse.Namespace, folder: Path) -> str:
    """Return the recipe, as a file has it, of a run in `folder` that begins with the weights in SOURCE."""
    if args.format != "huggingface":
        raise UserError(
            "ckpt import",
            expected=f"RECIPE, since a folder of format {args.format} does not say which model its tensors are of",
            got="none",
            do=f"Name the recipe of the run that was exported: portatrain ckpt import {args.source} RECIPE ...",
        )
    return recipe_text(named("finetune.py", Path(f"{folder.name}.py")), args.source, (), imported=True)


def _loaded(text: str, overrides: Sequence[str]) -> Recipe:
    """Return the recipe of a file that is not written yet: its run directory is made last."""
    with tempfile.TemporaryDirectory() as aside:
        file = Path(aside) / RECIPE_FILE
        file.write_text(text, encoding="utf-8")
        return apply_overrides(load_recipe(str(file)), overrides)
