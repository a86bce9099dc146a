"""List the runs of a folder, the most recently active one first.

examples:
  launch list
  launch list --runs /shared/runs --json
"""

from __future__ import annotations

import argparse
import json
import sys

from portatrain.errors import UserError
from portatrain.runs.history import History, read_history
from portatrain.runs.open import names, open_run
from portatrain.system import terminal
from portatrain.system.text import age


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runs", metavar="DIR", default="runs", help="the folder or URL with run directories (default: runs)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    found: list[tuple[float, History]] = []
    for name in names(args.runs):
        try:
            run = open_run(f"{args.runs}/{name}")
            path, now = run.path, read_history(run)
            files = [*path.glob("attempts/*/*.jsonl"), *path.glob("*.json")] or [path]
            found.append((max(p.lstat().st_mtime for p in files), now))
        except (UserError, OSError) as error:  # a damaged or private run must not hide the others
            print(f"{name}: {error}", file=sys.stderr)
    found.sort(key=lambda pair: -pair[0])
    if args.json:
        print(json.dumps([{**now.as_json(), "moved_unix_s": moved_s} for moved_s, now in found], indent=1))
        return 0
    if not found:
        print(f"no runs in {args.runs}")
        return 0
    from rich.table import Table
    from rich.text import Text

    table = Table("run", "state", "step", "loss", "where", "attempts", "moved")
    for moved_s, now in found:
        where = now.attempts[-1].where if now.attempts else "-"
        loss = f"{now.loss:.4f}" if now.loss is not None else "-"
        table.add_row(
            *(Text(cell) for cell in (now.run, now.state, f"{now.step}/{now.steps}", loss, where)),
            str(len(now.attempts)),
            f"{age(moved_s)} ago",
        )
    console = terminal.console(160)
    console.print(table)
    return 0
