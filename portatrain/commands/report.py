"""Write the report of a run to DIR/report.html: one HTML page that needs no network.

The page shows loss, gradient norm, throughput and learning rate over the steps; a coloured band for every attempt,
with its backend, devices and mesh; each resume point, with the verdict of the continuity check; time lost to restarts;
the tree of forks; what changes of the recipe did; the metrics of layers, such as the load of experts; statistics of
every layer; the numbers of the model and of hooks; checkpoints; the resolved recipe; and planned against measured
figures if a plan was recorded.

examples:
  portatrain report runs/first
  portatrain report runs/first --out first.html
"""

from __future__ import annotations

import argparse
from pathlib import Path

from portatrain.errors import UserError
from portatrain.system.paths import place
from portatrain.system.text import counted
from portatrain.system.urls import is_remote


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="DIR", type=place, help="the run directory, or its URL in an object store")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, help="the file to write (default: DIR/report.html, or ./NAME.html)"
    )


def run(args: argparse.Namespace) -> int:
    from portatrain.runs.changes import family
    from portatrain.runs.history import kept_checkpoints, read_history
    from portatrain.runs.open import names, open_run
    from portatrain.runs.report.page import page

    found = read_history(args.run_dir)
    out = args.out or (Path(f"{found.run}.html") if is_remote(args.run_dir) else Path(args.run_dir, "report.html"))
    try:
        run = open_run(args.run_dir)
        # In a store, every run beside this one would have to be fetched: `launch list` draws the whole tree.
        beside = None if is_remote(args.run_dir) else Path(args.run_dir).absolute().parent
        siblings = {} if beside is None else {name: beside / name for name in names(beside)}
        forks = family(run.path, siblings)
        out.write_text(page(found, kept_checkpoints(run), forks), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"file {out}", expected="a writable file", got=str(error), do="Choose another with --out."
        ) from error
    points = len(found.resume_points)
    print(
        f"{out}: {counted(len(found.curve), 'steps')}, {counted(len(found.attempts), 'attempts')}, "
        f"{points} resume point{'s' * (points != 1)}"
    )
    return 0
