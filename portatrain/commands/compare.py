"""Compare runs: a table here, and one HTML page that needs no network.

The page shows loss and validation loss over steps, tokens, seconds of training and, where the price of the cluster is
known (clusters.toml or the catalog), over USD; gradient norm and rate over steps; the fields in which the recipes
differ. Runs that differ in one field alone are a sweep: the page shows the result over the values of that field, once
for each setting of the others.

The best run has the lowest validation loss. If one was not evaluated, it has the lowest training loss at the last step
that all have reached.

examples:
  portatrain compare narrow wide
  portatrain compare runs/narrow runs/wide /shared/runs/other --out widths.html
  portatrain compare --runs runs/sweep
  portatrain compare narrow wide --json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from portatrain.commands import options
from portatrain.errors import UserError
from portatrain.system import terminal
from portatrain.system.paths import place

if TYPE_CHECKING:
    from portatrain.runs.comparison import Comparison, Price
    from portatrain.runs.history import AttemptHistory, History

MOST_COLUMNS = 5
"""The table of the terminal has a column for each differing field, up to this many fields; else one for all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs_given", metavar="RUN", nargs="*", type=place, help="names or run directories (default: all of --runs)"
    )
    options.add_runs(parser)
    parser.add_argument("--out", metavar="FILE", type=Path, help="the page to write (default: compare.html)")
    parser.add_argument("--json", action="store_true", help="print JSON, and write a page only if --out names one")


def run(args: argparse.Namespace) -> int:
    from portatrain.runs.comparison import read
    from portatrain.runs.open import find

    named = [find(name, args.runs).where for name in args.runs_given]
    found = compared(read(named) if named else _all(args.runs))
    if args.json:
        print(json.dumps(found.as_json(), indent=1))
        if args.out is not None:
            write(found, args.out)
        return 0
    out = args.out or Path("compare.html")
    write(found, out)
    show(found)
    print(f"{out}: {len(found.runs)} runs over {', '.join(found.axes) or 'nothing: none has trained'}")
    return 0


def _all(runs: str) -> list[History]:
    """Return the histories of all runs of a folder. A damaged run must not hide the others: it is named."""
    from portatrain.runs.comparison import read
    from portatrain.runs.open import names

    found = []
    for name in names(runs):
        try:
            found += read([f"{runs.rstrip('/')}/{name}"])
        except (UserError, OSError) as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    return found


def compared(histories: Sequence[History]) -> Comparison:
    """Return the comparison of runs, with the prices of what they ran on."""
    from portatrain.runs.comparison import compare

    return compare(histories, [prices(history) for history in histories])


def write(found: Comparison, out: Path) -> None:
    """Write the page. Raises UserError for a file that cannot be written, or that is something else."""
    from portatrain.runs.report.compared import MADE_BY, page

    try:
        if out.exists() and MADE_BY not in out.read_text(encoding="utf-8", errors="replace")[:500]:
            raise UserError(
                f"file {out}",
                expected="a new file, or a page of `portatrain compare`",
                got="a file of something else, which was not changed",
                do="Choose another with --out.",
            )
        out.write_text(page(found), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"file {out}", expected="a writable file", got=str(error), do="Choose another with --out."
        ) from error


def show(found: Comparison) -> None:
    """Print a table of the runs."""
    from rich.table import Table
    from rich.text import Text

    from portatrain.runs.report.compared import shown
    from portatrain.system.text import duration, si

    several = len(found.fields) > MOST_COLUMNS
    fields = ["differs"] if several else found.fields
    priced = any(one.usd is not None for one in found.runs)
    head = ["run", "state", "step", *fields, f"loss at step {found.common_step}", "validation loss", found.unit, "time"]
    table = Table(*([*head, "USD"] if priced else head))
    for one in found.runs:
        cells = [one.label, one.run.state, f"{one.run.step}/{one.run.steps}"]
        if several:
            cells.append("\n".join(f"{name}={value}" for name, value in one.differs.items()) or "-")
        else:
            cells += [one.differs.get(name, "-") for name in fields]
        tokens = one.run.curve[-1].get("tokens") if one.run.curve else None
        cells += [shown(one.loss_at(found.common_step)) or "-", shown(one.run.validation_loss) or "-"]
        cells += ["-" if tokens is None else si(tokens), duration(one.seconds)]
        if priced:
            cells.append(shown(one.usd, 4) or "-")
        table.add_row(*(Text(cell) for cell in cells), style="bold" if one is found.best else None)
    terminal.console(200).print(table)
    if (best := found.best) is not None:
        print(f"best by {found.judged_by}: {best.label} ({found.result(best):.5g})")


def prices(history: History) -> dict[int, Price]:
    """Return the prices of a run's attempts: of their cluster, else of their chips; none for what is not known."""
    found = {one.number: _price(one) for one in history.attempts}
    return {number: price for number, price in found.items() if price is not None}


def _price(attempt: AttemptHistory) -> Price | None:
    from portatrain.plan.clusters import names
    from portatrain.plan.clusters.cluster import Cluster
    from portatrain.plan.recorded import chip_of
    from portatrain.runs.comparison import Price

    cluster = None
    if attempt.cluster not in ("", "local"):
        try:
            (cluster,) = names.find([attempt.cluster], "")
        except UserError as error:
            print(f"no price of cluster {attempt.cluster} by its name: {error}", file=sys.stderr)
    chip = chip_of(attempt.kind)
    if cluster is None and chip is not None:
        chips = -(-attempt.devices // chip.devices_per_chip)
        cluster = Cluster(name=f"{chips} x {chip.name}", chip=chip, chips=chips, domain=chips)
    if cluster is None or cluster.price is None:
        return None
    kind, price = cluster.price
    source = f"{cluster.name}: {cluster.chips} chips at {price.value:g} USD a chip-hour ({kind}, {price.source})"
    return Price(usd_per_hour=cluster.chips * price.value, source=source)
