"""Check RECIPE before a run: run its model at small size in the oracle, jax and torch, in less than a minute.

The command checks the forward pass in training and in evaluation, repeated calls, each sample alone, that the loss
depends on every parameter, the model's operations at their kinks, jax against torch, two microbatches, save and
restore, and the meshes fsdp=2 and tensor=2. A finding names the operation, parameter, State, rule or axis at fault,
and what to do. The exit code is 0 if nothing is found, else 1. The command uses no accelerator and reads no corpus.
`launch` runs the check for recipes that it has not seen; after a check that finds nothing, a recipe counts as seen.

examples:
  portatrain check my_recipe.py
  portatrain check my_recipe.py --set optimizer=Muon --json
  portatrain check my_recipe.py --backends torch
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import TYPE_CHECKING

from portatrain.commands import options, unseen
from portatrain.errors import UserError, choice
from portatrain.system import environment, terminal
from portatrain.system.exit_codes import FOUND, OK

if TYPE_CHECKING:
    from portatrain.testing.recipe_check.report import Report, Row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_recipe(parser)
    parser.add_argument(
        "--backends", metavar="NAMES", default="jax,torch", help="the frameworks to compare (default: jax,torch)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object with all checks and findings")


def run(args: argparse.Namespace) -> int:
    names = tuple(dict.fromkeys(name.strip() for name in args.backends.split(",") if name.strip()))
    if not names:
        raise UserError("--backends", expected="names, such as jax,torch", got=repr(args.backends), do="Give one.")

    from portatrain.testing.recipe_check.run import BACKENDS, check_recipe, on_cpu

    for name in names:
        if name not in BACKENDS:
            raise choice("--backends", name, BACKENDS)
    with _prints_to_stderr() if args.json else nullcontext():
        on_cpu()  # before the recipe's file, which may import a framework
        recipe = options.resolved_recipe(args)
        memory = unseen.memory_of(recipe, args)  # before the check, which may import more of the recipe's package
        report = check_recipe(recipe, source=args.recipe, backends=names, progress=_progress)
    if environment.CHECK.get() and set(names) == set(BACKENDS):
        unseen.remember(memory, report.to_json())
    if args.json:
        print(json.dumps(report.to_json(), indent=1))
    else:
        _print(report)
    return FOUND if report.findings else OK


@contextmanager
def _prints_to_stderr() -> Iterator[None]:
    """Send to standard error what the recipe, its libraries and its processes print, so that the JSON stands alone."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _progress(row: Row) -> None:
    print(f"{row.status:>7} {row.seconds:5.1f} s  {row.name}", file=sys.stderr, flush=True)


def _print(report: Report) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table("check", "result", "seconds", "")
    for row in report.rows:
        table.add_row(row.name, row.status, f"{row.seconds:.1f}", escape(row.about))
    terminal.console(140).print(table)
    print(f"{report.recipe}, checked at {report.sizes or 'no size'}")
    for finding in report.findings:
        print(f"\n{finding.check}: {finding}")
    left_out = [row.name for row in report.rows if row.status == "not run"]
    print(
        f"\n{len(report.findings)} found in {sum(row.status != 'not run' for row in report.rows)} checks"
        + (f"; not run: {', '.join(left_out)}" if left_out else "")
    )
