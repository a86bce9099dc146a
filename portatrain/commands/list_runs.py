"""List the runs of a folder, the most recently active one first.

`differs` shows the fields in which a run differs from other runs of the same recipe, as --set would change them, so
the runs of a sweep can be compared. `validation loss` is that of the newest evaluation, `backend` that of the last
attempt. A fork stands below its parent, with the step at which it began.

examples:
  launch list
  launch list --runs /shared/runs --json
"""

from __future__ import annotations

import argparse
import json
import sys

from portatrain.commands import options
from portatrain.errors import UserError
from portatrain.runs.differing import differences
from portatrain.runs.history import History, read_history
from portatrain.runs.open import names, open_run
from portatrain.system import terminal
from portatrain.system.text import age


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_runs(parser)
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
    found, depths = _tree(found)
    differs = _differences([now for _, now in found])
    if args.json:
        rows = [
            {**now.as_json(), "differs": fields, "moved_unix_s": moved_s}
            for (moved_s, now), fields in zip(found, differs, strict=True)
        ]
        print(json.dumps(rows, indent=1))
        return 0
    if not found:
        print(f"no runs in {args.runs}")
        return 0
    from rich.table import Table
    from rich.text import Text

    table = Table(
        "run", "state", "step", "train loss", "validation loss", "differs", "backend", "where", "attempts", "last write"
    )
    for (moved_s, now), fields, depth in zip(found, differs, depths, strict=True):
        last = now.attempts[-1] if now.attempts else None
        backend, where = (last.backend or "-", last.where) if last else ("-", "-")
        losses = ("-" if loss is None else f"{loss:.4f}" for loss in (now.loss, now.validation_loss))
        changes = "\n".join(f"{path}={value}" for path, value in fields.items()) or "-"
        at = "" if now.parent is None else f" (from step {now.parent.get('step')} of {now.parent.get('run')})"
        name = f"{'  ' * (depth - 1)}└ {now.run}" if depth else now.run
        cells = (f"{name}{at}", now.state, f"{now.step}/{now.steps}", *losses, changes, backend, where)
        table.add_row(*(Text(cell) for cell in cells), str(len(now.attempts)), f"{age(moved_s)} ago")
    console = terminal.console(200)
    console.print(table)
    return 0


def _tree(runs: list[tuple[float, History]]) -> tuple[list[tuple[float, History]], list[int]]:
    """Return the runs with every fork below its parent, and the depth of each in the tree.

    Parents are in the order of what moved last among them and their forks; forks of a run in the order of their steps.
    """
    known = {now.run: (moved_s, now) for moved_s, now in runs}
    below: dict[str | None, list[str]] = {}
    for name, (_, now) in known.items():
        parent = None if now.parent is None else str(now.parent.get("run"))
        below.setdefault(parent if parent in known and parent != name else None, []).append(name)

    def moved(name: str) -> float:
        return max([known[name][0], *(moved(child) for child in below.get(name, ()))])

    def step(name: str) -> tuple[int, float]:
        parent = known[name][1].parent or {}
        return int(parent.get("step") or 0), known[name][0]

    ordered: list[tuple[float, History]] = []
    depths: list[int] = []

    def add(name: str, depth: int) -> None:
        ordered.append(known[name])
        depths.append(depth)
        for child in sorted(below.get(name, ()), key=step):
            add(child, depth + 1)

    for root in sorted(below.get(None, ()), key=moved, reverse=True):
        add(root, 0)
    left = [name for name in known if known[name] not in ordered]  # records that name each other as parents
    return [*ordered, *(known[name] for name in left)], [*depths, *(0 for _ in left)]


def _differences(runs: list[History]) -> list[dict[str, str]]:
    """Return, for each run, the fields of its recipe that are not the same in all runs of the recipe of that name."""
    groups: dict[str, list[int]] = {}
    for at, run in enumerate(runs):
        groups.setdefault(repr(run.recipe.get("name")), []).append(at)
    found: dict[int, dict[str, str]] = {}
    for group in groups.values():
        found |= zip(group, differences([runs[at].recipe for at in group]), strict=True)
    return [found[at] for at in range(len(runs))]
